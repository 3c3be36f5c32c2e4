//! The viewer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    viewer::main()
}
