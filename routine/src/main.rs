//! The routine as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    routine::main()
}
