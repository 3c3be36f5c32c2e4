//! The migrations of the schema.
//!
//! Decision: docs/decisions/0048-which-process-creates-the-table.md

use std::fmt::Write as _;

/// The migrations with their versions, in ascending order. Each must keep existing rows, because a
/// table `object` may belong to the Go services.
const MIGRATIONS: [(i64, &str); 2] = [
    (20_261_121_000_001, include_str!("../../../../migrations/20261121000001_object.sql")),
    (20_261_130_000_001, include_str!("../../../../migrations/20261130000001_presence_change.sql")),
];

/// The key of the advisory lock for migrations, which no other application is likely to use.
const LOCK: i64 = i64::from_be_bytes(*b"lastseen");

/// The statements that migrate the schema, to be executed in one transaction.
///
/// `_lastseen_migrations` records the applied migrations, and belongs to Lastseen alone. Older
/// versions of Lastseen recorded them in `_sqlx_migrations`, which other applications use as well.
/// That table stays unchanged, and the migrations that it lists are applied again, which changes
/// nothing.
pub(super) fn script() -> String {
    let mut script = format!(
        "SELECT pg_advisory_xact_lock({LOCK});
         CREATE TABLE IF NOT EXISTS _lastseen_migrations (
             version bigint PRIMARY KEY,
             applied_at timestamptz NOT NULL DEFAULT now()
         );
         -- If only a table was dropped, its migrations must be applied again.
         DELETE FROM _lastseen_migrations
         WHERE to_regclass('object') IS NULL OR to_regclass('presence_change') IS NULL;\n"
    );
    for (version, sql) in MIGRATIONS {
        // Writing to a string cannot fail.
        _ = write!(
            script,
            "DO $migration$ BEGIN
                 IF EXISTS (SELECT FROM _lastseen_migrations WHERE version = {version}) THEN
                     RETURN;
                 END IF;
                 {sql}
                 INSERT INTO _lastseen_migrations (version) VALUES ({version});
             END $migration$;\n"
        );
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_in_the_migrations_folder_is_applied() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations");
        let mut versions: Vec<i64> = std::fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .map(|name| name.split('_').next().unwrap().parse().unwrap())
            .collect();
        versions.sort_unstable();
        assert_eq!(MIGRATIONS.map(|(version, _)| version).as_slice(), versions);
    }
}
