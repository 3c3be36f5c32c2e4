//! Publishing and receiving events, within a process and through a real broker.

mod amqp;
mod in_process;

use std::time::{Duration, SystemTime};

use messaging::events::{GivenUp, GroupChange, Kind, Notification, Object, Subscriber};
use tokio::time::timeout;

/// Far more than any wait here needs, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_secs(40);

fn object(id: i64) -> Object {
    Object { id, last_seen: SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456) }
}

fn objects(ids: impl IntoIterator<Item = i64>) -> Vec<Object> {
    ids.into_iter().map(object).collect()
}

fn given_up(id: i64) -> GivenUp {
    GivenUp { id, at: object(id).last_seen }
}

fn group_changes(count: usize) -> Vec<GroupChange> {
    let change = |group: usize| GroupChange {
        path: format!("shop/{group}"),
        was: "up".to_owned(),
        is: "down".to_owned(),
        online: 0,
        total: 1,
        because: None,
    };
    (0..count).map(change).collect()
}

async fn next(subscriber: &mut Subscriber) -> Notification {
    timeout(PATIENCE, subscriber.next()).await.unwrap()
}

async fn expect_event(subscriber: &mut Subscriber, kind: Kind, ids: impl IntoIterator<Item = i64>) {
    assert_eq!(next(subscriber).await, Notification::Committed(kind, objects(ids)));
}

/// Returns the reason of the notification.
async fn expect_missed(subscriber: &mut Subscriber) -> String {
    match next(subscriber).await {
        Notification::Missed(reason) => reason,
        other => panic!("expected Missed, got {other:?}"),
    }
}
