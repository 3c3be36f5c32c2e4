//! The history and its feed while everything that writes or reads them is killed.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use sqlx::PgPool;
use testkit::{http_get, viewer_address, wait_for};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::rows;
use crate::setup::Setup;
use crate::world::World;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new("history_exact", history_exact).fault(
        "consumer, routine, database and viewer killed -9 ten times each, while a client that reconnects at random reads the feed",
    )]
}

const KILLS: u32 = 10;

/// Independent records of each inserted and deleted row.
const RECORD_PRESENCE: &str = "
    CREATE TABLE recorded (n bigserial, id bigint, is_online boolean);
    CREATE FUNCTION record_presence() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO recorded (id, is_online) VALUES (coalesce(NEW.id, OLD.id), TG_OP = 'INSERT');
        RETURN NULL;
    END $$;
    CREATE TRIGGER record_presence AFTER INSERT OR DELETE ON object
        FOR EACH ROW EXECUTE FUNCTION record_presence()";

/// The changes that only one of the history and the records has, and the number of all changes.
const COMPARE: &str = "
    SELECT count(*) FILTER (WHERE history.id IS NULL OR recorded.id IS NULL), count(*)
    FROM (SELECT object_id AS id, is_online, row_number() OVER (PARTITION BY object_id ORDER BY position) AS place
          FROM presence_change) AS history
    FULL JOIN (SELECT id, is_online, row_number() OVER (PARTITION BY id ORDER BY n) AS place
               FROM recorded) AS recorded
    USING (id, is_online, place)";

async fn history_exact() -> Verdict {
    let routine = vec![("OBJECT_TTL", "2s"), ("ROUTINE_INTERVAL", "100ms")];
    let mut world = World::start(Setup { routine, ..Setup::default() }).await;
    let recording = sqlx::raw_sql(RECORD_PRESENCE).execute(world.database.pool()).await;
    recording.expect("the table should accept a trigger");
    rows::record_deletions(world.database.pool()).await;
    let (address, addresses) = watch::channel(None);
    start_viewer(&mut world, &address).await;
    let reader = FeedReader::start(addresses);
    world.start_load().await;
    for _ in 0..KILLS {
        world.consumers.remove(0).kill();
        world.consumers.push(world.spawn_consumer());
        world.wait_until_ready().await;
        world.routine().kill();
        world.routine = Some(world.spawn_routine());
        world.wait_until_ready().await;
        start_viewer(&mut world, &address).await;
        world.database.kill().await;
        world.database.boot().await;
        world.wait_until_ready().await;
    }
    world.wait_for_recovery().await;

    let pool = world.database.pool().clone();
    let (differences, all): (i64, i64) =
        sqlx::query_as(COMPARE).fetch_one(&pool).await.expect("the history should be readable");
    let (count, is_equal) = reader.compare(&pool).await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    println!("the history has {all} changes; the client has read {count}");
    let breach = format!("{differences} of {all} changes are missing, repeated or out of order");
    verdict.require(differences == 0, breach);
    verdict.require(count > 1_000, format!("only {count} changes were read"));
    verdict.require(is_equal, "the feed differs from the history".to_owned());
    verdict
}

/// Starts a viewer in place of the former one, which is killed.
async fn start_viewer(world: &mut World, address: &watch::Sender<Option<SocketAddr>>) {
    if let Some(former) = world.viewer.take() {
        former.kill();
    }
    let viewer = world.viewer.insert(world.spawn_viewer());
    viewer.ready().await;
    address.send_replace(Some(viewer_address(viewer).await));
}

/// A client that follows the feed. After each response it may use another connection, and it asks
/// for another number of changes.
struct FeedReader {
    read: watch::Receiver<Vec<(i64, i64, bool)>>,
    task: JoinHandle<()>,
}

impl FeedReader {
    fn start(addresses: watch::Receiver<Option<SocketAddr>>) -> Self {
        let (sender, read) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            let mut cursor = "0".to_owned();
            for limit in (1_usize..).map(|request| 1 + request * 37 % 400) {
                let address = *addresses.borrow();
                let page = match address {
                    Some(address) => page(address, &cursor, limit).await,
                    None => None,
                };
                let Some((next, changes)) = page else {
                    // The viewer or its database is away.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                if changes.is_empty() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                cursor = next;
                sender.send_modify(|read| read.extend(changes));
            }
        });
        Self { read, task }
    }

    /// Waits until all changes that are committed now have been read. Returns the number of read
    /// changes, and whether they are those of the history, in the same order.
    async fn compare(self, pool: &PgPool) -> (usize, bool) {
        let all = "SELECT position, object_id, is_online FROM presence_change ORDER BY position";
        let committed: Vec<(i64, i64, bool)> =
            sqlx::query_as(all).fetch_all(pool).await.expect("the history should be readable");
        let last = committed.last().map_or(0, |(position, ..)| *position);
        let read = wait_for("the client has read all changes", async || {
            let read = self.read.borrow().clone();
            let is_complete = read.last().is_some_and(|(position, ..)| *position >= last);
            is_complete.then_some(read)
        })
        .await;
        self.task.abort();
        // An earlier position may have been committed after the query.
        let known: Vec<_> = committed.iter().map(|(position, ..)| *position).collect();
        let read: Vec<_> = read.into_iter().filter(|(position, ..)| *position <= last).collect();
        let is_equal = read.iter().is_sorted_by(|(one, ..), (other, ..)| one < other)
            && read.iter().filter(|change| known.binary_search(&change.0).is_ok()).eq(&committed);
        (read.len(), is_equal)
    }
}

/// The next cursor and the changes after this one; `None` if the viewer does not answer.
async fn page(
    viewer: SocketAddr,
    after: &str,
    limit: usize,
) -> Option<(String, Vec<(i64, i64, bool)>)> {
    let response = http_get(viewer, &format!("/changes?after={after}&limit={limit}")).await.ok()?;
    if response.status != 200 {
        return None;
    }
    let page: Value = serde_json::from_str(&response.body).ok()?;
    let change = |change: &Value| {
        let number = |field: &str| change[field].as_str()?.parse().ok();
        Some((number("cursor")?, number("id")?, change["kind"].as_str()? == "online"))
    };
    let changes: Option<Vec<_>> = page["changes"].as_array()?.iter().map(change).collect();
    Some((page["next"].as_str()?.to_owned(), changes?))
}
