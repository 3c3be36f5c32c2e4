//! The databases on which the shared tests run.

use std::ops::RangeInclusive;
use std::time::Duration;

use runtime::{Reloadable, Supervisor};
use store::{Config, DatabaseUrl, Object, Objects, Retention, Sighting, Store};
use testkit::{Database, Scratch};

use crate::{DEADLINE, ready, seen};

/// An empty database, deleted when dropped.
pub(crate) struct Backend {
    config: Config,
    database: Option<Database>,
    directory: Option<Scratch>,
}

impl Backend {
    pub(crate) async fn postgres() -> Self {
        let database = Database::new().await;
        let config = Config::at(database.url().parse().unwrap());
        Self { config, database: Some(database), directory: None }
    }

    pub(crate) fn sqlite() -> Self {
        let directory = Scratch::new("store");
        let config = Config::at(DatabaseUrl::file(directory.path().join("objects.db")));
        Self { config, database: None, directory: Some(directory) }
    }

    pub(crate) fn config(&self) -> Config {
        self.config.clone()
    }

    /// A store with the schema in place.
    pub(crate) async fn open(&self) -> Store {
        let store = Store::start(self.database(), "test", 8);
        ready(&store).await;
        store
    }

    /// Two stores of one process, with these values of `HISTORY_RETENTION`.
    pub(crate) async fn open_with_retentions(
        &self,
        one: Retention,
        other: Retention,
    ) -> (Store, Store) {
        let database = self.database();
        let open = |retention| {
            let database = database.clone().with_retention(Reloadable::fixed(retention));
            Store::start(database, "test", 8)
        };
        let (one, other) = (open(one), open(other));
        tokio::join!(ready(&one), ready(&other));
        (one, other)
    }

    /// Makes all changes of the history `days` older.
    pub(crate) async fn age_history(&self, days: u32) {
        if let Some(database) = &self.database {
            let sql = format!(
                "DO $$ DECLARE day date; BEGIN
                     FOR day IN SELECT DISTINCT (at AT TIME ZONE 'UTC')::date - {days} FROM presence_change LOOP
                         EXECUTE format(
                             'CREATE TABLE IF NOT EXISTS presence_change_%s PARTITION OF presence_change
                              FOR VALUES FROM (%L) TO (%L)', to_char(day, 'YYYYMMDD'),
                             day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
                     END LOOP;
                     UPDATE presence_change SET at = at - {days} * interval '24 h';
                 END $$"
            );
            sqlx::query(sqlx::AssertSqlSafe(sql)).execute(database.pool()).await.unwrap();
        }
        if let Some(directory) = &self.directory {
            let file = rusqlite::Connection::open(directory.path().join("objects.db")).unwrap();
            file.busy_timeout(DEADLINE).unwrap();
            let ms = i64::from(days) * 86_400_000;
            file.execute("UPDATE presence_change SET at = at - ?1", [ms]).unwrap();
        }
    }

    /// Two stores of one process.
    pub(crate) async fn open_two(&self) -> (Store, Store) {
        let database = self.database();
        let one = Store::start(database.clone(), "test", 8);
        let other = Store::start(database, "test", 8);
        tokio::join!(ready(&one), ready(&other));
        (one, other)
    }

    pub(crate) fn database(&self) -> store::Database {
        self.config.open(&Supervisor::default()).unwrap()
    }

    /// All committed rows, read on another connection.
    pub(crate) async fn objects(&self) -> Vec<Object> {
        let mut objects = Objects::open(&self.config).await.unwrap();
        objects.page(None, u32::MAX).await.unwrap()
    }

    pub(crate) async fn object(&self, id: i64) -> Object {
        let objects = self.objects().await;
        objects.into_iter().find(|object| object.id == id).unwrap()
    }

    /// The ids of all rows, in ascending order.
    pub(crate) async fn ids(&self) -> Vec<i64> {
        self.objects().await.iter().map(|object| object.id).collect()
    }
}

/// Records the objects `ids`, all of the same age.
pub(crate) async fn insert(store: &Store, ids: RangeInclusive<i64>, age: Duration) {
    let sightings: Vec<Sighting> = ids.map(|id| seen(id, age)).collect();
    store.record_seen(&sightings).await.unwrap();
}
