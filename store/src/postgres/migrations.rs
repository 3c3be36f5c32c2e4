//! The schema, and what of it a database already has.
//!
//! Decision: docs/decisions/0048-which-process-creates-the-table.md

use std::fmt::Write as _;

/// Each with its version, in ascending order. Each must keep what it finds: a table `object` may be the
/// Go services'.
const MIGRATIONS: [(i64, &str); 1] =
    [(20_261_121_000_001, include_str!("../../../migrations/20261121000001_object.sql"))];

/// The advisory lock of those who migrate, a number that nobody else will think of.
const LOCK: i64 = i64::from_be_bytes(*b"lastseen");

/// The statements that bring the schema up to date, for one transaction.
///
/// `_lastseen_migrations` is the record of what was done, and ours alone. An installation from before
/// has it in `_sqlx_migrations`, which other applications use as well: it is left as it is, and what it
/// records is done again, which changes nothing.
pub(super) fn script() -> String {
    let mut script = format!(
        "SELECT pg_advisory_xact_lock({LOCK});
         CREATE TABLE IF NOT EXISTS _lastseen_migrations (
             version bigint PRIMARY KEY,
             applied_at timestamptz NOT NULL DEFAULT now()
         );
         -- A table that was dropped by itself would not come back otherwise.
         DELETE FROM _lastseen_migrations WHERE to_regclass('object') IS NULL;\n"
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
    fn every_file_of_the_folder_is_a_migration() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations");
        let mut versions: Vec<i64> = std::fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .map(|name| name.split('_').next().unwrap().parse().unwrap())
            .collect();
        versions.sort_unstable();
        assert_eq!(MIGRATIONS.map(|(version, _)| version).as_slice(), versions);
    }
}
