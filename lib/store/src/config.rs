//! The settings of the database connection.

mod addresses;
mod database_url;

use secrecy::{ExposeSecret as _, SecretString};
use sqlite_file::Location;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::postgres::{Servers, SessionAttrs};
use crate::{Retention, TimeZone};

pub use addresses::Addresses;
pub use database_url::DatabaseUrl;

// The defaults of `POSTGRES_*`.
const USER: &str = "postgres";
const PASSWORD: &str = "";
const DB: &str = "postgres";

/// The settings of the database: `POSTGRES_*`, or one URL instead of all of them.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Database")]
#[group(skip)]
pub struct Config {
    /// URL of the database: postgres://USER:PASSWORD@HOST:PORT/DB?sslmode=…, which replaces all
    /// `POSTGRES_*` and may list several HOST:PORT; or sqlite:PATH, a table in a file for one
    /// process
    #[arg(long)]
    pub database_url: Option<DatabaseUrl>,
    /// Hosts and ports of the servers.
    #[command(flatten)]
    pub postgres_addresses: Addresses,
    /// Server to read from, as in libpq: any, read-write, read-only, primary, standby or
    /// prefer-standby. Writers always use one that accepts writes
    #[arg(long, default_value_t)]
    pub postgres_target_session_attrs: SessionAttrs,
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
    /// Time zone, such as Europe/Berlin, of the log and of a column `last_seen` without time zone,
    /// which the Go services' table has [default: the machine's]
    #[arg(long)]
    pub tz: Option<TimeZone>,
    /// How long the history is kept.
    #[command(flatten)]
    pub history: Retention,
}

impl Config {
    /// The settings for the database at `url`.
    #[must_use]
    pub fn at(url: DatabaseUrl) -> Self {
        Self {
            database_url: Some(url),
            postgres_addresses: Addresses::default(),
            postgres_target_session_attrs: SessionAttrs::default(),
            postgres_user: USER.to_owned(),
            postgres_password: PASSWORD.into(),
            postgres_db: DB.to_owned(),
            postgres_sslmode: None,
            postgres_sslrootcert: None,
            tz: None,
            history: Retention::default(),
        }
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
            .username(&self.postgres_user)
            .password(self.postgres_password.expose_secret())
            .database(&self.postgres_db);
        if let Some(mode) = self.postgres_sslmode {
            options = options.ssl_mode(mode);
        }
        if let Some(certificates) = &self.postgres_sslrootcert {
            options = options.ssl_root_cert(certificates);
        }
        let at = |(host, port)| options.clone().host(host).port(port);
        let servers = self.postgres_addresses.iter().map(at).collect();
        let warnings = self.postgres_addresses.warnings();
        Backend::Postgres(Servers::new(servers, self.postgres_target_session_attrs, warnings))
    }
}

/// Parses the modes of libpq except `allow`: with that mode, sqlx never uses TLS.
fn ssl_mode(text: &str) -> Result<PgSslMode, String> {
    let modes = ["disable", "prefer", "require", "verify-ca", "verify-full"];
    let mode = modes.contains(&text).then(|| text.parse().ok()).flatten();
    mode.ok_or_else(|| format!("expected one of {}", modes.join(", ")))
}

/// The database that the settings name.
#[derive(Clone)]
pub(crate) enum Backend {
    Postgres(Servers),
    Sqlite(Location),
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

    fn backend(arguments: &[&str]) -> String {
        let cli = Cli::parse_from(["x"].iter().chain(arguments));
        match cli.config.backend() {
            Backend::Postgres(servers) => format!("{servers:?}"),
            Backend::Sqlite(location) => format!("{location:?}"),
        }
    }

    #[test]
    fn single_settings_name_all_servers() {
        assert_eq!(backend(&[]), "postgres://***@localhost:5432/postgres");
        assert_eq!(
            backend(&[
                "--postgres-host=a,::1",
                "--postgres-port=1,2",
                "--postgres-db=db",
                "--postgres-target-session-attrs=prefer-standby",
            ]),
            "postgres://***@a:1,[::1]:2/db?target_session_attrs=prefer-standby"
        );
    }

    #[test]
    fn url_replaces_the_individual_settings() {
        let single = ["--postgres-host=a", "--postgres-target-session-attrs=standby"];
        let with = |url| backend(&[single[0], single[1], url]);
        assert_eq!(with("--database-url=postgres://u@b:7/c"), "postgres://***@b:7/c");
        assert!(with("--database-url=sqlite:objects.db").contains("objects.db"));
    }

    #[test]
    fn debug_does_not_contain_the_password() {
        let url = "--database-url=postgres://u:s3cret@b:7/c";
        let cli = Cli::parse_from(["x", url, "--postgres-password=s3cret"]);
        assert!(!format!("{cli:?}").contains("s3cret"));
    }
}
