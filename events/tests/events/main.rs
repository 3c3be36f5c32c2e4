//! Telling and hearing, within a process and over a real broker. One binary, because each takes seconds
//! to link.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests are tests as well")]

mod in_process;
mod rabbit;

use std::time::{Duration, SystemTime};

use events::{Kind, Notice, Object, Subscriber};
use tokio::time::timeout;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_secs(40);

fn object(id: i64) -> Object {
    Object { id, last_seen: SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456) }
}

fn objects(ids: impl IntoIterator<Item = i64>) -> Vec<Object> {
    ids.into_iter().map(object).collect()
}

async fn next(subscriber: &mut Subscriber) -> Notice {
    timeout(PATIENCE, subscriber.next()).await.unwrap()
}

async fn hears(subscriber: &mut Subscriber, kind: Kind, ids: impl IntoIterator<Item = i64>) {
    assert_eq!(next(subscriber).await, Notice::Committed(kind, objects(ids)));
}

async fn is_told_it_missed(subscriber: &mut Subscriber) -> String {
    match next(subscriber).await {
        Notice::Missed(why) => why,
        heard @ Notice::Committed(..) => panic!("not a word of what was missed, but {heard:?}"),
    }
}
