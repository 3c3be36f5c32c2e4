use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use serde_json::{Value, json};
use testkit::{Queue, Scratch, System, wait_for, wait_until};
use tokio::time::interval;

use crate::HOUR;
use crate::fixture::{Fixture, RunningViewer, client, ids};
use crate::subscriber::Subscriber;

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
}

#[tokio::test]
async fn each_object_is_of_the_kind_that_the_history_and_the_table_show() {
    let fixture = Fixture::new().await;
    fixture.record_aged([5], 2 * HOUR).await;
    fixture.clean_up().await;
    fixture.record([1]).await;
    // Late by a TTL of 4 h.
    fixture.record_aged([2], 3 * HOUR).await;
    let definition = Definition::new(
        r#"{"name": "all", "objects": ["1-6"], "maintenance": [
            {"until": "2999-01-01T00:00:00Z", "objects": [2, 3]}]}"#,
    );
    let viewer = definition.start(&fixture, &[]).await;
    let counts = json!({"online": 1, "late": 1, "maintenance": 1, "never_seen": 2, "gone": 1});
    let all = expect_counts(&viewer, "all", counts).await;
    assert_eq!((&all["online"], &all["up"], &all["total"]), (&json!(2), &json!(3), &json!(6)));

    // Without history, the viewer knows only what it saw itself.
    let viewer = definition.start(&fixture, &["--history-retention=0"]).await;
    let counts = json!({"online": 1, "late": 1, "maintenance": 1, "never_seen": 3});
    expect_counts(&viewer, "all", counts).await;
    fixture.record_aged([4], 2 * HOUR).await;
    let counts = json!({"online": 2, "late": 1, "maintenance": 1, "never_seen": 2});
    expect_counts(&viewer, "all", counts).await;
    fixture.clean_up().await;
    let counts = json!({"online": 1, "maintenance": 2, "never_seen": 2, "gone": 1});
    expect_counts(&viewer, "all", counts).await;
}

