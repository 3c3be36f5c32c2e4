//! Which database, and as whom.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use sqlx::postgres::PgConnectOptions;

/// The database's settings: the contract's `POSTGRES_*`, or one URL instead of all of them.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Database")]
#[group(skip)]
pub struct Config {
    /// The database as postgres://USER:PASSWORD@HOST:PORT/DB?sslmode=…; it replaces all `POSTGRES_*`
    #[arg(long)]
    pub database_url: Option<DatabaseUrl>,
    /// The server's host name or address
    #[arg(long, default_value = "localhost")]
    pub postgres_host: String,
    /// The server's port
    #[arg(long, default_value_t = 5432)]
    pub postgres_port: u16,
    /// The role to log in as
    #[arg(long, default_value = "postgres")]
    pub postgres_user: String,
    /// The role's password
    #[arg(long, default_value = "")]
    pub postgres_password: SecretString,
    /// The database's name
    #[arg(long, default_value = "postgres")]
    pub postgres_db: String,
}

impl Config {
    /// The options to connect with. `name` is shown in `pg_stat_activity`; the server itself ends a
    /// statement after `statement_timeout`, so that it does not outlive its caller's patience.
    pub(crate) fn options(&self, name: &str, statement_timeout: Duration) -> PgConnectOptions {
        let options = if let Some(DatabaseUrl(options)) = &self.database_url {
            options.clone()
        } else {
            PgConnectOptions::new_without_pgpass()
                .host(&self.postgres_host)
                .port(self.postgres_port)
                .username(&self.postgres_user)
                .password(self.postgres_password.expose_secret())
                .database(&self.postgres_db)
        };
        let milliseconds = statement_timeout.as_millis().to_string();
        options
            .application_name(name)
            .options([("statement_timeout", milliseconds.as_str()), ("timezone", "UTC")])
    }
}

/// A `postgres://` URL. Its `Debug` and its errors leave out the user and the password.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || "expected postgres://USER:PASSWORD@HOST:PORT/DB".to_owned();
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err(expected());
        }
        text.parse().map(Self).map_err(|_| expected())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, port) = (self.0.get_host(), self.0.get_port());
        write!(formatter, "postgres://***@{host}:{port}/{}", self.0.get_database().unwrap_or(""))
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
    fn a_url_replaces_the_single_settings() {
        let cli = Cli::parse_from(["x", "--postgres-host=a", "--database-url=postgres://u@b:7/c"]);
        let options = cli.config.options("test", Duration::from_secs(1));
        assert_eq!((options.get_host(), options.get_port()), ("b", 7));
        let cli = Cli::parse_from(["x", "--postgres-host=a"]);
        assert_eq!(cli.config.options("test", Duration::from_secs(1)).get_host(), "a");
    }

    #[test]
    fn no_text_of_the_settings_shows_a_password() {
        let url = "--database-url=postgres://u:s3cret@b:7/c";
        let cli = Cli::parse_from(["x", url, "--postgres-password=s3cret"]);
        assert!(!format!("{cli:?}").contains("s3cret"));
        let error = "http://u:s3cret@b".parse::<DatabaseUrl>().unwrap_err();
        assert!(!error.contains("s3cret"));
    }
}
