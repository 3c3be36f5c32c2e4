//! Checks by Prometheus's promtool.

use std::io::Write as _;
use std::process::{Command, Stdio};

/// Runs promtool in the root of the repository. Panics if promtool finds a problem.
#[track_caller]
pub(crate) fn promtool(arguments: &[&str], input: &str) {
    let child = Command::new("promtool")
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.expect("promtool is missing: `make test` fetches it on Debian");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    assert!(output.status.success(), "promtool {arguments:?}: {printed}\n{input}");
}