#[tokio::test]
async fn given_up_object_is_the_cause_until_it_is_seen() {
    let fixture = Fixture::new().await;
    fixture.record([1]).await;
    let definition = Definition::new(r#"{"name": "all", "objects": [1, 2, 3]}"#);
    let viewer = definition.start(&fixture, &[]).await;
    fixture.give_up(3);
    fixture.give_up(1);
    let counts = json!({"online": 1, "never_seen": 1, "given_up": 1});
    let all = expect_counts(&viewer, "all", counts).await;
    let because = json!({"path": "all", "object": "3", "kind": "given_up"});
    assert_eq!(all["because"], because);
    fixture.record([3]).await;
    expect_counts(&viewer, "all", json!({"online": 2, "never_seen": 1})).await;
}

#[tokio::test]
async fn change_of_a_group_is_published_on_the_exchange() {
    let fixture = Fixture::new().await;
    let connection = testkit::connect(&testkit::amqp_uri()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let (name, none) = (format!("{}.other", fixture.queue.name), FieldTable::default);
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    channel.queue_declare(name.as_str().into(), exclusive, none()).await.unwrap();
    let topics = format!("{}.events", fixture.queue.name);
    let bind = channel.queue_bind(
        name.as_str().into(),
        topics.into(),
        "group".into(),
        QueueBindOptions::default(),
        none(),
    );
    bind.await.unwrap();
    let definition = Definition::new(SHOP);
    let _viewer = definition.start(&fixture, &[]).await;
    fixture.record([7]).await;
    let body: Value = wait_for("a change is published", async || {
        let message =
            channel.basic_get(name.as_str().into(), BasicGetOptions::default()).await.unwrap();
        message.map(|message| serde_json::from_slice(&message.data).unwrap())
    })
    .await;
    let spare = json!({
        "path": "shop/spare", "was": "down", "is": "up", "online": 1, "total": 2, "because": null,
    });
    let because = json!({"path": "shop/berlin", "object": "1", "kind": "never_seen"});
    let shop = json!({
        "path": "shop", "was": "down", "is": "degraded", "online": 1, "total": 6,
        "because": because,
    });
    let groups = body["groups"].as_array().unwrap();
    assert!(groups.len() == 2 && groups.contains(&spare) && groups.contains(&shop), "{body}");
    assert_eq!(body["objects"], json!([]));
}

#[tokio::test]
async fn worse_status_is_pending_during_its_hold_time() {
    let fixture = Fixture::new().await;
    fixture.record_aged([1], 2 * HOUR).await;
    let definition = Definition::new(r#"{"name": "all", "objects": [1], "for": "1h"}"#);
    let viewer = definition.start(&fixture, &[]).await;
    fixture.clean_up().await;
    let all = expect_counts(&viewer, "all", json!({"gone": 1})).await;
    assert_eq!((&all["status"], &all["pending"]["status"]), (&json!("up"), &json!("down")));
    assert!(all["pending"]["since"].as_str() > all["since"].as_str(), "{all}");
}

#[tokio::test]
async fn groups_are_listed_by_depth_in_pages_with_an_etag() {
    let fixture = Fixture::new().await;
    let definition = Definition::new(
        r#"[{"name": "ä b", "children": [{"name": "c", "children": [{"name": "d"}]}]},
            {"name": "e%2F?"}]"#,
    );
    let viewer = definition.start(&fixture, &[]).await;
    let paths = async |path: &str| {
        let (status, page) = viewer.get(path).await;
        assert_eq!(status, 200, "{page}");
        let groups = page["groups"].as_array().unwrap().iter();
        let paths: Vec<String> =
            groups.map(|group| group["path"].as_str().unwrap().to_owned()).collect();
        (paths.join(" | "), page["next"].clone())
    };
    let all = |listed: &str| (listed.to_owned(), Value::Null);
    assert_eq!(paths("/groups").await, all("ä b | ä b/c | e%2F?"));
    assert_eq!(paths("/groups?depth=1").await, all("ä b | e%2F?"));
    assert_eq!(paths("/groups/%C3%A4%20b").await, all("ä b | ä b/c"));
    assert_eq!(paths("/groups/%C3%A4%20b/c?depth=1").await, all("ä b/c | ä b/c/d"));
    assert_eq!(paths("/groups/e%252F%3F?depth=0").await, all("e%2F?"));
    let (listed, next) = paths("/groups?depth=3&limit=2").await;
    assert_eq!((listed.as_str(), &next), ("ä b | ä b/c", &json!("ä b/c")));
    assert_eq!(paths("/groups?depth=3&limit=2&after=%C3%A4+b%2Fc").await, all("ä b/c/d | e%2F?"));
    for (path, status, detail) in [
        ("/groups/nowhere", 404, "no such group: nowhere"),
        ("/groups?depth=0", 400, "depth: expected a number from 1 to 100"),
        ("/groups/e%252F%3F?depth=101", 400, "depth: expected a number from 0 to 100"),
        ("/groups?after=x", 404, "after: no such group is listed"),
        ("/groups/e%252F%3F?after=%C3%A4+b", 404, "after: no such group is listed"),
        ("/groups?limit=1001", 400, "limit: expected a number from 1 to 1000"),
        ("/groups?x=1", 400, "unknown field `x`"),
    ] {
        let (answered, problem) = viewer.get(path).await;
        assert_eq!(answered, status, "{path}");
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
    }

    let request = |etag: &str| {
        client().get(format!("{}/groups", viewer.url)).header("if-none-match", etag).send()
    };
    let answer = request("\"other\"").await.unwrap();
    let etag = answer.headers()["etag"].to_str().unwrap().to_owned();
    assert_eq!(answer.status(), 200);
    for known in [&etag, &format!("\"x\", W/{etag}"), "*"] {
        let answer = request(known).await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), answer.headers()["etag"].to_str().unwrap()),
            (304, etag.as_str())
        );
    }
    definition.replace(r#"[{"name": "other"}]"#);
    wait_until("the ETag changes", async || request(&etag).await.unwrap().status() == 200).await;
}

