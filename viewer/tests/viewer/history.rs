use std::collections::HashSet;

use messaging::events::Exchange;
use rand::RngExt as _;
use reqwest::Response;
use serde_json::{Value, json};
use testkit::wait_until;
use tokio::time::timeout;

use crate::fixture::{Fixture, RunningViewer, client, ids};
use crate::{HOUR, PATIENCE};

/// The name of a change, and the object's id.
type Change = (String, i64);

impl Fixture {
    /// Lets the objects come online, and be gone at once.
    async fn come_and_go(&self, ids: impl IntoIterator<Item = i64>) {
        self.record_aged(ids, 2 * HOUR).await;
        self.clean_up().await;
    }

    /// Waits until the feed has all changes so far. Transactions of other tests may delay them.
    async fn all_are_settled(&self, viewer: &RunningViewer) {
        let last = "SELECT coalesce(max(position), 0) FROM presence_change";
        let last: i64 = sqlx::query_scalar(last).fetch_one(self.database.pool()).await.unwrap();
        wait_until("all changes are settled", async || {
            let (_, latest) = viewer.get("/changes?after=latest").await;
            latest["next"].as_str() == Some(last.to_string().as_str())
        })
        .await;
    }

    /// All changes in the database, in the order of the feed.
    async fn changes(&self) -> Vec<Change> {
        let sql = "SELECT CASE WHEN is_online THEN 'online' ELSE 'gone' END, object_id
                   FROM presence_change ORDER BY position";
        sqlx::query_as(sql).fetch_all(self.database.pool()).await.unwrap()
    }
}

/// A client that follows the feed as server-sent events.
struct Follower {
    response: Response,
    text: String,
    last_id: String,
}

impl Follower {
    async fn connect(viewer: &RunningViewer, query: &str, after: Option<&str>) -> Self {
        let url = format!("{}/changes{query}", viewer.url);
        let mut request = client().get(url).header("accept", "text/event-stream");
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut follower = Self { response, text: String::new(), last_id: String::new() };
        assert_eq!(follower.next_block().await.unwrap().0, "", "the first block only has an id");
        follower
    }

    async fn next(&mut self) -> Change {
        self.next_or_end().await.expect("the stream ended")
    }

    /// The next change, or the end of the stream.
    async fn next_or_end(&mut self) -> Option<Change> {
        let is_change = |(kind, _): &(String, String)| !kind.is_empty();
        let next = async {
            loop {
                let block = self.next_block().await?;
                if is_change(&block) {
                    return Some(block);
                }
            }
        };
        let (kind, data) = timeout(PATIENCE, next).await.expect("no change in time")?;
        let data: Value = serde_json::from_str(&data).unwrap();
        assert!(data["at"].as_str() >= data["last_seen"].as_str(), "{data}");
        Some((kind, data["id"].as_str().unwrap().parse().unwrap()))
    }

