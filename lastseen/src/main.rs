//! `lastseen`: all roles in one process, or one of them.
//!
//! Decision: docs/decisions/0074-how-many-programs-are-there.md

use std::path::Path;
use std::process::ExitCode;

type Main = fn() -> ExitCode;

const ROLES: [(&str, Main); 5] = [
    ("producer", producer::main),
    ("consumer", consumer::main),
    ("routine", routine::main),
    ("viewer", viewer::main),
    ("tester", tester::main),
];

fn main() -> ExitCode {
    selected_role().unwrap_or(lastseen::main)()
}

/// The role that the program's name or its first argument selects. Both a link called `producer`
/// and `lastseen producer` select the producer.
fn selected_role() -> Option<Main> {
    std::env::args_os().take(2).find_map(|argument| {
        let name = Path::new(&argument).file_name()?.to_str()?;
        ROLES.iter().find(|(role, _)| *role == name).map(|(_, main)| *main)
    })
}
