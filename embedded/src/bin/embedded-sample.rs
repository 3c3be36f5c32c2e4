//! A minimal owner of a file, for the tests of `embedded`. It writes consecutive numbers and prints
//! each one when it is on disk, until it is killed.

use std::path::Path;

use embedded::{File, Format, Table};

const FORMAT: Format = Format {
    name: "sample",
    application_id: u32::from_be_bytes(*b"LSte"),
    version: 1,
    schema: "CREATE TABLE number (n INTEGER PRIMARY KEY, filler TEXT) STRICT;",
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    tables: &[Table { from: "number", into: "number", columns: "n, filler" }],
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("expected a path")?;
    let file = File::open(Path::new(&path), FORMAT)?;
    for n in 1_i64.. {
        let insert = "INSERT INTO number (n) VALUES (?1)";
        file.transact(move |connection| connection.execute(insert, [n])).await?;
        println!("number={n}");
    }
    Ok(())
}
