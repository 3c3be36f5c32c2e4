//! The SQL statements for Postgres.
//!
//! Each statement is sent with the settings that it needs as one simple query, which is one
//! transaction. It uses no prepared statement and no state of the session, so it works the same on
//! a direct connection and behind a pooler, which may use another session for each transaction. The
//! text contains only numbers and the name of a checked [`TimeZone`].
//!
//! The columns may be `bigint, timestamptz`, or `integer, timestamp` as in the Go services' table.
//! Values are cast in SQL, and times are sent as microseconds since 1970.
//!
//! Decision: docs/decisions/0045-why-is-each-statement-one-simple-query.md

use std::fmt::Write as _;
use std::time::Duration;

use crate::{Moment, TimeZone};

/// The number of statements in [`Settings`].
pub(super) const SETTINGS: usize = 4;

/// The maximum age; higher ones count as this one. It reaches back before 1970, and does not
/// overflow in the database.
const AGE_MAX: Duration = Duration::from_hours(24 * 365 * 1_000);

// Decision: docs/decisions/0046-how-is-the-table-of-the-go-services-used.md
/// An SQL expression for the moment in the column `last_seen` of the row `$row`.
///
/// A `timestamp` without time zone is local time, which is ambiguous in the hour in which daylight
/// saving time ends. Postgres chooses the later of both moments. Before the clocks change, that is
/// in the future, and the earlier moment is the right one. Clocks differ by less than a minute, so
/// a row never counts as older than it is; a row that was not seen for almost an hour may count as
/// an hour younger. Extreme times are replaced first, because a cast fails near the ends of the
/// type's range. The literals get the type of the column.
macro_rules! moment {
    ($row:literal) => {
        concat!(
            "CASE WHEN ",
            $row,
            ".last_seen > '9999-01-01' THEN 'infinity'
                  WHEN ",
            $row,
            ".last_seen < '1970-01-02' THEN 'epoch'
                  WHEN ",
            $row,
            ".last_seen <= now() + interval '1 min' THEN ",
            $row,
            ".last_seen::timestamptz
                  ELSE least(",
            $row,
            ".last_seen::timestamptz,
                             (",
            $row,
            ".last_seen - interval '2 h')::timestamptz + interval '2 h')
             END"
        )
    };
}

/// An SQL expression for microseconds since 1970, which a double holds exactly until the year 2255.
macro_rules! micros {
    ($moment:expr) => {
        concat!("(date_part('epoch', ", $moment, ") * 1e6)::bigint")
    };
}

/// The settings before a statement, which apply only to its transaction.
#[derive(Clone, Debug)]
pub(super) struct Settings(String);

impl Settings {
    pub(super) fn new(statement_timeout: &str, lock_timeout: &str, zone: &TimeZone) -> Self {
        Self(format!(
            "SET LOCAL statement_timeout = '{statement_timeout}';
             SET LOCAL lock_timeout = '{lock_timeout}';
             SET LOCAL client_min_messages = warning;
             SET LOCAL timezone = '{zone}';\n"
        ))
    }

    /// The complete script for `statement`.
    pub(super) fn and(&self, statement: &str) -> String {
        format!("{}{statement}", self.0)
    }
}

/// The age of a sighting in microseconds, for [`record_seen`].
pub(super) fn age_micros(age: Duration) -> i64 {
    i64::try_from(age.min(AGE_MAX).as_micros()).unwrap_or(i64::MAX)
}

// Decision: docs/decisions/0040-how-are-inserts-distinguished-from-updates.md
/// Records the sightings `(id, age in microseconds)`. Returns rows `(id, is_new, now in
/// microseconds)` of the sightings that changed a row. A row that is dated in the future is wrong,
/// so it moves back.
pub(super) fn record_seen(sightings: &[(i64, i64)]) -> String {
    let mut ids = String::with_capacity(sightings.len() * 12);
    let mut ages = String::with_capacity(sightings.len() * 8);
    for (id, age) in sightings {
        // Writing to a string cannot fail.
        _ = write!(ids, "{id},");
        _ = write!(ages, "{age},");
    }
    let (ids, ages) = (ids.trim_end_matches(','), ages.trim_end_matches(','));
    let (seen, new) = (moment!("seen"), moment!("excluded"));
    format!(
        "INSERT INTO object AS seen (id, last_seen)
         SELECT id, greatest(now() - age * interval '1 us', 'epoch')
         FROM unnest('{{{ids}}}'::bigint[], '{{{ages}}}'::bigint[]) WITH ORDINALITY AS new (id, age, place)
         ORDER BY place
         ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
         WHERE seen.last_seen IS NULL OR {seen} < {new} OR {seen} > clock_timestamp()
         -- After an update, xmax is not 0, because the update has locked the old row.
         RETURNING id::bigint, xmax = 0, {now}",
        now = micros!("now()"),
    )
}

/// Returns rows `(id)` of those among `ids` that another transaction has locked. It tries to take
/// the same lock as an update of `last_seen`, and releases its locks at the end of the statement.
pub(super) fn find_locked(ids: &[i64]) -> String {
    let ids = list(ids);
    format!(
        "WITH free AS (
             SELECT id FROM object WHERE id = ANY ({ids}) ORDER BY id
             FOR NO KEY UPDATE SKIP LOCKED)
         SELECT id::bigint FROM object
         WHERE id = ANY ({ids}) AND id NOT IN (SELECT id FROM free)"
    )
}

fn list(ids: &[i64]) -> String {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    format!("'{{{}}}'::bigint[]", ids.join(","))
}

/// An SQL condition: the row was last seen before `oldest`.
fn is_stale(oldest: Moment) -> String {
    let oldest = i64::try_from(oldest.since_1970.as_micros()).unwrap_or(i64::MAX);
    let oldest = format!("timestamptz 'epoch' + {oldest} * interval '1 us'");
    let moment = moment!("object");
    // The second part is for the hour in which daylight saving time ends, in a column without time
    // zone.
    format!(
        "(last_seen < {oldest} OR (last_seen > now() + interval '1 min' AND {moment} < {oldest}))"
    )
}

/// Returns one row `(stale, all)`: the number of rows last seen before `oldest`, and of all rows.
pub(super) fn count_stale(oldest: Moment) -> String {
    let is_stale = is_stale(oldest);
    format!("SELECT count(*) FILTER (WHERE {is_stale}), count(*) FROM object")
}

/// Returns rows `(id)` of up to `limit` rows last seen before `oldest`, except those in `except`.
pub(super) fn list_stale(oldest: Moment, limit: u32, except: &[i64]) -> String {
    let (is_stale, except) = (is_stale(oldest), list(except));
    format!("SELECT id::bigint FROM object WHERE {is_stale} AND id <> ALL ({except}) LIMIT {limit}")
}

/// Deletes rows among `ids` that were last seen before `oldest`. Returns their `(id, last_seen)`.
pub(super) fn delete_stale_among(oldest: Moment, ids: &[i64]) -> String {
    let (is_stale, ids) = (is_stale(oldest), list(ids));
    format!(
        "DELETE FROM object WHERE ctid = ANY (ARRAY(
             SELECT ctid FROM object WHERE {is_stale} AND id = ANY ({ids})
             FOR UPDATE SKIP LOCKED))
         RETURNING id::bigint, {last_seen}",
        last_seen = micros!(moment!("object")),
    )
}

