//! Tests of the crate `groups` through its public interface.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod announcer;
mod binary;
mod definition;
mod large;
mod oracle;
mod property;
mod queries;

use groups::{Tree, Weights};

fn parse(json: &str) -> Tree {
    groups::parse([("groups.json", json.as_bytes())], Weights::default()).unwrap()
}

/// The error of an invalid definition.
fn error(json: &str) -> String {
    groups::parse([("groups.json", json.as_bytes())], Weights::default()).unwrap_err().to_string()
}

/// The example of the README.
const SHOP: &str = r#"{"name": "shop", "up": "80%", "children": [
    {"name": "berlin", "objects": ["100-199", 42], "up": "all"},
    {"name": "spare", "objects": [7, 8], "up": "any", "for": "30s"}
]}"#;
