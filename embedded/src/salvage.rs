//! Carrying over what can be read of a damaged file.
//!
//! Decision: docs/decisions/0060-how-is-a-damaged-file-handled.md

use std::path::{Path, PathBuf};

use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params_from_iter};

use crate::open::{self, Format, Table};

/// Rows that one step carries over: some milliseconds, in which callers wait.
const STEP_ROWS: usize = 500;
/// Failed reads after which the rest of a table stays where it is: some seconds, and more than the rows that
/// one page of references leads to.
const FAILURES_MAX: u64 = 100_000;

/// A damaged file that is being read, by ranges of row ids. A range that cannot be read is halved, down to
/// single rows, so that damage to some pages costs the rows on these pages only.
pub(crate) struct Salvage {
    source: Connection,
    aside: PathBuf,
    /// What is still to be read; the next table is the last.
    tables: Vec<Table>,
    /// Ranges of the table that is being read. The next range is the last, and has the highest row ids:
    /// below the lowest row there is no end to the ranges that lead to its page.
    ranges: Vec<Range>,
    /// Reads of this table that have failed.
    failures_in_table: u64,
    result: Salvaged,
}

/// Row ids, both ends included.
#[derive(Clone, Copy)]
struct Range {
    first: i64,
    last: i64,
}

/// What was read of a range, in ascending order.
struct Found {
    rows: Vec<Vec<Value>>,
    /// The highest row id of them.
    upto: Option<i64>,
    ended: Ended,
}

/// Where a read ended.
#[derive(PartialEq, Eq)]
enum Ended {
    Complete,
    Limit,
    Damage,
}

/// What came of a salvage.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Salvaged {
    /// Rows that were carried over.
    pub(crate) rows: u64,
    /// Reads that failed; 0 if everything could be read.
    pub(crate) failures: u64,
}

impl Salvage {
    pub(crate) fn open(aside: &Path, format: Format) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let source = Connection::open_with_flags(aside, flags)?;
        open::keep_temporary_data_in_memory(&source)?;
        open::keep_log_on_close(&source)?;
        // Nothing else can be read without the list of tables.
        source.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(Self {
            source,
            aside: aside.to_owned(),
            tables: format.tables.iter().rev().copied().collect(),
            ranges: vec![Range { first: i64::MIN, last: i64::MAX }],
            failures_in_table: 0,
            result: Salvaged::default(),
        })
    }

    pub(crate) fn aside(&self) -> &Path {
        &self.aside
    }

    /// Carries over the next rows in a transaction of `into`. Returns what came of it all once it is at its
    /// end. After an error the same rows come next.
    pub(crate) fn step(&mut self, into: &mut Connection) -> rusqlite::Result<Option<Salvaged>> {
        let Some(&table) = self.tables.last() else { return Ok(Some(self.result)) };
        let next = self.ranges.last().filter(|_| self.failures_in_table < FAILURES_MAX);
        let Some(&range) = next else {
            self.tables.pop();
            self.ranges = vec![Range { first: i64::MIN, last: i64::MAX }];
            self.failures_in_table = 0;
            return Ok(None);
        };
        let found = self.read(table, range);
        let inserted = insert(into, table, &found.rows)?;
        let failed = found.rows.len() as u64 - inserted + u64::from(found.ended == Ended::Damage);
        self.result.rows += inserted;
        self.result.failures += failed;
        self.failures_in_table += failed;
        self.ranges.pop();
        self.ranges.extend(remaining(range, &found));
        Ok(None)
    }

    fn read(&self, table: Table, Range { first, last }: Range) -> Found {
        let mut found = Found { rows: Vec::new(), upto: None, ended: Ended::Damage };
        let mut read = || -> rusqlite::Result<Ended> {
            let Table { from, columns, .. } = table;
            let mut select = self.source.prepare_cached(&format!(
                "SELECT rowid, {columns} FROM {from} WHERE rowid BETWEEN ?1 AND ?2
                 ORDER BY rowid LIMIT {STEP_ROWS}"
            ))?;
            let mut rows = select.query((first, last))?;
            while let Some(row) = rows.next()? {
                let number: i64 = row.get(0)?;
                // Out of order, as only damage can bring about.
                if number < found.upto.map_or(first, |upto| upto.saturating_add(1)) || number > last
                {
                    return Ok(Ended::Damage);
                }
                found.rows.push(values(row)?);
                found.upto = Some(number);
            }
            Ok(if found.rows.len() < STEP_ROWS { Ended::Complete } else { Ended::Limit })
        };
        if let Ok(ended) = read() {
            found.ended = ended;
        }
        found
    }
}

/// Inserts the rows, and returns how many the table has taken.
fn insert(into: &mut Connection, table: Table, rows: &[Vec<Value>]) -> rusqlite::Result<u64> {
    if rows.is_empty() {
        return Ok(0);
    }
    let Table { into: name, columns, .. } = table;
    let values = vec!["?"; columns.split(',').count()].join(", ");
    let sql = format!("INSERT OR IGNORE INTO {name} ({columns}) VALUES ({values})");
    let transaction = into.transaction()?;
    let mut inserted = rows.len() as u64;
    {
        let mut insert = transaction.prepare_cached(&sql)?;
        for row in rows {
            match insert.execute(params_from_iter(row)) {
                Ok(_) => {}
                // Damaged in a way that shows in the values only.
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                    inserted -= 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
    transaction.commit()?;
    Ok(inserted)
}

/// What is left to be read of a range: both halves of it, if it begins with damage.
fn remaining(range: Range, found: &Found) -> Vec<Range> {
    let first = match found.upto {
        None => range.first,
        Some(i64::MAX) => return Vec::new(),
        Some(upto) => upto + 1,
    };
    let last = range.last;
    match found.ended {
        Ended::Complete => Vec::new(),
        _ if first > last => Vec::new(),
        Ended::Limit => vec![Range { first, last }],
        // This single row cannot be read.
        Ended::Damage if first == last => Vec::new(),
        Ended::Damage => {
            let middle = i64::midpoint(first, last).min(last - 1);
            vec![Range { first, last: middle }, Range { first: middle + 1, last }]
        }
    }
}

fn values(row: &Row<'_>) -> rusqlite::Result<Vec<Value>> {
    (1..row.as_ref().column_count()).map(|column| row.get(column)).collect()
}
