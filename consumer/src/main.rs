//! The consumer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    consumer::main()
}
