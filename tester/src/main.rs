//! The tester as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    tester::main()
}
