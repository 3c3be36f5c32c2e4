//! The databases on which the shared tests run.

use std::ops::RangeInclusive;
use std::time::Duration;

use runtime::Supervisor;
use store::{Config, DatabaseUrl, Object, Objects, Sighting, Store};
use testkit::{Database, Scratch};

use crate::{ready, seen};

/// An empty database, deleted when dropped.
pub(crate) struct Backend {
    config: Config,
    _database: Option<Database>,
    _directory: Option<Scratch>,
}

impl Backend {
    pub(crate) async fn postgres() -> Self {
        let database = Database::new().await;
        let config = Config::at(database.url().parse().unwrap());
        Self { config, _database: Some(database), _directory: None }
    }

    pub(crate) fn sqlite() -> Self {
        let directory = Scratch::new("store");
        let config = Config::at(DatabaseUrl::file(directory.path().join("objects.db")));
        Self { config, _database: None, _directory: Some(directory) }
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
