//! Runs the viewer as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    service::main(viewer::DESCRIPTION, |config, health, shutdown| {
        viewer::run(config.current(), health, shutdown)
    })
}
