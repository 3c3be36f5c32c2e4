//! Finds and runs the programs of servers, and prints the last lines of their logs.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{postgres_cluster, rabbit_node};

/// The root of the servers' installation: `TEST_SERVERS_ROOT`, which `scripts/with-servers
/// --newest` sets, or `/`.
pub(crate) fn servers_root() -> PathBuf {
    std::env::var_os("TEST_SERVERS_ROOT").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// Finds a program in one of `folders`, otherwise on `PATH`.
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

/// Runs a command and returns its output. Kills the command if the future is dropped.
pub(crate) async fn run(command: Command) -> String {
    // The messages contain only the name, because the command's environment may contain passwords.
    let name = command.get_program().display().to_string();
    let output = tokio::process::Command::from(command)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed: {printed}{errors}");
    printed
}

pub(crate) fn print_tail(name: &str, log: &[String]) {
    let tail = &log[log.len().saturating_sub(40)..];
    eprintln!("---- the end of {name} ----\n{}\n----", tail.join("\n"));
}

/// The versions of RabbitMQ and Postgres that [`crate::RabbitNode`] and [`crate::PostgresCluster`]
/// start.
pub fn server_versions() -> [String; 2] {
    [rabbit_node::version(), postgres_cluster::version()]
}

/// The standard output of a program without surrounding white space.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
