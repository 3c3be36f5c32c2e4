//! The producer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(producer::DESCRIPTION, producer::run)
}
