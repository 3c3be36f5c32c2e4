//! `lastseen`: all roles in one process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main_with_commands(standalone::DESCRIPTION, |config, health, shutdown| {
        standalone::plan(&config, health, shutdown)
    })
}
