//! The setting `DATABASE_URL`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use runtime::settings::ServerList;
use sqlite_file::Location;
use sqlx::postgres::PgConnectOptions;

use super::Backend;
use crate::postgres::{ServerWarnings, Servers, SessionAttrs};

/// The URL of a Postgres database or a file. Its `Debug` and its errors omit the user and the
/// password.
#[derive(Clone)]
pub struct DatabaseUrl(pub(super) Backend);

impl DatabaseUrl {
    /// The table in the file at `path`. [`Config::open`](crate::Config::open) creates it.
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
        parse_servers(text).map(|servers| Self(Backend::Postgres(servers)))
    }
}

/// Parses `postgres://USER:PASSWORD@HOST:PORT,HOST:PORT/DB?target_session_attrs=…&…`. sqlx's parser
/// knows neither several hosts nor this parameter.
fn parse_servers(url: &str) -> Result<Servers, String> {
    let is_scheme = |scheme| ["postgres", "postgresql"].contains(&scheme);
    let list = ServerList::of(url).filter(|list| is_scheme(list.scheme));
    let list = list.ok_or_else(|| rejected("the text does not start with postgres://"))?;
    list.check().map_err(|reason| rejected(&reason))?;
    let (attrs, query) = take_session_attrs(list.query)?;
    let list = ServerList { query: &query, ..list };
    let parse = |position| list.parse(position, parse_server).map_err(|reason| rejected(&reason));
    let servers: Result<_, _> = (0..list.hosts.len()).map(parse).collect();
    let warnings = ServerWarnings::of_servers(list.hosts.len());
    Ok(Servers::new(servers?, attrs, warnings))
}

fn rejected(reason: &str) -> String {
    format!(
        "{reason}; expected postgres://USER:PASSWORD@HOST:PORT/DB, several HOST:PORT separated by \
         commas, or sqlite:PATH, without : or ? in PATH"
    )
}

/// Removes `target_session_attrs` from a query.
fn take_session_attrs(query: &str) -> Result<(SessionAttrs, String), String> {
    let mut attrs = SessionAttrs::default();
    let mut others = Vec::new();
    for parameter in query.split('&') {
        match parameter.strip_prefix("target_session_attrs=") {
            Some(value) => {
                attrs = value.parse().map_err(|allowed| {
                    format!("the parameter target_session_attrs is not allowed: {allowed}")
                })?;
            }
            None => others.push(parameter),
        }
    }
    Ok((attrs, others.join("&")))
}

fn parse_server(url: &str) -> Option<PgConnectOptions> {
    let options: PgConnectOptions = url.parse().ok()?;
    let host = options.get_host();
    // libpq accepts a list in the parameter `host`; sqlx would look it up as one name.
    if host.contains(',') {
        return None;
    }
    // sqlx would look up an IPv6 address in brackets as a name.
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    Some(match address.map(str::to_owned) {
        Some(address) => options.host(&address),
        None => options,
    })
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Backend::Sqlite(location) => location.fmt(formatter),
            Backend::Postgres(servers) => servers.fmt(formatter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(url: &str) -> Result<String, String> {
        url.parse::<DatabaseUrl>().map(|url| format!("{url:?}"))
    }

    #[test]
    fn scheme_selects_the_backend() {
        for (url, is_file) in [
            ("sqlite:data/objects.db", true),
            ("postgres://b/c", false),
            ("postgresql://b/c", false),
        ] {
            let DatabaseUrl(backend) = url.parse().unwrap();
            assert_eq!(matches!(backend, Backend::Sqlite(_)), is_file, "{url}");
        }
        for url in ["sqlite::memory:", "sqlite:", "mysql://b/c", "objects.db", ""] {
            assert!(shown(url).is_err(), "{url}");
        }
    }

    #[test]
    fn several_hosts_and_their_attributes_are_read() {
        for (url, text) in [
            ("postgres://a/db", "postgres://***@a:5432/db"),
            ("postgres://u:p@a:1,b:2/db", "postgres://***@a:1,b:2/db"),
            ("postgres://u@a, b:2/db?sslmode=require", "postgres://***@a:5432,b:2/db"),
            ("postgres://u:p@[::1]:1,[fd00::1]/db", "postgres://***@[::1]:1,[fd00::1]:5432/db"),
            ("postgres://u:p,q@a,b/db", "postgres://***@a:5432,b:5432/db"),
            ("postgres://a/db?target_session_attrs=any", "postgres://***@a:5432/db"),
            (
                "postgres://a,b/db?sslmode=require&target_session_attrs=standby",
                "postgres://***@a:5432,b:5432/db?target_session_attrs=standby",
            ),
        ] {
            assert_eq!(shown(url).unwrap(), text, "{url}");
        }
    }

    #[test]
    fn each_server_gets_the_other_parts_of_the_url() {
        let url = "postgres://u:p%2Cq@a,b/db?target_session_attrs=primary&sslmode=require";
        let servers = parse_servers(url).unwrap();
        for server in [0, 1] {
            let options = servers.options(server);
            let parts = (options.get_username(), options.get_database());
            assert_eq!(parts, ("u", Some("db")));
            assert!(matches!(options.get_ssl_mode(), sqlx::postgres::PgSslMode::Require));
            assert!(format!("{options:?}").contains("\"p,q\""));
        }
    }

    #[test]
    fn unusable_lists_are_rejected_with_what_is_allowed() {
        for (url, reason) in [
            ("postgres://a,/db", "host 2 of 2 is empty"),
            ("postgres://,a/db", "host 1 of 2 is empty"),
            ("postgres://a,:1/db", "host 2 of 2 is empty"),
            ("postgres://a,b:x/db", "the port of host 2 of 2 is not a number from 1 to 65535"),
            ("postgres://a:99999/db", "the port of the host is not a number from 1 to 65535"),
            ("postgres://a,b c/db", "host 2 of 2 is not a host name or an address"),
            ("postgres://u:%ff@a/db", "the user or the password is not percent-encoded UTF-8"),
            ("postgres://a/db?sslmode=x", "a parameter after the ? has a value that is not"),
            ("mysql://a/db", "the text does not start with postgres://"),
        ] {
            let error = shown(url).unwrap_err();
            assert!(error.starts_with(reason) && error.contains("several HOST:PORT"), "{error}");
        }
        assert!(shown("postgres:///db?host=a,b").is_err());
        let error = shown("postgres://a/db?target_session_attrs=master").unwrap_err();
        assert!(error.contains("read-write") && !error.contains("master"), "{error}");
    }

    #[test]
    fn debug_and_errors_do_not_contain_the_password() {
        assert!(!shown("postgres://u:s3cret@a,b:7/c").unwrap().contains("s3cret"));
        for url in ["http://u:s3cret@b", "postgres://u:s3cret@b:none/c", "postgres://u:s3cret@a,,b"]
        {
            assert!(!shown(url).unwrap_err().contains("s3cret"), "{url}");
        }
    }
}
