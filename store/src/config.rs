//! The settings of the database connection.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use embedded::{File, Location};
use secrecy::{ExposeSecret as _, SecretString};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::sync::watch;

use crate::sqlite::Table;
use crate::{StoreError, StoreStatus, TimeZone};

// The defaults of `POSTGRES_*`.
const HOST: &str = "localhost";
const PORT: u16 = 5432;
const USER: &str = "postgres";
const PASSWORD: &str = "";
const DB: &str = "postgres";

/// The settings of the database: `POSTGRES_*`, or one URL instead of all of them. If it is a file,
/// clones of a value share the opened file.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Database")]
#[group(skip)]
pub struct Config {
    /// URL of the database: postgres://USER:PASSWORD@HOST:PORT/DB?sslmode=…, which replaces all
    /// `POSTGRES_*`; or sqlite:PATH, a table in a file for one process
    #[arg(long)]
    pub database_url: Option<DatabaseUrl>,
    /// Host name or address of the server
    #[arg(long, default_value = HOST)]
    pub postgres_host: String,
    /// Port of the server
    #[arg(long, value_parser = port, default_value_t = PORT)]
    pub postgres_port: u16,
    /// Role to log in as
    #[arg(long, default_value = USER)]
    pub postgres_user: String,
    /// Password of the role
    #[arg(long, default_value = PASSWORD)]
    pub postgres_password: SecretString,
    /// Name of the database
    #[arg(long, default_value = DB)]
    pub postgres_db: String,
    /// TLS mode, as in libpq: disable, prefer, require, verify-ca or verify-full [default: prefer]
    #[arg(long, value_parser = ssl_mode)]
    pub postgres_sslmode: Option<PgSslMode>,
    /// PEM file of certificate authorities to trust in addition to those of the system
    #[arg(long)]
    pub postgres_sslrootcert: Option<String>,
    /// Time zone of the log, and of a column `last_seen` without time zone, as in the Go services'
    /// table, such as Europe/Berlin [default: the machine's]
    #[arg(long)]
    pub tz: Option<TimeZone>,
}

impl Config {
    /// The settings for the database at `url`.
    #[must_use]
    pub fn at(url: DatabaseUrl) -> Self {
        Self {
            database_url: Some(url),
            postgres_host: HOST.to_owned(),
            postgres_port: PORT,
            postgres_user: USER.to_owned(),
            postgres_password: PASSWORD.into(),
            postgres_db: DB.to_owned(),
            postgres_sslmode: None,
            postgres_sslrootcert: None,
            tz: None,
        }
    }

    /// Opens the file if the table is in one. While the claim is held, all clones of these settings
    /// share the opened file, so a process can check the file before it starts anything else.
    ///
    /// # Errors
    /// [`StoreError::Open`], such as with [`embedded::OpenError::InUse`].
    pub fn claim(&self) -> Result<Claim, StoreError> {
        let table = match self.backend() {
            Backend::Postgres(_) => None,
            Backend::Sqlite(location) => Some(Table::open(&location)?),
        };
        Ok(Claim { table })
    }

    /// The time zone of a column `last_seen` without time zone.
    pub(crate) fn time_zone(&self) -> TimeZone {
        self.tz.clone().unwrap_or_else(TimeZone::of_the_machine)
    }

    /// The database that the settings name.
    pub(crate) fn backend(&self) -> Backend {
        if let Some(DatabaseUrl(backend)) = &self.database_url {
            return backend.clone();
        }
        let mut options = PgConnectOptions::new_without_pgpass()
            .host(&self.postgres_host)
            .port(self.postgres_port)
            .username(&self.postgres_user)
            .password(self.postgres_password.expose_secret())
            .database(&self.postgres_db);
        if let Some(mode) = self.postgres_sslmode {
            options = options.ssl_mode(mode);
        }
        if let Some(certificates) = &self.postgres_sslrootcert {
            options = options.ssl_root_cert(certificates);
        }
        Backend::Postgres(Box::new(options))
    }
}

/// Parses a port, or `tcp://ADDRESS:PORT`: Kubernetes sets `POSTGRES_PORT` to that in every pod if
/// a service is called `postgres`.
fn port(text: &str) -> Result<u16, String> {
    let text = text.trim();
    let digits = match text.strip_prefix("tcp://") {
        Some(address) => address.rsplit_once(':').map_or("", |(_, port)| port),
        None => text,
    };
    let port = digits.parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| {
        "expected a port from 1 to 65535, or tcp://ADDRESS:PORT as Kubernetes sets it".to_owned()
    })
}

