use std::time::Duration;

use store::{Failure, Sighting};
use testkit::wait_until;
use tokio::time::timeout;

use super::{age_seconds, ids, insert, open, start, waiting};
use crate::{DEADLINE, HOUR, delete_stale, ready, seen};

#[tokio::test]
async fn delete_skips_a_locked_row_without_waiting() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=3, 2 * HOUR).await;
    let mut other = database.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM object WHERE id = 2 FOR UPDATE").execute(&mut *other).await.unwrap();

    // The lock is held until after this call, so a call that waited would end in an error.
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 2);
    assert_eq!(ids(database.pool()).await, [2]);
    other.rollback().await.unwrap();
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 1);
}

#[tokio::test]
async fn stale_row_that_is_being_updated_survives() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=1, 2 * HOUR).await;
    let mut sighting = database.pool().begin().await.unwrap();
    let sql = "UPDATE object SET last_seen = now() WHERE id = 1";
    sqlx::query(sql).execute(&mut *sighting).await.unwrap();

    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 0);
    sighting.commit().await.unwrap();
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 0);
    assert_eq!(ids(database.pool()).await, [1]);
}

#[tokio::test]
async fn sighting_of_a_row_being_deleted_waits_and_inserts_it() {
    let (database, store) = open().await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let mut deletion = database.pool().begin().await.unwrap();
    sqlx::query("DELETE FROM object WHERE id = 1").execute(&mut *deletion).await.unwrap();

    // Each attempt waits for a second.
    let upsert = tokio::spawn(async move {
        loop {
            match store.record_seen(&[seen(1, Duration::ZERO)]).await {
                Err(error) if error.failure() == Failure::BusyRow => {}
                recorded => return recorded,
            }
        }
    });
    wait_until("the upsert waits for the deletion", async || waiting(database.pool()).await == 1)
        .await;
    deletion.commit().await.unwrap();
    timeout(DEADLINE, upsert).await.unwrap().unwrap().unwrap();
    assert!(age_seconds(database.pool(), 1).await < 600.0);
}

#[tokio::test]
async fn sightings_and_deletions_of_the_same_rows_all_succeed() {
    const ROWS: i64 = 3_000;
    let (database, store) = open().await;
    let online: Vec<Sighting> = (1..=ROWS).map(|id| seen(id, Duration::ZERO)).collect();
    for _ in 0..8 {
        // The rows are stored in descending order of their ids, so deletions and sightings lock
        // them in opposite orders, which would most easily deadlock.
        sqlx::query("TRUNCATE object").execute(database.pool()).await.unwrap();
        let stale = "INSERT INTO object
                     SELECT id, now() - interval '2 h' FROM generate_series($1, 1, -1) AS id";
        sqlx::query(stale).bind(ROWS).execute(database.pool()).await.unwrap();

        let record = || store.record_seen(&online);
        let delete = || delete_stale(&store, HOUR, 2_000);
        let together = async { tokio::join!(record(), delete(), record(), delete()) };
        let (one, two, three, four) = Box::pin(timeout(DEADLINE, together)).await.unwrap();
        one.and(three).unwrap();
        two.and(four).unwrap();
        assert_eq!(ids(database.pool()).await, (1..=ROWS).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn sighting_ages_while_it_waits_for_a_connection() {
    const WAIT: Duration = Duration::from_millis(300);
    let (database, _) = open().await;
    let store = start(database.url(), 1);
    ready(&store).await;
    insert(database.pool(), 1..=1, HOUR).await;
    let mut other = database.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM object WHERE id = 1 FOR UPDATE").execute(&mut *other).await.unwrap();

    let (first, second) = ([seen(1, Duration::ZERO)], [seen(2, Duration::ZERO)]);
    let (first, second, ()) =
        tokio::join!(store.record_seen(&first), store.record_seen(&second), async {
            tokio::time::sleep(WAIT).await;
            other.rollback().await.unwrap();
        });
    // On a slow machine, the first one may have timed out.
    drop(first);
    second.unwrap();
    assert!(age_seconds(database.pool(), 2).await >= WAIT.as_secs_f64());
}

// Field case 4.2
#[tokio::test]
async fn locked_row_fails_its_batch_soon_and_can_be_found() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=3, HOUR).await;
    let mut other = database.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM object WHERE id = 2 FOR UPDATE").execute(&mut *other).await.unwrap();

    let batch = [1, 2, 3, 4].map(|id| seen(id, Duration::ZERO));
    for recorded in [store.record_seen(&batch).await, store.record_seen_briefly(&batch).await] {
        let error = recorded.unwrap_err();
        assert_eq!(error.failure(), Failure::BusyRow, "{error:?}");
        assert!(!error.may_be_committed());
    }
    assert_eq!(store.find_locked(&[1, 2, 3, 4]).await.unwrap(), [2]);
    other.rollback().await.unwrap();
    assert_eq!(store.find_locked(&[1, 2, 3, 4]).await.unwrap(), [0; 0]);
    store.record_seen_briefly(&batch).await.unwrap();
    assert_eq!(ids(database.pool()).await, [1, 2, 3, 4]);
}

#[tokio::test]
async fn slow_row_times_out_and_the_connection_stays_usable() {
    let (database, store) = open().await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$;
                CREATE TRIGGER slow BEFORE INSERT ON object FOR EACH ROW WHEN (NEW.id = 2)
                EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(database.pool()).await.unwrap();
    let error = store.record_seen_briefly(&[1, 2].map(|id| seen(id, HOUR))).await.unwrap_err();
    assert_eq!(error.failure(), Failure::BusyRow, "{error:?}");
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    assert_eq!(ids(database.pool()).await, [1]);
}

#[tokio::test]
async fn stale_rows_can_be_listed_and_deleted_by_id() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=4, 2 * HOUR).await;
    insert(database.pool(), 5..=6, Duration::ZERO).await;
    let cutoff = store.now().await.unwrap().before(HOUR);
    let mut stale = store.list_stale(cutoff, 10, &[3]).await.unwrap();
    stale.sort_unstable();
    assert_eq!(stale, [1, 2, 4]);
    let gone = store.delete_stale_among(cutoff, &[1, 2, 6]).await.unwrap();
    assert_eq!(gone.len(), 2);
    assert_eq!(store.count_stale(cutoff).await.unwrap(), (2, 4));
}
