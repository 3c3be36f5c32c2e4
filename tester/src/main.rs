//! The tester as a process of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main_with_commands(tester::DESCRIPTION, |config, health, shutdown| {
        Ok(tester::plan(config.current(), health, shutdown))
    })
}