#[tokio::test]
async fn objects_of_a_group_are_listed() {
    let fixture = Fixture::new().await;
    fixture.record_aged([3, 8, 9], 2 * HOUR).await;
    fixture.clean_up().await;
    fixture.record([1, 2, 7, 10]).await;
    let definition = Definition::new(SHOP);
    let viewer = definition.start(&fixture, &[]).await;
    let listed = async |query: &str| {
        let (status, page) = viewer.get(&format!("/objects?{query}")).await;
        assert_eq!(status, 200, "{page}");
        (ids(&page), page["next"].is_string())
    };
    assert_eq!(listed("group=shop").await, (vec![1, 2, 7], false));
    assert_eq!(listed("group=shop%2Fberlin").await, (vec![1, 2], false));
    assert_eq!(listed("group=shop&limit=2").await, (vec![1, 2], true));
    assert_eq!(listed("group=shop&after=0000000000000002").await, (vec![7], false));
    assert_eq!(listed("group=shop&online=false").await, (vec![3, 8], false));
    assert_eq!(listed("group=shop&online=false&limit=1").await, (vec![3], true));
    assert_eq!(listed("group=shop/spare&online=false").await, (vec![8], false));
    for (query, status, detail) in [
        ("group=nowhere", 404, "no such group: nowhere"),
        ("group=", 404, "no such group: "),
        ("group=shop&ids=1", 400, "ids and group: expected only one of them"),
    ] {
        for path in ["/objects", "/events"] {
            let (answered, problem) = viewer.get(&format!("{path}?{query}")).await;
            assert_eq!(answered, status, "{path}?{query}");
            assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
        }
    }
}

#[tokio::test]
async fn stream_of_a_group_has_only_its_objects_and_groups() {
    let fixture = Fixture::new().await;
    fixture.record([1, 2, 3, 7]).await;
    fixture.record_aged([4, 8], 2 * HOUR).await;
    let definition = Definition::new(SHOP);
    let viewer = definition.start(&fixture, &[]).await;
    let mut berlin = viewer.subscribe("?group=shop/berlin", None).await;
    berlin.expect_event("snapshot", [1, 2, 3, 4]).await;
    let mut some = viewer.subscribe("?ids=8", None).await;
    some.expect_event("snapshot", [8]).await;
    fixture.clean_up().await;
    berlin.expect_event("gone", [4]).await;
    assert_eq!(berlin.next_group().await.0, "shop/berlin up degraded");
    some.expect_event("gone", [8]).await;
    fixture.record([7, 8]).await;
    fixture.record([4]).await;
    berlin.expect_event("online", [4]).await;
    let resumed_after = berlin.last_id.clone();
    assert_eq!(berlin.next_group().await.0, "shop/berlin degraded up");
    // A stream without groups.
    assert_eq!(some.next_of_any_kind().await.unwrap().0, "online");
    // The change of the group can be resumed like those of objects.
    let mut again = viewer.subscribe("?group=shop/berlin", Some(&resumed_after)).await;
    assert_eq!(again.next_group().await.0, "shop/berlin degraded up");
}

