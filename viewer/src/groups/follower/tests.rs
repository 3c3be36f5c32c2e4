use std::time::SystemTime;

use groups::{Kind as ObjectKind, Weights, parse};
use messaging::events::{Exchange, Kind};
use runtime::Supervisor;
use serde_json::Value;
use tokio::sync::oneshot;

use super::*;
use crate::object::Object;

const SECOND: Micros = 1_000_000;
/// The time at which each test begins, in seconds since 1970.
const BEGIN: Micros = 1_000_000;
const PAIR: &str = r#"{"name": "pair", "objects": [1, 2]}"#;

/// A follower and its view. The tests set the clock.
struct Setup {
    view: ViewState,
    groups: Arc<Groups>,
    follower: Follower,
    messages: mpsc::Sender<Message>,
    weights: Weights,
    /// The number of the last change that a test has read.
    read: u64,
}

impl Setup {
    /// Expects a TTL of 30 s, after whose two thirds objects are late.
    fn new(weights: &str) -> Self {
        let groups = Arc::new(Groups::default());
        let (messages, receiver) = mpsc::channel(8);
        let emitter = Emitter::start(&Exchange::disabled(), "test", &Supervisor::default());
        let object_ttl = Reloadable::fixed(Duration::from_secs(30));
        let follower = Follower::new(Arc::clone(&groups), receiver, object_ttl, 0, emitter);
        let weights = weights.parse().unwrap();
        let setup = Self { view: ViewState::new(), groups, follower, messages, weights, read: 0 };
        setup.set_clock(0);
        setup
    }

    /// A follower of this definition, with these objects online since the beginning.
    async fn following(weights: &str, definition: &str, online: &[i64]) -> Self {
        let mut setup = Self::new(weights);
        setup.change(Kind::Online, online, 0);
        setup.view.mark_complete();
        setup.define(definition).await;
        setup.send(Message::TakeEffect).await;
        assert_eq!(setup.follow().await, [""; 0], "the first statuses are not announced");
        setup
    }

    async fn define(&self, definition: &str) -> oneshot::Receiver<bool> {
        let tree = parse([("test", definition.as_bytes())], self.weights).unwrap();
        let (sender, needs_history) = oneshot::channel();
        self.send(Message::Define(Box::new(tree), sender)).await;
        needs_history
    }

    async fn send(&self, message: Message) {
        self.messages.send(message).await.map_err(drop).unwrap();
    }

    /// Sets the clock to this number of seconds after the beginning.
    fn set_clock(&self, seconds: u64) {
        let begin = Duration::from_secs(BEGIN.unsigned_abs());
        self.view.set_clock(SystemTime::UNIX_EPOCH + begin + Duration::from_secs(seconds));
    }

    /// Changes objects that were seen this number of seconds after the beginning.
    fn change(&self, kind: Kind, ids: &[i64], seconds: Micros) {
        let last_seen = (BEGIN + seconds) * SECOND;
        self.view.apply(kind, ids.iter().map(|&id| Object { id, last_seen }));
    }

    /// Does what the publisher of changes does until nothing is left to do. Returns the changes of
    /// groups as `PATH WAS IS`.
    async fn follow(&mut self) -> Vec<String> {
        loop {
            self.view.flush();
            self.follower.follow(&self.view).await;
            if !self.follower.has_more {
                break;
            }
        }
        let mut changes = Vec::new();
        while let Ok(NextItem::Change(change)) = self.view.next_item(self.read, None) {
            self.read = change.sequence;
            if let Content::Groups(groups) = &change.content {
                changes.extend(groups.iter().map(|group| {
                    let json: Value = serde_json::from_str(&group.json).unwrap();
                    ["path", "was", "is"].map(|name| json[name].as_str().unwrap()).join(" ")
                }));
            }
        }
        changes
    }

    /// The kinds of the objects of the current definition.
    fn kinds(&self) -> Vec<ObjectKind> {
        let live = self.groups.live.read();
        let tree = &live.as_ref().unwrap().tree;
        tree.object_ids().iter().map(|id| tree.kind(tree.object(*id).unwrap())).collect()
    }

