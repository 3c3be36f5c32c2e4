//! The fault suite as a test of its own harness; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    faults::run()
}
