//! The consumer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(consumer::DESCRIPTION, consumer::run)
}
