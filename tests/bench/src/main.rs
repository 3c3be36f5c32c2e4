//! Measures Lastseen, and in the same run the limit: the result of the plainest program that does
//! the same with the same servers on the same machine. Only the ratios can be compared between
//! machines.

#![expect(clippy::expect_used, reason = "a failed measurement ends the program")]

mod callbacks;
mod curve;
mod limits;
mod parts;
mod peers;
mod servers;
mod status_api;
mod table;
mod usage;

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use clap::{Parser, ValueEnum as _};
use futures_util::FutureExt as _;

use crate::parts::Part;
use crate::servers::Servers;
use crate::table::Row;

/// Measures Lastseen against its limits, one part after the other, and prints one table
#[derive(Debug, Parser)]
struct Arguments {
    /// Parts to measure; all parts by default
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// File to which the rows are also written, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// File to which the part overload draws its curve, as SVG
    #[arg(long)]
    curve: Option<PathBuf>,
    /// JSON file of an earlier run; fails if a ratio is more than a tenth below the one in this
    /// file
    #[arg(long)]
    check: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { parts, json, curve, check } = Arguments::parse();
    let parts = if parts.is_empty() { Part::value_variants().to_vec() } else { parts };
    // The HTTP client needs a cryptography provider, although nothing here is encrypted.
    testkit::install_tls();
    let servers = Servers::start().await;
    let (mut rows, mut failures) = (Vec::<Row>::new(), Vec::new());
    for part in parts {
        eprintln!("measuring: {part}");
        // After a failure or a panic, continue, because the other parts take minutes.
        let measuring = AssertUnwindSafe(part.measure(&servers, curve.as_deref()));
        match measuring.catch_unwind().await {
            Ok(Ok(measured)) => rows.extend(measured),
            Ok(Err(error)) => failures.push(format!("{part}: {error:#}")),
            Err(_) => failures.push(format!("{part}: panicked, see above")),
        }
    }
    println!("{}", table::text(&rows));
    if let Some(path) = json {
        table::write(&path, &rows)?;
    }
    anyhow::ensure!(failures.is_empty(), "failed parts:\n{}", failures.join("\n"));
    if let Some(path) = check {
        let fallen = table::fallen(&path, &rows)?;
        anyhow::ensure!(
            fallen.is_empty(),
            "ratios fell by more than a tenth:\n{}",
            fallen.join("\n")
        );
    }
    Ok(())
}