/// Parses libpq's modes except `allow`, with which sqlx never uses TLS.
fn ssl_mode(text: &str) -> Result<PgSslMode, String> {
    let modes = ["disable", "prefer", "require", "verify-ca", "verify-full"];
    let mode = modes.contains(&text).then(|| text.parse().ok()).flatten();
    mode.ok_or_else(|| format!("expected one of {}", modes.join(", ")))
}

/// The opened file of the table, if it is in one; see [`Config::claim`].
pub struct Claim {
    table: Option<Table>,
}

impl Claim {
    /// `Err` with the path and what to do while a damaged file is kept beside this one. `None` if
    /// the table is not in a file.
    #[must_use]
    pub fn kept(&self) -> Option<watch::Receiver<StoreStatus>> {
        self.table.as_ref().map(Table::kept)
    }

    /// Closes the file, unless another part of this process has it open.
    pub async fn close(self) {
        if let Some(table) = self.table {
            table.close().await;
        }
    }
}

/// The URL of a Postgres database or a file. Its `Debug` and its errors omit the user and the
/// password. If it is a file, clones of a value share the opened file.
#[derive(Clone)]
pub struct DatabaseUrl(Backend);

/// The database that a [`DatabaseUrl`] names.
#[derive(Clone)]
pub(crate) enum Backend {
    Postgres(Box<PgConnectOptions>),
    Sqlite(Location<File>),
}

impl DatabaseUrl {
    /// The table in the file at `path`. The first [`crate::Store`] creates the file.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self(Backend::Sqlite(Location::new(path)))
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(location) = Location::from_url(text) {
            return Ok(Self(Backend::Sqlite(location)));
        }
        let expected = || {
            "expected postgres://USER:PASSWORD@HOST:PORT/DB or sqlite:PATH, without : or ? in PATH"
                .to_owned()
        };
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err(expected());
        }
        text.parse()
            .map(|options| Self(Backend::Postgres(Box::new(options))))
            .map_err(|_| expected())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Backend::Sqlite(location) => location.fmt(formatter),
            Backend::Postgres(options) => {
                let (host, port) = (options.get_host(), options.get_port());
                let database = options.get_database().unwrap_or("");
                write!(formatter, "postgres://***@{host}:{port}/{database}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    #[test]
    fn url_replaces_the_single_settings() {
        let cli = Cli::parse_from(["x", "--postgres-host=a", "--database-url=postgres://u@b:7/c"]);
        assert_eq!(host_and_port(&cli.config), Some(("b".to_owned(), 7)));
        let cli = Cli::parse_from(["x", "--postgres-host=a"]);
        assert_eq!(host_and_port(&cli.config), Some(("a".to_owned(), 5432)));
        let cli = Cli::parse_from(["x", "--postgres-host=a", "--database-url=sqlite:objects.db"]);
        assert_eq!(host_and_port(&cli.config), None);
    }

    /// Field case 6.6.
    #[test]
    fn port_is_read_from_a_kubernetes_service_link() {
        assert_eq!(port("5433"), Ok(5433));
        assert_eq!(port("tcp://10.96.0.12:5432"), Ok(5432));
        assert_eq!(port("tcp://[fd00::12]:5432"), Ok(5432));
        for text in
            ["", "0", "65536", "-1", "tcp://10.96.0.12", "tcp://10.96.0.12:", "udp://10.96.0.12:53"]
        {
            assert!(
                port(text).unwrap_err().starts_with("expected a port from 1 to 65535"),
                "{text}"
            );
        }
    }

    #[test]
    fn url_scheme_selects_the_backend() {
        for (url, is_file) in [
            ("sqlite:data/objects.db", true),
            ("postgres://b/c", false),
            ("postgresql://b/c", false),
        ] {
            let DatabaseUrl(backend) = url.parse().unwrap();
            assert_eq!(matches!(backend, Backend::Sqlite(_)), is_file, "{url}");
        }
        for url in ["sqlite::memory:", "sqlite:", "mysql://b/c", "objects.db", ""] {
            assert!(url.parse::<DatabaseUrl>().is_err(), "{url}");
        }
    }

    #[test]
    fn debug_and_errors_do_not_contain_the_password() {
        let url = "--database-url=postgres://u:s3cret@b:7/c";
        let cli = Cli::parse_from(["x", url, "--postgres-password=s3cret"]);
        assert!(!format!("{cli:?}").contains("s3cret"));
        for url in ["http://u:s3cret@b", "postgres://u:s3cret@b:none/c"] {
            assert!(!url.parse::<DatabaseUrl>().unwrap_err().contains("s3cret"), "{url}");
        }
    }

    fn host_and_port(config: &Config) -> Option<(String, u16)> {
        match config.backend() {
            Backend::Postgres(options) => Some((options.get_host().into(), options.get_port())),
            Backend::Sqlite(_) => None,
        }
    }
}
