//! Tests that one program runs each role.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use testkit::Scratch;

fn version(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).arg("--version").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn first_argument_or_name_of_a_link_selects_the_role() {
    let lastseen = Path::new(env!("CARGO_BIN_EXE_lastseen"));
    let folder = Scratch::new("links");
    for role in ["producer", "consumer", "routine", "viewer", "tester"] {
        let link = folder.path().join(role);
        symlink(lastseen, &link).unwrap();
        for text in [version(lastseen, &[role]), version(&link, &[])] {
            assert!(text.starts_with(&format!("{role} ")), "{text}");
        }
    }
    assert!(version(lastseen, &[]).starts_with("lastseen "));
}
