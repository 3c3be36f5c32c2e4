//! The producer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(producer::DESCRIPTION, |config, health, shutdown| {
        producer::run(config.current(), health, shutdown)
    })
}