    /// When the follower acts next, in seconds after the beginning, rounded.
    fn next_due(&self) -> Option<Micros> {
        self.follower.next_due().map(|due| (due + SECOND / 2) / SECOND - BEGIN)
    }
}

#[tokio::test]
async fn nothing_is_known_before_the_table_and_the_history_were_read() {
    let mut setup = Setup::new("");
    setup.change(Kind::Online, &[1], 0);
    let mut needs_history = setup.define(PAIR).await;
    setup.follow().await;
    assert!(needs_history.try_recv().is_err(), "the table has not been read yet");
    setup.view.mark_complete();
    setup.follow().await;
    assert!(needs_history.try_recv().unwrap(), "the table does not have object 2");
    assert!(setup.groups.live.read().is_none());
    setup.send(Message::InHistory(vec![1, 2, 3])).await;
    setup.send(Message::TakeEffect).await;
    assert_eq!(setup.follow().await, [""; 0]);
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::Gone]);
}

#[tokio::test]
async fn status_changes_in_the_same_wake_up_as_the_objects() {
    let mut setup = Setup::following("", PAIR, &[1, 2]).await;
    setup.change(Kind::Gone, &[1], 0);
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    setup.change(Kind::Gone, &[2], 0);
    assert_eq!(setup.follow().await, ["pair degraded down"]);
    setup.change(Kind::Online, &[1, 2], 1);
    assert_eq!(setup.follow().await, ["pair down up"]);
}

#[tokio::test]
async fn object_is_late_two_thirds_of_its_ttl_after_its_sighting() {
    let mut setup = Setup::following("late=1", PAIR, &[1, 2]).await;
    assert_eq!(setup.next_due(), Some(20));
    setup.change(Kind::Seen, &[1], 15);
    assert_eq!(setup.follow().await, [""; 0]);
    assert_eq!(setup.next_due(), Some(20), "a sighting changes no time");
    setup.set_clock(20);
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::Late]);
    assert_eq!(setup.next_due(), Some(35));
    setup.change(Kind::Seen, &[2], 21);
    assert_eq!(setup.follow().await, ["pair degraded up"]);
    setup.set_clock(50);
    assert_eq!(setup.follow().await, ["pair up down"]);
    setup.change(Kind::Gone, &[1], 15);
    setup.change(Kind::Seen, &[2], 50);
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Gone, ObjectKind::Online]);
}

#[tokio::test]
async fn shorter_ttl_makes_objects_late() {
    let mut setup = Setup::following("", PAIR, &[1, 2]).await;
    setup.set_clock(10);
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Online; 2]);
    setup.follower.set_ttl(Duration::from_secs(15));
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Late; 2]);
    setup.follower.set_ttl(Duration::from_mins(1));
    setup.follow().await;
    assert_eq!((setup.kinds(), setup.next_due()), (vec![ObjectKind::Online; 2], Some(40)));
}

#[tokio::test]
async fn only_a_worse_status_waits_for_its_hold_time() {
    let definition = r#"{"name": "pair", "objects": [1, 2], "for": "10s"}"#;
    let mut setup = Setup::following("", definition, &[1, 2]).await;
    setup.change(Kind::Gone, &[1], 0);
    assert_eq!(setup.follow().await, [""; 0]);
    assert_eq!(setup.next_due(), Some(10));
    setup.set_clock(9);
    assert_eq!(setup.follow().await, [""; 0]);
    setup.set_clock(11);
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    setup.change(Kind::Online, &[1], 11);
    assert_eq!(setup.follow().await, ["pair degraded up"]);
    setup.change(Kind::Gone, &[1], 11);
    setup.follow().await;
    setup.change(Kind::Online, &[1], 12);
    setup.follow().await;
    setup.set_clock(30);
    assert_eq!(setup.follow().await, [""; 0], "the status recovered within the hold time");
}

#[tokio::test]
async fn objects_in_maintenance_count_as_up_until_it_ends() {
    // 10 s after the beginning.
    let definition = r#"{"name": "pair", "objects": [1, 2], "maintenance": [
        {"until": "1970-01-12T13:46:50Z", "objects": [2]}]}"#;
    let mut setup = Setup::following("", definition, &[1]).await;
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::Maintenance]);
    assert_eq!(setup.next_due(), Some(10));
    setup.set_clock(11);
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::NeverSeen]);
}

