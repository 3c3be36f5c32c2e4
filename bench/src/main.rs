//! Measures Lastseen, and in the same run the limit: what the plainest program that does the same
//! gets from the same servers on the same machine. The ratio is what can be compared between machines.

#![expect(
    clippy::expect_used,
    reason = "a measurement that breaks off has nobody to hand an error to"
)]

mod callbacks;
mod curve;
mod limits;
mod parts;
mod servers;
mod status_api;
mod table;
mod usage;

use std::path::PathBuf;

use clap::Parser;

use crate::parts::Part;
use crate::servers::World;
use crate::table::Row;

/// Measures Lastseen against its limits, each part by itself, and prints one table.
#[derive(Debug, Parser)]
struct Arguments {
    /// The parts to measure; all of them if none is named
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Writes the rows there as well, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws there, as SVG, what became of more and more load (part overload)
    #[arg(long)]
    curve: Option<PathBuf>,
    /// Fails if a ratio is more than a tenth below that of an earlier run's JSON
    #[arg(long)]
    check: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { parts, json, curve, check } = Arguments::parse();
    let parts = if parts.is_empty() { Part::all() } else { parts };
    // The HTTP client wants to know which cryptography to use, though nothing here is encrypted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let world = World::start().await;
    let (mut rows, mut broken_off) = (Vec::<Row>::new(), Vec::new());
    for part in parts {
        eprintln!("measuring: {part}");
        match part.measure(&world, curve.as_deref()).await {
            Ok(measured) => rows.extend(measured),
            // The others have taken minutes.
            Err(error) => broken_off.push(format!("{part}: {error:#}")),
        }
    }
    println!("{}", table::text(&rows));
    if let Some(path) = json {
        table::write(&path, &rows)?;
    }
    anyhow::ensure!(broken_off.is_empty(), "broken off:\n{}", broken_off.join("\n"));
    if let Some(path) = check {
        let fallen = table::fallen(&path, &rows)?;
        anyhow::ensure!(fallen.is_empty(), "fallen by more than a tenth:\n{}", fallen.join("\n"));
    }
    Ok(())
}
