use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use testkit::{Scratch, wait_for, wait_until};

use crate::HOUR;
use crate::fixture::{Fixture, RunningViewer};

/// Weights: berlin 4, spare 2, shop 6.
const SHOP: &str = r#"{"name": "shop", "up": "80%", "children": [
    {"name": "berlin", "objects": ["1-4"]},
    {"name": "spare", "objects": [7, 8], "up": "any"}
]}"#;
/// An object that was seen two hours ago is online, and the cleanup of the fixture deletes it.
const TTL: &str = "--object-ttl=4h";

/// A definition in a directory of its own.
struct Definition {
    directory: Scratch,
    file: PathBuf,
}

impl Definition {
    fn new(text: &str) -> Self {
        let directory = Scratch::new("groups");
        let file = directory.path().join("groups.json");
        let definition = Self { directory, file };
        definition.replace(text);
        definition
    }

    fn replace(&self, text: &str) {
        fs::write(&self.file, text).unwrap();
    }

    /// Starts a viewer, and waits until the groups are in effect and events arrive.
    async fn start(&self, fixture: &Fixture, settings: &[&str]) -> RunningViewer {
        let file = format!("--groups-file={}", self.file.display());
        let settings = [&[file.as_str(), TTL], settings].concat();
        let exchange = fixture.exchange.clone();
        let viewer = fixture.start_viewer_with_settings(exchange, &settings).await;
        wait_until("the groups are in effect", async || viewer.get("/groups").await.0 == 200).await;
        let receives_events = async || viewer.health.missing_optional().is_empty();
        wait_until("the viewer receives events", receives_events).await;
        viewer
    }
}

/// The group with this path.
async fn group(viewer: &RunningViewer, path: &str) -> Value {
    let (status, page) = viewer.get(&format!("/groups/{path}?depth=0")).await;
    assert_eq!(status, 200, "{page}");
    page["groups"][0].clone()
}

/// Waits until the group has these numbers of objects by kind.
async fn expect_counts(viewer: &RunningViewer, path: &str, counts: Value) -> Value {
    let mut expected = json!({
        "online": 0, "late": 0, "maintenance": 0, "never_seen": 0, "given_up": 0, "gone": 0,
    });
    let counts = counts.as_object().unwrap().clone();
    expected.as_object_mut().unwrap().extend(counts);
    wait_for(&format!("{path} has {expected}"), async || {
        let group = group(viewer, path).await;
        (group["counts"] == expected).then_some(group)
    })
    .await
}

#[tokio::test]
async fn statuses_follow_the_changes_of_objects() {
    let fixture = Fixture::new().await;
    fixture.record([1, 2, 3, 7, 9]).await;
    fixture.record_aged([4], 2 * HOUR).await;
    let definition = Definition::new(SHOP);
    let viewer = definition.start(&fixture, &[]).await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.expect_event("snapshot", [1, 2, 3, 4, 7, 9]).await;

    let shop = expect_counts(&viewer, "shop", json!({"online": 5, "never_seen": 1})).await;
    let since = &shop["since"];
    assert!(since.as_str().unwrap().ends_with('Z'), "{shop}");
    assert_eq!(
        shop,
        json!({
            "path": "shop", "name": "shop", "depth": 0, "status": "up", "since": since,
            "pending": null, "online": 5, "up": 5, "total": 6, "counts": shop["counts"],
            "because": null, "groups": 2, "up_rule": "80%", "degraded_rule": "any",
        })
    );
    fixture.clean_up().await;
    subscriber.expect_event("gone", [4]).await;
    let (change, berlin) = subscriber.next_group().await;
    let because = json!({"path": "shop/berlin", "object": "4", "kind": "gone"});
    assert_eq!(change, "shop/berlin up degraded");
    assert_eq!(
        (&berlin["online"], &berlin["total"], &berlin["because"]),
        (&json!(3), &json!(4), &because)
    );
    let berlin = group(&viewer, "shop/berlin").await;
    assert_eq!((&berlin["status"], &berlin["because"]), (&json!("degraded"), &because));
    assert_eq!(group(&viewer, "shop").await["status"], "up");
    fixture.record([4]).await;
    assert_eq!(subscriber.next_group().await.0, "shop/berlin degraded up");
    assert!(definition.directory.path().exists());
}
