//! Copies the readable rows of a damaged file to a new one.
//!
//! Decision: docs/decisions/0060-how-is-a-damaged-file-handled.md

use std::path::{Path, PathBuf};

use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params_from_iter};

use crate::open::{self, Format, Table};

/// Number of rows that one step copies. A step takes a few milliseconds, for which callers wait.
const STEP_ROWS: usize = 500;
/// Number of failed reads in a table after which the rest of the table is skipped. Reaching this
/// limit takes a few seconds; a single damaged interior page causes fewer failures.
const FAILURES_MAX: u64 = 100_000;

/// Reads a damaged file by ranges of row ids. An unreadable range is halved, down to single rows,
/// so that a damaged page costs only the rows on that page.
pub(crate) struct Salvage {
    source: Connection,
    damaged_file: PathBuf,
    /// The tables to read, in reverse order: the current table is the last element.
    tables: Vec<Table>,
    /// The ranges of the current table that are left to read; the next range is the last element.
    /// High row ids are read first: if the page of the lowest row is damaged, every read of an
    /// empty range below that row fails as well, and these failures must not reach [`FAILURES_MAX`]
    /// before the other rows are read.
    ranges: Vec<Range>,
    failures_in_table: u64,
    result: Salvaged,
}

/// An inclusive range of row ids.
#[derive(Clone, Copy)]
struct Range {
    first: i64,
    last: i64,
}

/// The rows that were read from a range, in ascending order.
struct ReadRows {
    rows: Vec<Vec<Value>>,
    /// The highest row id of `rows`.
    last_id: Option<i64>,
    end: ReadEnd,
}

#[derive(PartialEq, Eq)]
enum ReadEnd {
    Complete,
    Limit,
    Damage,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Salvaged {
    pub(crate) rows: u64,
    /// Reads that failed; 0 if everything could be read.
    pub(crate) failures: u64,
}

impl Salvage {
    pub(crate) fn open(damaged_file: &Path, format: Format) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let source = Connection::open_with_flags(damaged_file, flags)?;
        open::keep_temporary_data_in_memory(&source)?;
        open::keep_log_on_close(&source)?;
        // Without the list of tables, nothing else can be read.
        source.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(Self {
            source,
            damaged_file: damaged_file.to_owned(),
            tables: format.tables.iter().rev().copied().collect(),
            ranges: vec![Range { first: i64::MIN, last: i64::MAX }],
            failures_in_table: 0,
            result: Salvaged::default(),
        })
    }

    pub(crate) fn damaged_file(&self) -> &Path {
        &self.damaged_file
    }

    /// Copies the next rows in one transaction of `into`. Returns the result when all tables are
    /// done. If a step fails, the next step copies the same rows.
    pub(crate) fn step(&mut self, into: &mut Connection) -> rusqlite::Result<Option<Salvaged>> {
        let Some(&table) = self.tables.last() else { return Ok(Some(self.result)) };
        let next = self.ranges.last().filter(|_| self.failures_in_table < FAILURES_MAX);
        let Some(&range) = next else {
            self.tables.pop();
            self.ranges = vec![Range { first: i64::MIN, last: i64::MAX }];
            self.failures_in_table = 0;
            return Ok(None);
        };
        let read = self.read(table, range);
        let inserted = insert(into, table, &read.rows)?;
        let failed = read.rows.len() as u64 - inserted + u64::from(read.end == ReadEnd::Damage);
        self.result.rows += inserted;
        self.result.failures += failed;
        self.failures_in_table += failed;
        self.ranges.pop();
        self.ranges.extend(remaining(range, &read));
        Ok(None)
    }

    fn read(&self, table: Table, Range { first, last }: Range) -> ReadRows {
        let mut read = ReadRows { rows: Vec::new(), last_id: None, end: ReadEnd::Damage };
        let mut fill = || -> rusqlite::Result<ReadEnd> {
            let Table { from, columns, .. } = table;
            let mut select = self.source.prepare_cached(&format!(
                "SELECT rowid, {columns} FROM {from} WHERE rowid BETWEEN ?1 AND ?2
                 ORDER BY rowid LIMIT {STEP_ROWS}"
            ))?;
            let mut rows = select.query((first, last))?;
            while let Some(row) = rows.next()? {
                let id: i64 = row.get(0)?;
                // Only damage can make row ids appear out of order.
                if id < read.last_id.map_or(first, |last_id| last_id.saturating_add(1)) || id > last
                {
                    return Ok(ReadEnd::Damage);
                }
                read.rows.push(values(row)?);
                read.last_id = Some(id);
            }
            Ok(if read.rows.len() < STEP_ROWS { ReadEnd::Complete } else { ReadEnd::Limit })
        };
        if let Ok(end) = fill() {
            read.end = end;
        }
        read
    }
}

/// Inserts the rows, and returns how many of them the table accepted.
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
                // The values of this row are damaged.
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

/// The parts of `range` that are left to read. If the read ended at damage, the rest is returned as
/// two halves.
fn remaining(range: Range, read: &ReadRows) -> Vec<Range> {
    let first = match read.last_id {
        None => range.first,
        Some(i64::MAX) => return Vec::new(),
        Some(last_id) => last_id + 1,
    };
    let last = range.last;
    match read.end {
        ReadEnd::Complete => Vec::new(),
        _ if first > last => Vec::new(),
        ReadEnd::Limit => vec![Range { first, last }],
        // This single row cannot be read.
        ReadEnd::Damage if first == last => Vec::new(),
        ReadEnd::Damage => {
            let middle = i64::midpoint(first, last).min(last - 1);
            vec![Range { first, last: middle }, Range { first: middle + 1, last }]
        }
    }
}

fn values(row: &Row<'_>) -> rusqlite::Result<Vec<Value>> {
    (1..row.as_ref().column_count()).map(|column| row.get(column)).collect()
}