/// Returns one row with the database's clock in microseconds.
pub(super) const NOW: &str = concat!("SELECT ", micros!("now()"));

// Decision: docs/decisions/0042-why-do-deletes-skip-locked-rows.md
/// Deletes up to `limit` rows that were last seen before `oldest`. Returns their `(id, last_seen)`.
pub(super) fn delete_stale(oldest: Moment, limit: u32) -> String {
    let is_stale = is_stale(oldest);
    format!(
        "DELETE FROM object WHERE ctid = ANY (ARRAY(
             SELECT ctid FROM object
             WHERE {is_stale}
             LIMIT {limit} FOR UPDATE SKIP LOCKED))
         RETURNING id::bigint, {last_seen}",
        last_seen = micros!(moment!("object")),
    )
}

/// Sets up to `limit` rows that are dated in the future to the current time. Returns one row
/// `(count)`. Rows up to a second ahead stay, because the clocks of several machines may differ by
/// that.
pub(super) fn correct_future(limit: u32) -> String {
    format!(
        "WITH corrected AS (
             UPDATE object SET last_seen = now() WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM object
                 WHERE last_seen > now() + interval '1 s' AND {moment} > clock_timestamp() + interval '1 s'
                 LIMIT {limit} FOR UPDATE SKIP LOCKED))
             RETURNING 1)
         SELECT count(*) FROM corrected",
        moment = moment!("object"),
    )
}

