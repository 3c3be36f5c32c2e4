//! The SQL statements for Postgres.
//!
//! Each statement is sent together with its settings as one simple query, which is one transaction.
//! It uses no prepared statement and no session state, so it works the same on a direct connection
//! and behind a pooler, which may use another session for each transaction. The text contains only
//! numbers and the name of a checked [`TimeZone`].
//!
//! The columns may be `bigint, timestamptz`, or `integer, timestamp` as in the Go services' table.
//! Values are cast in SQL, and times are sent as microseconds since 1970.
//!
//! Decision: docs/decisions/0045-why-is-each-statement-one-simple-query.md

use std::fmt::Write as _;
use std::time::Duration;

use crate::rows::RecordHistory;
use crate::{Cutoff, TimeZone};

/// The number of `SET LOCAL` statements in [`Settings`].
pub(super) const SETTINGS: usize = 4;

/// The maximum age; a higher age counts as this one. It reaches back before 1970, and does not
/// overflow in the database.
const AGE_MAX: Duration = Duration::from_hours(24 * 365 * 1_000);

// Decision: docs/decisions/0046-how-is-the-table-of-the-go-services-used.md
/// An SQL expression for the moment in the column `last_seen` of the row `row`.
///
/// A `timestamp` without time zone is local time, which is ambiguous in the hour in which daylight
/// saving time ends. Postgres chooses the later of the two possible moments. If that moment is in
/// the future, the expression uses the earlier moment. Clocks differ by less than a minute, so a
/// row never counts as older than it is, but a row that was not seen for almost an hour may count
/// as an hour younger. Extreme times are replaced first, because a cast fails near the ends of the
/// type's range. The literals have no type, so they take the type of the column.
fn moment(row: &str) -> String {
    format!(
        "CASE WHEN {row}.last_seen > '9999-01-01' THEN 'infinity'
              WHEN {row}.last_seen < '1970-01-02' THEN 'epoch'
              WHEN {row}.last_seen <= now() + interval '1 min' THEN {row}.last_seen::timestamptz
              ELSE least({row}.last_seen::timestamptz,
                         ({row}.last_seen - interval '2 h')::timestamptz + interval '2 h')
         END"
    )
}

/// An SQL expression for microseconds since 1970, which a double holds exactly until the year 2255.
pub(crate) fn micros(moment: &str) -> String {
    format!("(date_part('epoch', {moment}) * 1e6)::bigint")
}

/// The `SET LOCAL` statements before a statement. They apply only to its transaction.
#[derive(Clone, Debug)]
pub(crate) struct Settings(String);

impl Settings {
    pub(crate) fn new(statement_timeout: &str, lock_timeout: &str, zone: &TimeZone) -> Self {
        Self(format!(
            "SET LOCAL statement_timeout = '{statement_timeout}';
             SET LOCAL lock_timeout = '{lock_timeout}';
             SET LOCAL client_min_messages = warning;
             SET LOCAL timezone = '{zone}';\n"
        ))
    }

    /// The complete script for `statement`.
    pub(crate) fn and(&self, statement: &str) -> String {
        format!("{}{statement}", self.0)
    }
}

/// The age of a sighting in microseconds, for [`record_seen`].
pub(super) fn age_micros(age: Duration) -> i64 {
    i64::try_from(age.min(AGE_MAX).as_micros()).unwrap_or(i64::MAX)
}

// Decision: docs/decisions/0040-how-are-inserts-distinguished-from-updates.md
/// Records the sightings `(id, age in microseconds)`. Returns a row `(id, is_new, now in
/// microseconds)` for each sighting that changed the table. A row that is dated in the future is
/// wrong, so an older sighting replaces it.
pub(super) fn record_seen(sightings: &[(i64, i64)], history: RecordHistory) -> String {
    let mut ids = String::with_capacity(sightings.len() * 12);
    let mut ages = String::with_capacity(sightings.len() * 8);
    for (id, age) in sightings {
        // Writing to a string cannot fail.
        _ = write!(ids, "{id},");
        _ = write!(ages, "{age},");
    }
    let (ids, ages) = (ids.trim_end_matches(','), ages.trim_end_matches(','));
    let (seen, new, now) = (moment("seen"), moment("excluded"), micros("now()"));
    let record = format!(
        "INSERT INTO object AS seen (id, last_seen)
         SELECT id, greatest(now() - age * interval '1 us', 'epoch')
         FROM unnest('{{{ids}}}'::bigint[], '{{{ages}}}'::bigint[]) WITH ORDINALITY AS new (id, age, place)
         ORDER BY place
         ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen
         WHERE seen.last_seen IS NULL OR {seen} < {new} OR {seen} > clock_timestamp()
         -- After an update, xmax is not 0, because the update has locked the old row.
         RETURNING id::bigint AS id, xmax = 0 AS is_new, {now} AS now"
    );
    with_history(&record, &seen, history, "true FROM changed WHERE is_new", "id, is_new, now")
}

/// Runs `change`, which returns `columns`, among them `id`. Records in the history what `presence`
/// selects of that, with the moment `last_seen`. Returns `columns`.
///
/// The rows of the history get their positions after `change` has locked all its rows, so that the
/// changes of one object have ascending positions.
fn with_history(
    change: &str,
    last_seen: &str,
    history: RecordHistory,
    presence: &str,
    columns: &str,
) -> String {
    match history {
        RecordHistory::No => change.to_owned(),
        RecordHistory::Yes => format!(
            "WITH changed AS ({change}, {last_seen} AS moment), recorded AS (
                 INSERT INTO presence_change (object_id, last_seen, is_online)
                 SELECT id, moment, {presence})
             SELECT {columns} FROM changed"
        ),
    }
}

