//! The database's clock is set between the reading of a cleanup and its deletion.

use std::time::Duration;

use testkit::{Database, DatabaseClock};

use super::{ids, start};
use crate::{HOUR, ready, seen};

#[tokio::test]
async fn clock_set_during_a_cleanup_deletes_no_fresh_row() {
    const TTL: Duration = Duration::from_mins(10);
    let database = Database::new().await;
    ready(&start(database.url(), 1)).await;
    let clock = DatabaseClock::install(database.pool()).await;
    let store = start(database.url(), 1);
    ready(&store).await;
    for (id, behind) in [(1, HOUR), (2, Duration::ZERO)] {
        let cutoff = store.now().await.unwrap().before(TTL);
        clock.set_behind(behind).await;
        store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
        assert_eq!(store.delete_stale(cutoff, 10).await.unwrap(), [], "{behind:?}");
        assert_eq!(store.count_stale(cutoff).await.unwrap().0, 0, "{behind:?}");
        let all: Vec<i64> = (1..=id).collect();
        assert_eq!(store.list_stale(cutoff, 10, &[]).await.unwrap(), Vec::<i64>::new());
        assert_eq!(ids(database.pool()).await, all);
    }
}
