//! Finds and runs the programs of servers, and prints the last lines of their logs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{postgres_cluster, rabbit_node};

/// The root of the servers' installation: `TEST_SERVERS_ROOT`, which `scripts/with-servers
/// --newest` sets, or `/`.
pub(crate) fn servers_root() -> PathBuf {
    std::env::var_os("TEST_SERVERS_ROOT").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// Finds a program in one of `folders`, otherwise on `PATH`.
///
/// # Panics
/// When it is in none of them.
pub(crate) fn find(program: &str, folders: &[PathBuf]) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders
        .iter()
        .cloned()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| panic!("{program} is neither in {folders:?} nor on PATH: install it"))
}

/// Runs a command and returns its output.
///
/// # Panics
/// When it fails.
pub(crate) async fn run(mut command: Command) -> String {
    // Not the whole command: its environment may contain passwords.
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("running a command should not panic")
        .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed: {printed}{errors}");
    printed
}

/// Prints the end of a server's log if the test panics.
pub(crate) fn print_tail_if_panicking(log: &Path) {
    if !std::thread::panicking() {
        return;
    }
    let content = std::fs::read(log).unwrap_or_default();
    let lines: Vec<_> = String::from_utf8_lossy(&content).lines().map(str::to_owned).collect();
    print_tail(&log.display().to_string(), &lines);
}

/// Prints the last lines of `log`.
pub(crate) fn print_tail(name: &str, log: &[String]) {
    let tail = &log[log.len().saturating_sub(40)..];
    eprintln!("---- the end of {name} ----\n{}\n----", tail.join("\n"));
}

/// The versions of RabbitMQ and Postgres that [`crate::RabbitNode`] and [`crate::PostgresCluster`]
/// start.
///
/// # Panics
/// When one of them is not installed.
#[must_use]
pub fn server_versions() -> [String; 2] {
    [rabbit_node::version(), postgres_cluster::version()]
}

/// The standard output of a program without surrounding white space.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
