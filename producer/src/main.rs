//! The producer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    producer::main()
}
