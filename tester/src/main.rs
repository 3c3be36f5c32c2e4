//! The tester as a process of its own.

use std::process::ExitCode;

use service::Description;

fn main() -> ExitCode {
    // A load run is short and often beside a tester that serves: it takes any admin port.
    let loads = std::env::args().any(|argument| argument == "load");
    let description = Description {
        name: "tester",
        about: "Plays the partner and the status API of Lastseen, and loads its callback endpoint",
        admin_address: if loads { "127.0.0.1:0" } else { ":9094" },
    };
    service::main(description, tester::run)
}