#[tokio::test]
async fn stream_of_a_group_begins_again_when_it_has_other_objects() {
    let fixture = Fixture::new().await;
    fixture.record([1, 2, 3]).await;
    let definition = Definition::new(r#"{"name": "a", "objects": [1, 2]}"#);
    let viewer = definition.start(&fixture, &[]).await;
    let mut stream = viewer.subscribe("?group=a", None).await;
    stream.expect_event("snapshot", [1, 2]).await;
    let before = stream.last_id.clone();
    // Other groups, and other rules, do not concern its objects.
    definition.replace(
        r#"[{"name": "a", "objects": [2, 1], "up": "any"}, {"name": "b", "objects": [3]}]"#,
    );
    let exists = async |path: &str| viewer.get(&format!("/groups/{path}")).await.0 == 200;
    wait_until("the second definition is in effect", async || exists("b").await).await;
    fixture.record([2]).await;
    stream.expect_event("seen", [2]).await;
    definition.replace(r#"{"name": "a", "objects": [2, 3]}"#);
    stream.expect_event("snapshot", [2, 3]).await;
    // Since that event, the group has other objects.
    let mut again = viewer.subscribe("?group=a", Some(&before)).await;
    again.expect_event("snapshot", [2, 3]).await;
    definition.replace(r#"{"name": "c"}"#);
    assert_eq!(stream.next_or_end().await, None, "the group was removed");
    assert_eq!(viewer.get("/events?group=a").await.0, 404);
}

#[tokio::test]
async fn definition_that_changes_under_load_loses_no_change() {
    const OBJECTS: i64 = 60;
    let fixture = Fixture::new().await;
    let text = |split: i64| {
        format!(
            r#"{{"name": "all", "up": "50%", "children": [
                {{"name": "low", "objects": ["1-{split}"], "up": "any"}},
                {{"name": "high", "objects": ["{}-{OBJECTS}"], "up": "50%"}}]}}"#,
            split + 1
        )
    };
    let definition = Definition::new(&text(30));
    let viewer = definition.start(&fixture, &[]).await;
    let mut stream = viewer.subscribe("", None).await;
    stream.expect_event("snapshot", []).await;
    let total_of_low = async || group(&viewer, "all/low").await["total"].as_i64().unwrap();
    let write = async {
        for round in 0..60 {
            fixture.record_aged((1..=OBJECTS).filter(|id| (id + round) % 3 != 0), 2 * HOUR).await;
            fixture.clean_up().await;
            fixture.record_aged((1..=OBJECTS).filter(|id| (id * round) % 7 == 0), 2 * HOUR).await;
        }
        fixture.clean_up().await;
        fixture.record((1..=OBJECTS).filter(|id| id % 4 == 0)).await;
    };
    let redefine = async {
        for split in [10, 50, 20] {
            definition.replace(&text(split));
            wait_until("the definition is in effect", async || total_of_low().await == split).await;
        }
    };
    tokio::join!(write, redefine);
    // A naive computation.
    for (path, total, online) in [("all", 60, 15), ("all/low", 20, 5), ("all/high", 40, 10)] {
        let counts = json!({"online": online, "gone": total - online});
        let group = expect_counts(&viewer, path, counts).await;
        assert_eq!(group["total"], total);
    }
    // The events of each group form a chain that ends with its status.
    let mut statuses = HashMap::from(
        ["all", "all/low", "all/high"].map(|path| (path.to_owned(), "down".to_owned())),
    );
    let expected = ["up", "up", "degraded"];
    let current = async |path: &str| group(&viewer, path).await["status"].clone();
    for (path, status) in ["all", "all/low", "all/high"].into_iter().zip(expected) {
        assert_eq!(current(path).await, status, "{path}");
    }
    fixture.record([1_000]).await;
    loop {
        let (name, data) = stream.next_of_any_kind().await.unwrap();
        for group in data["groups"].as_array().into_iter().flatten() {
            let [path, was, is] =
                ["path", "was", "is"].map(|name| group[name].as_str().unwrap().to_owned());
            assert_eq!(statuses.insert(path, is), Some(was), "{group}");
        }
        if name == "online" && data["objects"][0]["id"] == "1000" {
            break;
        }
    }
    for (path, status) in ["all", "all/low", "all/high"].into_iter().zip(expected) {
        assert_eq!(statuses[path], status, "{path}");
    }
}

