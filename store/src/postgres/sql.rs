//! The statements, as text.
//!
//! Each is sent as one simple query together with the settings that it needs, which makes it one
//! transaction. So it works the same on a direct connection and behind a pooler, which may give each
//! transaction another session: no state of a session is relied on, and no prepared statement.
//! Only numbers and the name of a checked [`TimeZone`] become part of the text.
//!
//! The columns may be `bigint, timestamptz`, or `integer, timestamp` as in the Go services' table.
//! Values are cast in SQL, and times cross the wire as microseconds since 1970.
//!
//! Decision: docs/decisions/0045-why-is-each-statement-one-simple-query.md

use std::fmt::Write as _;
use std::time::Duration;

use crate::{Moment, TimeZone};

/// How many statements [`Settings`] is.
pub(super) const SETTINGS: usize = 4;

/// Ages beyond this one count as this one. It reaches back before 1970, and a database can calculate with it.
const AGE_MAX: Duration = Duration::from_hours(24 * 365 * 1_000);

// Decision: docs/decisions/0046-how-is-the-table-of-the-go-services-used.md
/// The moment that the column `last_seen` of the row `$row` means, as an SQL expression.
///
/// A `timestamp` without time zone is local time, which is ambiguous in the hour in which daylight
/// saving time ends. Postgres takes the later of both moments. That would be an hour ahead before the
/// clocks change: then the earlier one is meant. Nobody's clock is a minute ahead, so that a row is
/// never taken for older than it is; one that was not seen for almost an hour may be taken for an
/// hour younger. Times that no clock shows are cut first, because a cast fails near the ends of the
/// type's range. The literals get the column's own type.
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

/// Microseconds since 1970. A double holds them exactly until the year 2255.
macro_rules! micros {
    ($moment:expr) => {
        concat!("(date_part('epoch', ", $moment, ") * 1e6)::bigint")
    };
}

/// What a statement is preceded by, for its transaction only.
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

    /// The whole text for `statement`.
    pub(super) fn and(&self, statement: &str) -> String {
        format!("{}{statement}", self.0)
    }
}

/// The age of a sighting in microseconds, as [`record_seen`] takes it.
pub(super) fn age_micros(age: Duration) -> i64 {
    i64::try_from(age.min(AGE_MAX).as_micros()).unwrap_or(i64::MAX)
}

// Decision: docs/decisions/0040-how-are-inserts-distinguished-from-updates.md
/// Rows `(id, is_new, now)`, in microseconds, of the sightings `(id, age in microseconds)` that
/// changed something. A row that is dated in the future is moved back: it was never true.
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
         -- An update has locked the row that was there, of which the new one keeps the trace.
         RETURNING id::bigint, xmax = 0, {now}",
        now = micros!("now()"),
    )
}

/// Rows `(id)` of those among `ids` that another transaction has locked. An update of `last_seen`
/// takes the same lock; it is released at the end of the statement.
pub(super) fn locked(ids: &[i64]) -> String {
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

/// The condition that a row was last seen before `oldest`.
fn is_stale(oldest: Moment) -> String {
    let oldest = i64::try_from(oldest.since_1970.as_micros()).unwrap_or(i64::MAX);
    let oldest = format!("timestamptz 'epoch' + {oldest} * interval '1 us'");
    let moment = moment!("object");
    // The second part is the hour in which daylight saving time ends, of a column without time zone.
    format!(
        "(last_seen < {oldest} OR (last_seen > now() + interval '1 min' AND {moment} < {oldest}))"
    )
}

/// One row `(stale, all)`: how many rows were last seen before `oldest`, and how many there are.
pub(super) fn count_stale(oldest: Moment) -> String {
    let is_stale = is_stale(oldest);
    format!("SELECT count(*) FILTER (WHERE {is_stale}), count(*) FROM object")
}

/// Rows `(id)` of up to `limit` rows that were last seen before `oldest`, without those in `except`.
pub(super) fn stale(oldest: Moment, limit: u32, except: &[i64]) -> String {
    let (is_stale, except) = (is_stale(oldest), list(except));
    format!("SELECT id::bigint FROM object WHERE {is_stale} AND id <> ALL ({except}) LIMIT {limit}")
}

/// Rows `(id, last_seen)` of the deleted rows among `ids` that were last seen before `oldest`.
pub(super) fn delete_these(oldest: Moment, ids: &[i64]) -> String {
    let (is_stale, ids) = (is_stale(oldest), list(ids));
    format!(
        "DELETE FROM object WHERE ctid = ANY (ARRAY(
             SELECT ctid FROM object WHERE {is_stale} AND id = ANY ({ids})
             FOR UPDATE SKIP LOCKED))
         RETURNING id::bigint, {last_seen}",
        last_seen = micros!(moment!("object")),
    )
}

/// The database's clock.
pub(super) const NOW: &str = concat!("SELECT ", micros!("now()"));

// Decision: docs/decisions/0042-why-do-deletes-skip-locked-rows.md
/// Rows `(id, last_seen)` of up to `limit` deleted rows that were last seen before `oldest`.
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

/// One row `(count)`: how many of up to `limit` rows that are dated in the future are now dated now.
/// A second ahead is no more than the clocks of several machines differ by.
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

/// Rows `(id, last_seen, now)`.
pub(super) fn page(first: i64, limit: u32) -> String {
    format!(
        "SELECT id::bigint, {last_seen}, {now} FROM object
         WHERE id >= '{first}'::bigint AND last_seen IS NOT NULL ORDER BY object.id LIMIT {limit}",
        last_seen = micros!(concat!("least(", moment!("object"), ", now())")),
        now = micros!("now()"),
    )
}

/// One row `(count)`.
pub(super) const COUNT: &str = "SELECT count(*) FROM object WHERE last_seen IS NOT NULL";

/// One row `(may_create)`: whether our role may make tables. Without any schema it may, so that making
/// them fails and the reason is reported.
pub(super) const MAY_MIGRATE: &str =
    "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), true)";

/// One row `(is_read_only)`: whether the server takes no writes. On a standby, every transaction is
/// read-only.
pub(super) const IS_READ_ONLY: &str = "SELECT current_setting('transaction_read_only')::bool";

/// One row `(problems)`, NULL if the table can be used. It fails if the table is missing, or we may
/// not read it.
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
