//! Where the servers' programs are, and the last lines of their logs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{postgres_cluster, rabbit_node};

/// The folder below which the servers are installed: `TEST_SERVERS_ROOT`, as `scripts/with-servers --newest` sets it, or `/`.
pub(crate) fn servers_root() -> PathBuf {
    std::env::var_os("TEST_SERVERS_ROOT").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// Finds a program in one of `folders`, else on `PATH`.
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

/// Runs a command to its end, and gives what it printed.
///
/// # Panics
/// When it fails.
pub(crate) async fn run(mut command: Command) -> String {
    // Without its environment, in which there may be passwords.
    let shown = command.get_program().display().to_string();
    command.stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("running a command should not panic")
        .unwrap_or_else(|error| panic!("{shown} does not start: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}: {printed}{errors}");
    printed
}

/// Shows the end of a server's log in the output of a test that fails.
pub(crate) fn print_tail_if_panicking(log: &Path) {
    if !std::thread::panicking() {
        return;
    }
    let content = std::fs::read(log).unwrap_or_default();
    let lines: Vec<_> = String::from_utf8_lossy(&content).lines().map(str::to_owned).collect();
    print_tail(&log.display().to_string(), &lines);
}

/// Shows the last lines of `log`.
pub(crate) fn print_tail(name: &str, log: &[String]) {
    let tail = &log[log.len().saturating_sub(40)..];
    eprintln!("---- the end of {name} ----\n{}\n----", tail.join("\n"));
}

/// Which RabbitMQ and which Postgres [`crate::RabbitNode`] and [`crate::PostgresCluster`] start.
///
/// # Panics
/// When one of them is not installed.
#[must_use]
pub fn server_versions() -> [String; 2] {
    [rabbit_node::version(), postgres_cluster::version()]
}

/// What a program prints on its standard output, without its last line feed.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