#[tokio::test]
async fn definition_that_changes_under_load_drops_no_event() {
    const OBJECTS: i64 = 100_000;
    let fixture = Fixture::new().await;
    let text = |split: i64| {
        format!(
            r#"{{"name": "all", "children": [{{"name": "low", "objects": ["1-{split}"]}},
                {{"name": "high", "objects": ["{}-{OBJECTS}"], "up": "any"}}]}}"#,
            split + 1
        )
    };
    let definition = Definition::new(&text(1));
    let viewer = definition.start(&fixture, &[]).await;
    let is_redefined = Cell::new(false);
    let redefine = async {
        for split in [100, 50_000, 200, 99_999, 300] {
            definition.replace(&text(split));
            let total_of_low = async || group(&viewer, "all/low").await["total"].clone();
            wait_until("the definition is in effect", async || total_of_low().await == split).await;
        }
        is_redefined.set(true);
    };
    // Each object comes once, and two of three go: about 500 changes per second. No object comes
    // twice, because a reading of the table may find both changes as one.
    let stays = |id: &i64| id % 3 == 0;
    let write = async {
        let (mut end, mut pace) = (1, interval(Duration::from_millis(60)));
        while !is_redefined.get() {
            pace.tick().await;
            fixture.record((end..end + 20).filter(stays)).await;
            fixture.record_aged((end..end + 20).filter(|id| !stays(id)), 2 * HOUR).await;
            fixture.clean_up().await;
            end += 20;
        }
        fixture.record([OBJECTS]).await;
        end
    };
    let mut all = viewer.subscribe("", None).await;
    let mut of_group = viewer.subscribe("?group=all", None).await;
    let (end, (), all, of_group) = tokio::join!(
        write,
        redefine,
        events_until(&mut all, OBJECTS),
        events_until(&mut of_group, OBJECTS)
    );
    assert!(end < OBJECTS);
    let expected = |id| if stays(&id) { vec!["online"] } else { vec!["online", "gone"] };
    let mut expected: BTreeMap<_, _> = (1..end).map(|id| (id, expected(id))).collect();
    expected.insert(OBJECTS, vec!["online"]);
    for events in [all, of_group] {
        for (id, kinds) in &expected {
            assert_eq!(events.get(id).map_or(&[][..], Vec::as_slice), kinds, "{id} of {end}");
        }
        assert_eq!(events.len(), expected.len(), "no other object has events");
    }

    for (path, first, last) in
        [("all", 1, OBJECTS), ("all/low", 1, 300), ("all/high", 301, OBJECTS)]
    {
        let (online, known): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM object WHERE id BETWEEN $1 AND $2),
                    (SELECT count(DISTINCT object_id) FROM presence_change
                     WHERE object_id BETWEEN $1 AND $2)",
        )
        .bind(first)
        .bind(last)
        .fetch_one(fixture.database.pool())
        .await
        .unwrap();
        let never_seen = last - first + 1 - known;
        let counts = json!({"online": online, "gone": known - online, "never_seen": never_seen});
        expect_counts(&viewer, path, counts).await;
    }
}

/// The kinds of the events of each object, until one is about the object `last`.
async fn events_until(subscriber: &mut Subscriber, last: i64) -> BTreeMap<i64, Vec<String>> {
    let mut events: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    while !events.contains_key(&last) {
        let (kind, ids) = subscriber.next().await;
        for id in ids {
            events.entry(id).or_default().push(kind.clone());
        }
    }
    events
}

