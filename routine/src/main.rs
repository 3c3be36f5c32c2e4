//! The routine as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(routine::DESCRIPTION, routine::run)
}
