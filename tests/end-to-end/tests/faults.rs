//! Runs the fault suite with its own test harness; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    end_to_end::run()
}