#[tokio::test]
async fn given_up_object_is_shown_until_it_is_seen() {
    let mut setup = Setup::following("", PAIR, &[1]).await;
    setup.groups.mark_given_up([1, 2, 3]);
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::GivenUp]);
    let mut needs_history = setup.define(PAIR).await;
    setup.send(Message::TakeEffect).await;
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Online, ObjectKind::GivenUp], "a new definition");
    assert!(!needs_history.try_recv().unwrap(), "the current definition has all objects");
    setup.change(Kind::Online, &[2], 1);
    setup.follow().await;
    assert_eq!(setup.kinds(), [ObjectKind::Online; 2]);
}

#[tokio::test]
async fn missed_changes_are_read_from_the_table() {
    let mut setup = Setup::following("", PAIR, &[1, 2]).await;
    setup.change(Kind::Gone, &[1], 0);
    // More changes than the ring holds.
    for seconds in 1..20_000 {
        setup.change(Kind::Seen, &[3], seconds);
        setup.change(Kind::Seen, &[2], seconds);
        setup.view.flush();
    }
    setup.read = setup.view.last();
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    assert_eq!(setup.kinds(), [ObjectKind::Gone, ObjectKind::Online]);
}

#[tokio::test]
async fn new_definition_keeps_announced_statuses_and_known_facts() {
    let mut setup = Setup::following("", PAIR, &[1, 2]).await;
    setup.change(Kind::Gone, &[1], 0);
    assert_eq!(setup.follow().await, ["pair up degraded"]);
    let trio = r#"[{"name": "pair", "objects": [1, 2, 3], "up": "any"},
                   {"name": "other", "objects": [3, 4]}]"#;
    let mut needs_history = setup.define(trio).await;
    setup.follow().await;
    assert!(needs_history.try_recv().unwrap(), "objects 3 and 4 are new");
    // The new definition does not miss changes while the history is read.
    setup.change(Kind::Online, &[3, 4], 1);
    setup.follow().await;
    setup.change(Kind::Gone, &[4], 1);
    assert_eq!(setup.follow().await, [""; 0]);
    setup.send(Message::TakeEffect).await;
    assert_eq!(setup.follow().await, ["pair degraded up"], "a new group is not announced");
    let (gone, online) = (ObjectKind::Gone, ObjectKind::Online);
    assert_eq!(setup.kinds(), [gone, online, online, gone]);
}

#[tokio::test]
async fn group_with_a_long_path_counts_but_is_not_announced() {
    let name = "n".repeat(100);
    let levels = 11;
    let open = format!(r#"{{"name": "{name}", "children": ["#).repeat(levels);
    let definition = format!(r#"{open}{{"name": "x", "objects": [1]}}{}"#, "]}".repeat(levels));
    let mut setup = Setup::following("", &definition, &[1]).await;
    setup.change(Kind::Gone, &[1], 0);
    // The paths of 10 groups have up to 1,009 bytes.
    let changes = setup.follow().await;
    assert_eq!(changes.len(), 10);
    assert!(changes.contains(&format!("{name} up down")), "{changes:?}");
}

#[tokio::test]
async fn many_objects_are_handled_in_several_wake_ups() {
    let objects: Vec<i64> = (0..100_000).collect();
    let definition = r#"{"name": "all", "objects": ["0-99999"]}"#;
    let mut setup = Setup::new("late=1");
    setup.change(Kind::Online, &objects, 0);
    setup.view.mark_complete();
    setup.define(definition).await;
    setup.send(Message::TakeEffect).await;
    setup.view.flush();
    setup.follower.follow(&setup.view).await;
    assert!(setup.groups.live.read().is_none() && setup.follower.has_more);
    setup.follow().await;
    setup.set_clock(20);
    assert_eq!(setup.follow().await, ["all up degraded", "all degraded down"]);
    assert_eq!(setup.kinds(), vec![ObjectKind::Late; 100_000]);
}