#[tokio::test]
async fn invalid_definition_keeps_the_previous_one_until_it_is_fixed() {
    let fixture = Fixture::new().await;
    let definition = Definition::new(SHOP);
    let viewer = definition.start(&fixture, &[]).await;
    let rejection = async || {
        let missing = viewer.health.missing_optional();
        missing.into_iter().find(|(name, _)| *name == "groups file").map(|(_, reason)| reason)
    };
    definition.replace("{\"name\": \"shop\",\n \"up\": \"most\"}");
    let reason = wait_for("the definition is rejected", rejection).await;
    let path = definition.file.display();
    assert!(reason.starts_with(&format!("GROUPS_FILE={path}: groups.json:2:")), "{reason}");
    assert_eq!(group(&viewer, "shop/berlin").await["total"], 4);
    fs::remove_file(&definition.file).unwrap();
    wait_until("the missing file is reported", async || {
        rejection().await.is_some_and(|reason| reason.contains("cannot read it"))
    })
    .await;
    assert_eq!(group(&viewer, "shop/berlin").await["total"], 4);
    definition.replace(r#"{"name": "fixed"}"#);
    wait_until("the definition is in effect", async || {
        viewer.get("/groups/fixed").await.0 == 200 && rejection().await.is_none()
    })
    .await;
    assert_eq!(viewer.get("/groups/shop").await.0, 404);
}

#[tokio::test]
async fn files_of_a_directory_form_one_forest() {
    let fixture = Fixture::new().await;
    let mut definition = Definition::new(SHOP);
    let directory = definition.directory.path().to_owned();
    fs::create_dir_all(directory.join("sites/.git")).unwrap();
    fs::write(directory.join("sites/x.json"), r#"{"name": "x"}"#).unwrap();
    fs::write(directory.join("sites/.git/y.json"), "nonsense").unwrap();
    definition.file.clone_from(&directory);
    let viewer = definition.start(&fixture, &[]).await;
    let roots = async || {
        let (_, page) = viewer.get("/groups?depth=1").await;
        let groups = page["groups"].as_array().unwrap().iter();
        groups.map(|group| group["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(roots().await, ["shop", "x"]);
    // A directory that is replaced as a whole, as by a checkout.
    fs::create_dir(directory.join("new")).unwrap();
    fs::write(directory.join("new/z.json"), r#"{"name": "z"}"#).unwrap();
    fs::remove_dir_all(directory.join("sites")).unwrap();
    wait_until("the files are read", async || roots().await == ["shop", "z"]).await;
    fs::write(directory.join("new/z.json"), r#"{"name": "shop"}"#).unwrap();
    wait_until("a repeated name is rejected", async || {
        let missing = viewer.health.missing_optional();
        missing.iter().any(|(_, reason)| reason.contains("new/z.json:1:10: shop: "))
    })
    .await;
}

#[tokio::test]
async fn without_groups_file_there_are_no_groups() {
    let (_fixture, viewer) = Fixture::showing([1]).await;
    for path in ["/groups", "/groups/shop", "/objects?group=shop", "/events?group=shop"] {
        let (status, problem) = viewer.get(path).await;
        assert_eq!(
            (status, &problem["detail"]),
            (404, &json!("there are no groups, because GROUPS_FILE is not set"))
        );
    }
    let tasks = viewer.supervisor.running();
    assert!(tasks.iter().all(|task| !task.contains("groups")), "{tasks:?}");
}

#[tokio::test]
async fn groups_are_cached_and_invalid_ones_stop_the_process() {
    let (fixture, queue) = (Fixture::new().await, Queue::new());
    let system = System::new(&queue, &fixture.database, "http://127.0.0.1:1/");
    let definition = Definition::new(SHOP);
    let path = definition.file.display().to_string();
    let cache = definition.directory.path().join("groups.cache").display().to_string();
    let settings = [("GROUPS_FILE", path.as_str()), ("GROUPS_CACHE", cache.as_str())];
    for from_cache in ["from_cache=false", "from_cache=true"] {
        let viewer = system.spawn("viewer", &settings);
        let line = viewer.wait_for_log("read the groups").await;
        assert!(line.contains(from_cache), "{line}");
        viewer.wait_for_metric("lastseen_groups{status=\"down\"}", 2.0).await;
        viewer.wait_for_metric("lastseen_group_status{path=\"shop\"}", 2.0).await;
        viewer.stop().await;
    }
    definition.replace("{\"name\": \"shop\", \"up\": \"most\"}");
    let missing = format!("{path}.missing");
    for (file, reason) in [
        (&path, "groups.json:1:24: shop: up: expected"),
        (&missing, "cannot read it: No such file"),
    ] {
        let viewer = system.spawn("viewer", &[("GROUPS_FILE", file.as_str())]);
        assert_eq!(viewer.wait().await.code(), Some(78));
        let log = viewer.log();
        let last = log.last().unwrap();
        assert!(last.contains(&format!("GROUPS_FILE={file}: ")) && last.contains(reason), "{last}");
    }
}
