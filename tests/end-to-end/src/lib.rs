//! The fault suite, which measures the losses and the recovery time of the whole system under
//! faults.
//!
//! A case starts its own `World` and a load, causes a fault, and waits until the system has
//! recovered. The audit then compares the responses to callbacks with the lookups of the status API
//! and the rows of the table. Each case gives one row of `FAULTS.md`.
//!
//! `make faults` runs all cases, and `make test` those that are marked for it.

#![expect(clippy::expect_used, reason = "it is a test, which fails by panicking")]

mod audit;
mod case;
mod cases;
mod figures;
mod load;
mod probe;
mod rows;
mod setup;
mod table;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use parking_lot::Mutex;

use crate::case::Case;
use crate::table::Row;

/// The variable that selects the cases: with the value `all`, all of them; otherwise, those of
/// `make test`.
const SELECTION: &str = "FAULTS";
/// The variable that names the file into which the rows of this run are written.
const TABLE_FILE: &str = "FAULTS_FILE";

/// Runs the cases that the command line and the environment select, one after the other, and prints
/// their table.
#[must_use]
pub fn run() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The load of one case needs the whole machine.
    arguments.test_threads = Some(1);
    let all = std::env::var(SELECTION).is_ok_and(|selection| selection == "all");
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
                let result = match row.breaches.as_slice() {
                    [] => Ok(()),
                    breaches => Err(Failed::from(breaches.join("\n"))),
                };
                rows.lock().push(row);
                result
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let rows = rows.lock();
    if !rows.is_empty() {
        println!("{}", table::text(&rows));
        if let Ok(path) = std::env::var(TABLE_FILE) {
            table::write(path.as_ref(), &names, &rows);
        }
    }
    conclusion.exit_code()
}

/// Runs one case and returns its row. A panic is a breach.
fn run_case(case: &Case) -> Row {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime should start");
    let outcome = catch_unwind(AssertUnwindSafe(|| runtime.block_on((case.run)())));
    // A library's thread that still waits for a dead server must not block the suite.
    runtime.shutdown_background();
    match outcome {
        Ok(verdict) => Row::new(case, Some(verdict.figures), verdict.breaches),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().map(String::as_str);
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().copied());
            Row::new(
                case,
                None,
                vec![format!("the case panicked: {}", reason.unwrap_or("no message"))],
            )
        }
    }
}
