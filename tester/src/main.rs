//! The tester as a process of its own.

fn main() -> std::process::ExitCode {
    let description = service::Description {
        name: "tester",
        about: "Plays the partner and the status API of Lastseen, and loads its callback endpoint",
        admin_address: ":9094",
    };
    service::main(description, tester::run)
}