/// Returns rows `(id, last_seen, now)` with ids from `first` on.
pub(super) fn page(first: i64, limit: u32) -> String {
    format!(
        "SELECT id::bigint, {last_seen}, {now} FROM object
         WHERE id >= '{first}'::bigint AND last_seen IS NOT NULL ORDER BY object.id LIMIT {limit}",
        last_seen = micros!(concat!("least(", moment!("object"), ", now())")),
        now = micros!("now()"),
    )
}

/// Returns one row `(count)`.
pub(super) const COUNT: &str = "SELECT count(*) FROM object WHERE last_seen IS NOT NULL";

/// Returns one row `(may_create)`: whether the role may create tables. If there is no schema, it is
/// true, so that the migration fails and its error is reported.
pub(super) const MAY_MIGRATE: &str =
    "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), true)";

/// Returns one row `(is_read_only)`: whether the server rejects writes. On a standby, every
/// transaction is read-only.
pub(super) const IS_READ_ONLY: &str = "SELECT current_setting('transaction_read_only')::bool";

/// Returns one row `(problems)`, which is NULL if the table can be used. It fails if the table is
/// missing or the role may not read it.
pub(super) const CHECK_TABLE: &str = "
    SELECT NULL::text FROM object WHERE false;
    WITH object AS (SELECT * FROM pg_class WHERE oid = to_regclass('object')),
    columns AS (
        SELECT attribute.*, coalesce(nullif(typbasetype, 0), atttypid)::regtype AS type
        FROM pg_attribute AS attribute JOIN pg_type ON pg_type.oid = atttypid
        WHERE attrelid = to_regclass('object') AND attnum > 0 AND NOT attisdropped),
    problems AS (
        SELECT 'it is not an ordinary table' AS problem FROM object WHERE relkind <> 'r'
        UNION ALL
        SELECT 'other tables inherit from it'
        WHERE EXISTS (SELECT FROM pg_inherits WHERE inhparent = to_regclass('object'))
        UNION ALL
        SELECT CASE WHEN attname IS NULL THEN format('it has no column %s', name)
                    ELSE format('its column %s has the type %s; it must have %s',
                                name, format_type(atttypid, atttypmod), allowed) END
        FROM (VALUES
            ('id', '{bigint,integer,smallint}'::regtype[], 'bigint or integer'),
            ('last_seen', '{timestamptz,timestamp}', 'timestamp, with or without time zone')
        ) AS wanted (name, types, allowed)
        LEFT JOIN columns ON attname = name
        WHERE attname IS NULL OR type <> ALL (types)
        UNION ALL
        SELECT format('its column %s is generated', attname) FROM columns
        WHERE attname IN ('id', 'last_seen') AND (attidentity = 'a' OR attgenerated <> '')
        UNION ALL
        SELECT format('its column %s must have a default or allow NULL', attname) FROM columns
        WHERE attname NOT IN ('id', 'last_seen')
          AND attnotnull AND NOT atthasdef AND attidentity = ''
        UNION ALL
        SELECT 'its column id must be the primary key'
        WHERE NOT EXISTS (
            SELECT FROM pg_index JOIN columns ON attname = 'id' AND attnum = indkey[0]
            WHERE indrelid = to_regclass('object') AND indnkeyatts = 1 AND indpred IS NULL
              AND indisunique AND indisvalid AND indimmediate))
    SELECT string_agg(problem, '; ') FROM problems";