    /// The event and the data of the next block; both are empty in a comment.
    async fn next_block(&mut self) -> Option<(String, String)> {
        while !self.text.contains("\n\n") {
            let chunk = self.response.chunk().await.ok()??;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        let end = self.text.find("\n\n").unwrap();
        let block: String = self.text.drain(..end + 2).collect();
        let field = |name| block.lines().find_map(|line| line.strip_prefix(name));
        if let Some(id) = field("id: ") {
            id.clone_into(&mut self.last_id);
        }
        let field = |name| field(name).unwrap_or_default().to_owned();
        Some((field("event: "), field("data: ")))
    }
}

fn cursors(page: &Value) -> Vec<i64> {
    let changes = page["changes"].as_array().unwrap().iter();
    changes.map(|change| change["cursor"].as_str().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn gone_object_is_shown_with_its_deletion() {
    let fixture = Fixture::new().await;
    fixture.record([2]).await;
    let viewer = fixture.start_viewer_with(Exchange::disabled()).await;
    viewer.expect_objects([2]).await;
    fixture.come_and_go([1]).await;
    let (status, gone) = viewer.get("/objects/1").await;
    assert_eq!((status, &gone["online"], &gone["sightings"]), (200, &json!(false), &json!([])));
    assert!(gone["gone_at"].as_str() > gone["last_seen"].as_str(), "{gone}");
    let (_, online) = viewer.get("/objects/2").await;
    assert_eq!((&online["online"], &online["gone_at"]), (&json!(true), &Value::Null));
    let (status, problem) = viewer.get("/objects/3").await;
    let detail = "object 3 is neither online nor in the history";
    assert_eq!((status, &problem["detail"]), (404, &json!(detail)));
    // As another program does, which records no history.
    fixture.execute_without_event("DELETE FROM object WHERE id = 2").await;
    viewer.expect_objects([]).await;
    let (status, deleted) = viewer.get("/objects/2").await;
    assert_eq!(
        (status, deleted),
        (
            200,
            json!({
                "id": "2", "online": false, "last_seen": online["last_seen"], "gone_at": null,
                "sightings": [],
            })
        )
    );
}

#[tokio::test]
async fn gone_objects_are_listed_in_pages() {
    let (fixture, viewer) = Fixture::showing([9]).await;
    fixture.come_and_go([i64::MIN, -5, 0, 3, i64::MAX]).await;
    fixture.come_and_go([4]).await;
    fixture.record([4]).await;
    let (mut found, mut after) = (Vec::new(), String::new());
    for size in [2, 2, 1] {
        let (status, page) = viewer.get(&format!("/objects?online=false&limit=2{after}")).await;
        assert_eq!((status, ids(&page).len()), (200, size), "{page}");
        assert_eq!(page["objects"][0]["online"], false);
        assert!(page["objects"][0]["gone_at"].is_string(), "{page}");
        found.extend(ids(&page));
        after = page["next"].as_str().map_or(String::new(), |next| format!("&after={next}"));
    }
    assert_eq!((found.as_slice(), after.as_str()), (&[i64::MIN, -5, 0, 3, i64::MAX][..], ""));
    let earlier = "UPDATE presence_change SET at = at - interval '2 hours' WHERE object_id = 3";
    fixture.execute_without_event(earlier).await;
    for (query, expected) in [
        ("", [i64::MIN, -5, 0, i64::MAX].as_slice()),
        ("&gone_within=119m", &[i64::MIN, -5, 0, i64::MAX]),
        ("&gone_within=1d", &[i64::MIN, -5, 0, 3, i64::MAX]),
        ("&after=7fffffffffffffff", &[]),
    ] {
        let (_, page) = viewer.get(&format!("/objects?online=false{query}")).await;
        assert_eq!(ids(&page), expected, "{query}");
    }
    viewer.expect_objects([4, 9]).await;
    let (_, page) = viewer.get("/objects?online=true&limit=1").await;
    assert_eq!(page["objects"][0]["gone_at"], Value::Null);
    assert_eq!(page["objects"][0]["online"], true);
}

#[tokio::test]
async fn sessions_are_listed_newest_first() {
    let (fixture, viewer) = Fixture::showing([]).await;
    fixture.come_and_go([7]).await;
    fixture.come_and_go([7, 8]).await;
    fixture.record([7]).await;
    let (status, all) = viewer.get("/objects/7/sessions").await;
    let sessions = all["sessions"].as_array().unwrap();
    assert_eq!((status, sessions.len(), &all["next"]), (200, 3, &Value::Null), "{all}");
    assert!(sessions[0]["gone_at"].is_null() && sessions[0]["last_seen"].is_null(), "{all}");
    let times: Vec<&str> = ["gone_at", "online_at"]
        .iter()
        .flat_map(|name| sessions[1..].iter().map(move |session| session[name].as_str().unwrap()))
        .collect();
    let [gone, gone_before, online, online_before] = times.as_slice() else { panic!("{all}") };
    assert!(gone > online && online > gone_before && gone_before > online_before, "{all}");

    let (mut found, mut after) = (Vec::new(), String::new());
    for _ in 0..3 {
        let (_, page) = viewer.get(&format!("/objects/7/sessions?limit=1{after}")).await;
        found.extend(page["sessions"].as_array().unwrap().clone());
        after = page["next"].as_str().map_or(String::new(), |next| format!("&after={next}"));
    }
    assert_eq!((&found, after.as_str()), (sessions, ""));
    for (query, expected) in [
        (format!("since={gone_before}"), &sessions[..2]),
        (format!("until={online}"), &sessions[2..]),
        (format!("since={online_before}&until={gone}"), &sessions[1..]),
    ] {
        let (_, page) = viewer.get(&format!("/objects/7/sessions?{query}")).await;
        assert_eq!(page["sessions"].as_array().unwrap(), expected, "{query}");
    }
    let (status, none) = viewer.get("/objects/1/sessions").await;
    assert_eq!((status, none), (200, json!({ "sessions": [], "next": null })));
}

#[tokio::test]
async fn availability_is_the_share_of_the_window() {
    let (fixture, viewer) = Fixture::showing([]).await;
    fixture
        .execute_without_event(
            "INSERT INTO presence_change (object_id, at, last_seen, is_online)
             SELECT id, now() - ago, now() - ago, kind = 'online' FROM (VALUES
                 (1, interval '10 h', 'online'), (7, interval '5 h', 'online'),
                 (7, interval '4 h', 'gone'), (7, interval '2 h', 'online'),
                 (7, interval '1 h', 'gone')) AS change (id, ago, kind)",
        )
        .await;
    for (query, hours_online, hours, sessions) in [
        ("", 2.0, 10.0, 2),
        ("?window=270m", 1.5, 4.5, 2),
        ("?window=3h", 1.0, 3.0, 1),
        ("?window=3650d", 2.0, 10.0, 2),
        ("?window=30m", 0.0, 0.5, 0),
    ] {
        let (status, found) = viewer.get(&format!("/objects/7/availability{query}")).await;
        assert_eq!(
            (status, &found["id"], &found["sessions"]),
            (200, &json!("7"), &json!(sessions))
        );
        // The window moves on between the statements.
        let is_about = |name: &str, expected: f64, tolerance: f64| {
            let found = found[name].as_f64().unwrap();
            assert!((found - expected).abs() <= tolerance, "{query}: {name} is {found}");
        };
        is_about("seconds_online", hours_online * 3_600.0, 60.0);
        is_about("ratio", hours_online / hours, 0.02);
        assert!(found["since"].as_str() < found["until"].as_str(), "{found}");
    }
    let (_, never) = viewer.get("/objects/8/availability").await;
    assert_eq!((&never["ratio"], &never["sessions"]), (&json!(0.0), &json!(0)), "{never}");
}

#[tokio::test]
async fn changes_are_paged_from_the_oldest_or_the_latest() {
    let (fixture, viewer) = Fixture::showing([]).await;
    let (_, empty) = viewer.get("/changes?after=latest").await;
    assert_eq!(empty, json!({ "changes": [], "next": "0", "has_more": false }));
    for id in 1..=3 {
        fixture.come_and_go([id]).await;
    }
    fixture.all_are_settled(&viewer).await;
    let (mut found, mut after) = (Vec::new(), "0".to_owned());
    for (count, has_more) in [(4, true), (2, false), (0, false)] {
        let (status, page) = viewer.get(&format!("/changes?limit=4&after={after}")).await;
        assert_eq!((status, cursors(&page).len()), (200, count), "{page}");
        assert_eq!(page["has_more"], has_more, "{page}");
        let next = page["next"].as_str().unwrap().to_owned();
        let last = cursors(&page).last().map_or(after, ToString::to_string);
        assert_eq!(next, last, "`next` is the cursor of the last change");
        after = next;
        found.extend(page["changes"].as_array().unwrap().iter().map(|change| {
            assert!(change["at"].as_str() > change["last_seen"].as_str(), "{change}");
            let id = change["id"].as_str().unwrap().parse().unwrap();
            (change["kind"].as_str().unwrap().to_owned(), id)
        }));
    }
    assert_eq!(found, fixture.changes().await);
    let (_, page) = viewer.get("/changes").await;
    assert_eq!(cursors(&page).len(), 6, "without a cursor, the feed begins with the oldest change");
    let (_, latest) = viewer.get("/changes?after=latest").await;
    assert_eq!(latest, json!({ "changes": [], "next": after, "has_more": false }));
    fixture.record([4]).await;
    fixture.all_are_settled(&viewer).await;
    let (_, page) = viewer.get(&format!("/changes?after={after}")).await;
    assert_eq!(page["changes"][0]["id"], "4");
    let (_, resumed) = viewer.get(&format!("/changes?after=0&lastEventId={after}")).await;
    assert_eq!(resumed, page);
}

#[tokio::test]
async fn cursor_without_all_later_changes_is_410() {
    let (fixture, viewer) = Fixture::showing([]).await;
    fixture.record([1, 2, 3, 4]).await;
    fixture.all_are_settled(&viewer).await;
    let (_, page) = viewer.get("/changes").await;
    let [first, second, third, fourth] = cursors(&page)[..] else { panic!("{page}") };
    sqlx::query("DELETE FROM presence_change WHERE position <= $1")
        .bind(second)
        .execute(fixture.database.pool())
        .await
        .unwrap();
    for (cursor, status) in
        [(0, 200), (1, 410), (first, 410), (second, 200), (fourth, 200), (fourth + 1, 410)]
    {
        for accept in ["application/json", "text/event-stream"] {
            let url = format!("{}/changes?after={cursor}", viewer.url);
            let response = client().get(url).header("accept", accept).send().await.unwrap();
            assert_eq!(response.status(), status, "{cursor} {accept}");
            if status == 410 {
                let text = response.text().await.unwrap();
                assert!(
                    text.contains("read /objects again, and continue after its cursor"),
                    "{text}"
                );
            }
        }
    }
    let (_, page) = viewer.get("/changes").await;
    assert_eq!(cursors(&page), [third, fourth]);
}

#[tokio::test]
async fn invalid_request_for_the_history_is_400() {
    let (_fixture, viewer) = Fixture::showing([]).await;
    for (path, detail) in [
        ("/objects?online=maybe", "online: expected true or false"),
        ("/objects?gone_within=1h", "gone_within: expected only with online=false"),
        ("/objects?online=false&ids=1", "expected only with online=true"),
        ("/objects?online=false&seen_within=1h", "expected only with online=true"),
        ("/objects?online=false&gone_within=0s", "gone_within: expected a duration"),
        ("/objects/x/sessions", "id: expected"),
        ("/objects/1/sessions?since=yesterday", "since: expected a time"),
        ("/objects/1/sessions?until=2026-11-21", "until: expected a time"),
        ("/objects/1/sessions?limit=1001", "limit: expected a number from 1 to 1000"),
        ("/objects/1/sessions?after=-1", "after: expected"),
        ("/objects/x/availability", "id: expected"),
        ("/objects/1/availability?window=soon", "window: expected a duration"),
        ("/changes?after=newest", "after: expected"),
        ("/changes?limit=0", "limit: expected"),
        ("/changes?lastEventId=latest", "lastEventId: expected"),
        ("/changes?from=1", "unknown field"),
    ] {
        let (status, problem) = viewer.get(path).await;
        assert_eq!(status, 400, "{path}");
        let text = problem["detail"].as_str().unwrap();
        assert!(text.contains(detail), "{path}: {text}");
    }
}

#[tokio::test]
async fn without_history_only_objects_that_are_online_are_known() {
    let fixture = Fixture::new().await;
    fixture.come_and_go([1]).await;
    fixture.record([2]).await;
    let viewer = fixture.start_viewer_without_history().await;
    viewer.expect_objects([2]).await;
    for path in
        ["/objects?online=false", "/objects/1/sessions", "/objects/1/availability", "/changes"]
    {
        let (status, problem) = viewer.get(path).await;
        let detail = "there is no history, because HISTORY_RETENTION is 0";
        assert_eq!((status, &problem["detail"]), (404, &json!(detail)), "{path}");
    }
    assert_eq!(viewer.get("/objects/1").await.0, 404);
    assert_eq!(viewer.get("/objects/2").await.0, 200);
    assert!(!viewer.supervisor.running().contains(&"feed of changes".to_owned()));
}

#[tokio::test]
async fn follower_gets_each_later_change_until_the_shutdown() {
    let (fixture, viewer) = Fixture::showing([1]).await;
    fixture.all_are_settled(&viewer).await;
    let mut latest = Follower::connect(&viewer, "?after=latest", None).await;
    let resume = latest.last_id.clone();
    let mut oldest = Follower::connect(&viewer, "", None).await;
    let subscribers = async || viewer.get("/stats").await.1["subscribers"].clone();
    assert_eq!(subscribers().await, 2);
    assert_eq!(oldest.next().await, ("online".to_owned(), 1));
    fixture.come_and_go([2]).await;
    for follower in [&mut latest, &mut oldest] {
        assert_eq!(follower.next().await, ("online".to_owned(), 2));
        assert_eq!(follower.next().await, ("gone".to_owned(), 2));
    }
    assert_eq!(latest.last_id, oldest.last_id);
    // A browser repeats the parameters when it reconnects.
    let mut again = Follower::connect(&viewer, "?after=latest", Some(&resume)).await;
    assert_eq!(again.next().await, ("online".to_owned(), 2));
    drop(again);
    wait_until("the subscriber is not counted", async || subscribers().await == 2).await;
    viewer.stop().await;
    assert_eq!(latest.next_or_end().await, None, "the stream must end");
}

#[tokio::test]
async fn follower_that_reconnects_gets_each_change_once() {
    const BATCHES: i64 = 12;
    const OBJECTS: i64 = 500;
    let (fixture, viewer) = Fixture::showing([]).await;
    let write = async {
        for batch in 0..BATCHES {
            fixture.come_and_go(batch * OBJECTS..(batch + 1) * OBJECTS).await;
        }
    };
    let follow = async {
        let (mut received, mut last_id) = (Vec::new(), "0".to_owned());
        let count = usize::try_from(BATCHES * OBJECTS * 2).unwrap();
        while received.len() < count {
            let mut follower = Follower::connect(&viewer, "", Some(&last_id)).await;
            assert_eq!(follower.last_id, last_id);
            for _ in 0..rand::rng().random_range(1..700) {
                if received.len() < count {
                    received.push(follower.next().await);
                }
            }
            last_id = follower.last_id;
        }
        received
    };
    let ((), received) =
        timeout(2 * PATIENCE, async { tokio::join!(write, follow) }).await.unwrap();
    assert_eq!(received, fixture.changes().await);
}

/// The slow follower reads only when the ring has long lost what it needs next.
#[tokio::test]
async fn slow_follower_gets_each_change_once_too() {
    const BATCHES: usize = 6;
    const OBJECTS: i64 = 10_000;
    let (fixture, viewer) = Fixture::showing([]).await;
    let mut slow = Follower::connect(&viewer, "", None).await;
    let mut fast = Follower::connect(&viewer, "", None).await;
    let mut changes = Vec::new();
    for _ in 0..BATCHES {
        fixture.come_and_go(0..OBJECTS).await;
        for _ in 0..2 * OBJECTS {
            changes.push(fast.next().await);
        }
    }
    assert_eq!(changes, fixture.changes().await);
    for (index, change) in changes.iter().enumerate() {
        // The server disconnects a client that has read nothing for 20 s.
        let next = if let Some(next) = slow.next_or_end().await {
            next
        } else {
            slow = Follower::connect(&viewer, "", Some(&slow.last_id)).await;
            slow.next().await
        };
        assert_eq!(&next, change, "change {index}");
    }
}

#[tokio::test]
async fn without_the_database_requests_are_503_and_streams_wait() {
    let (fixture, viewer) = Fixture::showing([1]).await;
    fixture.all_are_settled(&viewer).await;
    let mut follower = Follower::connect(&viewer, "?after=latest", None).await;
    // The history can be written, but not read.
    let sql = "ALTER TABLE presence_change RENAME COLUMN position TO elsewhere";
    fixture.execute_without_event(sql).await;
    fixture.record([2]).await;
    for path in [
        "/objects?online=false",
        "/objects/3",
        "/objects/1/sessions",
        "/objects/1/availability",
        "/changes",
        "/changes?after=latest",
    ] {
        for accept in ["application/json", "text/event-stream"] {
            let request = client().get(format!("{}{path}", viewer.url)).header("accept", accept);
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 503, "{path} {accept}");
            assert_eq!(response.headers()["retry-after"], "1", "{path}");
            let text = response.text().await.unwrap();
            assert!(text.contains("cannot access the history"), "{path}: {text}");
        }
    }
    assert_eq!(viewer.get("/objects/1").await.0, 200, "what is online needs no history");
    let sql = "ALTER TABLE presence_change RENAME COLUMN elsewhere TO position";
    fixture.execute_without_event(sql).await;
    assert_eq!(follower.next().await, ("online".to_owned(), 2));
}

#[tokio::test]
async fn further_requests_are_503_while_many_wait_for_the_database() {
    let (fixture, viewer) = Fixture::showing([1]).await;
    let mut lock = fixture.database.pool().begin().await.unwrap();
    let sql = "LOCK TABLE presence_change IN ACCESS EXCLUSIVE MODE";
    sqlx::query(sql).execute(&mut *lock).await.unwrap();
    let requests = (0..100).map(|_| viewer.get("/objects/1/sessions"));
    let responses = futures_util::future::join_all(requests).await;
    let is_refused = |(status, problem): &&(u16, Value)| {
        assert_eq!(*status, 503, "{problem}");
        problem["detail"].as_str().unwrap().contains("64 other requests")
    };
    let refused = responses.iter().filter(is_refused).count();
    assert!((1..=36).contains(&refused), "{refused} were refused");
    lock.rollback().await.unwrap();
    assert_eq!(viewer.get("/objects/1/sessions").await.0, 200);
}

/// The list may lack changes whose events were lost, but none up to its cursor.
#[tokio::test]
async fn list_and_the_changes_after_its_cursor_are_complete() {
    let (fixture, viewer) = Fixture::showing([1, 2, 3]).await;
    fixture
        .execute_without_event(
            "WITH gone AS (DELETE FROM object WHERE id = 2 RETURNING id, last_seen)
             INSERT INTO presence_change (object_id, last_seen, is_online)
             SELECT id, last_seen, false FROM gone",
        )
        .await;
    let has_deletion = async |cursor: &str| {
        let (_, page) = viewer.get(&format!("/changes?after={cursor}")).await;
        page["changes"].as_array().unwrap().iter().any(|change| change["kind"] == "gone")
    };
    let mut cursors_before = HashSet::new();
    wait_until("a cursor after the deletion", async || {
        let (_, page) = viewer.get("/objects").await;
        let cursor = page["cursor"].as_str().unwrap_or("0").to_owned();
        if ids(&page).contains(&2) {
            cursors_before.insert(cursor);
            return false;
        }
        // The deletion is settled before it is found by a reading.
        !has_deletion(&cursor).await && has_deletion("0").await
    })
    .await;
    for cursor in cursors_before {
        assert!(has_deletion(&cursor).await, "{cursor}");
    }
}
