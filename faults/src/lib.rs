//! What the whole system loses, and for how long it is away, when its parts fail.
//!
//! A case brings up a `World` of its own, puts it under load, does something to it, and
//! lets it settle; the world then holds what the partner was answered against what the status API
//! was asked and what the table holds. Each case gives one row of the table in `FAULTS.md`.
//!
//! `make test` runs those cases that are marked so, `make faults` runs all.

#![expect(clippy::expect_used, reason = "it is a test, where a panic with a reason is how to fail")]

mod audit;
mod case;
mod cases;
mod figures;
mod load;
mod probe;
mod rows;
mod status_api;
mod table;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};

use crate::case::Case;
use crate::table::Row;

/// Set to `all`, it makes a run offer every case, and not only those of `make test`.
const WHICH: &str = "FAULTS";
/// Names the file into which the rows of this run are written.
const TABLE_FILE: &str = "FAULTS_FILE";

/// Runs the cases that the command line and the environment ask for, one after the other, and prints
/// their table.
#[must_use]
pub fn run() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The load of a case needs the machine for itself.
    arguments.test_threads = Some(1);
    let all = std::env::var(WHICH).is_ok_and(|which| which == "all");
    let rows = Arc::new(Mutex::new(Vec::new()));
    let cases = cases::all();
    let names: Vec<&'static str> = cases.iter().map(|case| case.name).collect();
    let trials = cases
        .into_iter()
        .filter(|case| all || case.runs_in_make_test)
        .map(|case| {
            let rows = Arc::clone(&rows);
            Trial::test(case.name, move || {
                let row = run_case(&case);
                let verdict = match row.breaches.as_slice() {
                    [] => Ok(()),
                    breaches => Err(Failed::from(breaches.join("\n"))),
                };
                rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
                verdict
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
    if !rows.is_empty() {
        println!("{}", table::text(&rows));
        if let Ok(path) = std::env::var(TABLE_FILE) {
            table::write(path.as_ref(), &names, &rows);
        }
    }
    conclusion.exit_code()
}

/// Runs one case to its row; a panic on the way is a breach.
fn run_case(case: &Case) -> Row {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime should start");
    let outcome = catch_unwind(AssertUnwindSafe(|| runtime.block_on((case.run)())));
    // A library's thread that still waits for a dead server must not keep the suite waiting.
    runtime.shutdown_background();
    match outcome {
        Ok(verdict) => Row::new(case, Some(verdict.figures), verdict.breaches),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied());
            Row::new(case, None, vec![format!("it broke off: {}", reason.unwrap_or("a panic"))])
        }
    }
}