/// Returns a row `(id)` for each of the `ids` that another transaction has locked. It tries to take
/// the lock that an update of `last_seen` takes, and releases its locks at the end of the
/// statement.
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

/// An SQL condition: the row is stale.
fn is_stale(Cutoff { oldest, age }: Cutoff) -> String {
    let oldest = i64::try_from(oldest.since_1970.as_micros()).unwrap_or(i64::MAX);
    let age = age_micros(age);
    let oldest = format!(
        "least(timestamptz 'epoch' + {oldest} * interval '1 us', now() - {age} * interval '1 us')"
    );
    let moment = moment("object");
    // The part after OR applies to a column without time zone, in the hour in which daylight saving
    // time ends.
    format!(
        "(last_seen < {oldest} OR (last_seen > now() + interval '1 min' AND {moment} < {oldest}))"
    )
}

/// Returns one row `(stale, all)`: the number of stale rows, and of all rows.
pub(super) fn count_stale(cutoff: Cutoff) -> String {
    let is_stale = is_stale(cutoff);
    format!("SELECT count(*) FILTER (WHERE {is_stale}), count(*) FROM object")
}

/// Returns a row `(id)` for up to `limit` stale rows, except those in `except`.
pub(super) fn list_stale(cutoff: Cutoff, limit: u32, except: &[i64]) -> String {
    let (is_stale, except) = (is_stale(cutoff), list(except));
    format!("SELECT id::bigint FROM object WHERE {is_stale} AND id <> ALL ({except}) LIMIT {limit}")
}

/// Deletes the stale rows among `ids`. Returns their `(id, last_seen)`.
pub(super) fn delete_stale_among(cutoff: Cutoff, ids: &[i64], history: RecordHistory) -> String {
    delete(&format!("{} AND id = ANY ({})", is_stale(cutoff), list(ids)), history)
}

/// Returns one row with the database's clock in microseconds.
pub(crate) fn now() -> String {
    format!("SELECT {}", micros("now()"))
}

// Decision: docs/decisions/0042-why-do-deletes-skip-locked-rows.md
/// Deletes up to `limit` stale rows. Returns their `(id, last_seen)`.
pub(super) fn delete_stale(cutoff: Cutoff, limit: u32, history: RecordHistory) -> String {
    delete(&format!("{} LIMIT {limit}", is_stale(cutoff)), history)
}

fn delete(condition: &str, history: RecordHistory) -> String {
    let moment = moment("object");
    let delete = format!(
        "DELETE FROM object WHERE ctid = ANY (ARRAY(
             SELECT ctid FROM object WHERE {condition} FOR UPDATE SKIP LOCKED))
         RETURNING id::bigint AS id, {last_seen} AS last_seen",
        last_seen = micros(&moment),
    );
    with_history(&delete, &moment, history, "false FROM changed", "id, last_seen")
}

/// Does a part of the maintenance of the history. Returns one row `(has_more)`.
pub(super) fn maintain_history(retention: Duration) -> String {
    let retention = age_micros(retention);
    format!("SELECT presence_change_maintain({retention} * interval '1 us')")
}

/// Returns one row `(problem)`, which is NULL if the role can write the history.
pub(super) const CHECK_HISTORY: &str = "
    SELECT CASE
        WHEN history IS NULL THEN 'the table presence_change is missing; a service or `lastseen \
            migrate` with the right to create tables creates it'
        WHEN NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = history AND partdefid <> 0)
            THEN 'the table presence_change has no default partition'
        WHEN NOT has_table_privilege(history, 'INSERT')
            THEN 'this role may not insert into presence_change; run scripts/postgres-roles.sql'
    END
    FROM to_regclass('presence_change') AS history";

/// Sets up to `limit` rows that are dated in the future to the current time. Returns one row
/// `(count)`. Rows that are up to a second ahead stay unchanged, because the clocks of several
/// machines may differ by a second.
pub(super) fn correct_future(limit: u32) -> String {
    let moment = moment("object");
    format!(
        "WITH corrected AS (
             UPDATE object SET last_seen = now() WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM object
                 WHERE last_seen > now() + interval '1 s' AND {moment} > clock_timestamp() + interval '1 s'
                 LIMIT {limit} FOR UPDATE SKIP LOCKED))
             RETURNING 1)
         SELECT count(*) FROM corrected"
    )
}

/// Returns up to `limit` rows `(id, last_seen, now)` with ids from `first` on.
pub(super) fn page(first: i64, limit: u32) -> String {
    let last_seen = micros(&format!("least({}, now())", moment("object")));
    let now = micros("now()");
    format!(
        "SELECT id::bigint, {last_seen}, {now} FROM object
         WHERE id >= '{first}'::bigint AND last_seen IS NOT NULL ORDER BY object.id LIMIT {limit}"
    )
}

/// Returns one row `(count)`.
pub(super) const COUNT: &str = "SELECT count(*) FROM object WHERE last_seen IS NOT NULL";

/// Returns one row `(may_create)`: whether the database role may create tables. It is true if there
/// is no schema, so that the migration fails and its error is reported.
pub(super) const MAY_MIGRATE: &str =
    "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), true)";

/// Returns one row `(is_standby, is_read_only)`. On a standby, every transaction is read-only.
pub(super) const SERVER_STATE: &str =
    "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool";

/// Returns one row `(problems)`, which is NULL if the table can be used. The statement fails if the
/// table is missing or the database role may not read it.
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
