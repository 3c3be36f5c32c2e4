//! The database, opened for the roles of a process.

use runtime::{Reloadable, Status, Supervisor};
use sqlite_file::OpenError;
use tokio::sync::watch;

use crate::config::{self, Config};
use crate::postgres::Servers;
use crate::sqlite::Table;
use crate::{Retention, TimeZone};

/// A Postgres database, which may be away, or the open SQLite file that holds the table. Clones
/// share the file. The file is closed when all clones, and all stores started from them, are
/// dropped.
#[derive(Clone)]
pub struct Database {
    pub(crate) backend: Backend,
    pub(crate) supervisor: Supervisor,
    pub(crate) retention: Reloadable<Retention>,
}

#[derive(Clone)]
pub(crate) enum Backend {
    Postgres(Servers, TimeZone),
    Sqlite(Table),
}

impl Config {
    /// If the table is in a file, opens or creates the file and checks it for damage, which blocks
    /// the thread for up to a second. `supervisor` supervises the thread that writes the file, and
    /// the monitors of the stores of this database.
    ///
    /// # Errors
    /// [`OpenError`], such as [`OpenError::InUse`]. The file is then unchanged.
    pub fn open(&self, supervisor: &Supervisor) -> Result<Database, OpenError> {
        let backend = match self.backend() {
            config::Backend::Postgres(servers) => Backend::Postgres(servers, self.time_zone()),
            config::Backend::Sqlite(location) => {
                Backend::Sqlite(Table::open(location.path(), supervisor)?)
            }
        };
        let retention = Reloadable::fixed(self.history);
        Ok(Database { backend, supervisor: supervisor.clone(), retention })
    }
}

impl Database {
    /// Lets `HISTORY_RETENTION` change at run time.
    #[must_use]
    pub fn with_retention(self, retention: Reloadable<Retention>) -> Self {
        Self { retention, ..self }
    }

    /// The status is `Err` while a damaged file is kept beside this one. The error contains the
    /// path of the damaged file and what to do with it. Returns `None` if the table is in Postgres.
    #[must_use]
    pub fn kept(&self) -> Option<watch::Receiver<Status>> {
        match &self.backend {
            Backend::Postgres(..) => None,
            Backend::Sqlite(table) => Some(table.kept()),
        }
    }

    /// Closes the file, unless another role of this process has it open.
    pub async fn close(self) {
        if let Backend::Sqlite(table) = self.backend {
            table.close().await;
        }
    }
}
