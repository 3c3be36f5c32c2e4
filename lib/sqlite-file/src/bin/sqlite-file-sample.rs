//! A minimal owner of a file, for the tests of `sqlite_file`. Until it is killed, it writes
//! consecutive numbers and prints each number once it is on disk.

use std::path::Path;

use runtime::Supervisor;
use sqlite_file::{File, Format, Table};

const FORMAT: Format = Format {
    name: "sample",
    application_id: u32::from_be_bytes(*b"LSte"),
    version: 1,
    schema: "CREATE TABLE number (n INTEGER PRIMARY KEY, filler TEXT) STRICT;",
    additions: "",
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    tables: &[Table { from: "number", into: "number", columns: "n, filler" }],
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("expected a path")?;
    let file = File::open(Path::new(&path), FORMAT, &Supervisor::default())?;
    for n in 1_i64.. {
        let insert = "INSERT INTO number (n) VALUES (?1)";
        file.transact(move |connection| connection.execute(insert, [n])).await?;
        println!("number={n}");
    }
    Ok(())
}
