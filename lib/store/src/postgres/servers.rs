//! The servers of one database, of which one is used at a time.
//!
//! Decision: docs/decisions/0077-how-is-the-postgres-server-chosen.md

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use runtime::{LogLimiter, Success, Unusable, first_success};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, FromRow as _, PgConnection};

use super::sql;
use crate::StoreError;
use crate::deadline::{CONNECT_TIMEOUT, within};

/// How long one server may take to accept a connection before the next one is tried too.
const PATIENCE: Duration = Duration::from_secs(1);
/// The minimum time between two warnings about one server.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// Which of the servers may be used: libpq's `target_session_attrs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionAttrs {
    /// Any server, without a check.
    #[default]
    Any,
    /// A server that accepts writes.
    ReadWrite,
    /// A server that accepts no writes: a standby, or a primary that was made read-only.
    ReadOnly,
    /// A server that is no standby, even if it was made read-only.
    Primary,
    /// A standby.
    Standby,
    /// A standby if there is one, otherwise any server.
    PreferStandby,
}

impl SessionAttrs {
    const ALL: [Self; 6] = [
        Self::Any,
        Self::ReadWrite,
        Self::ReadOnly,
        Self::Primary,
        Self::Standby,
        Self::PreferStandby,
    ];

    fn allow(self, state: ServerState) -> bool {
        match self {
            Self::Any | Self::PreferStandby => true,
            Self::ReadWrite => state == ServerState::ReadWrite,
            Self::ReadOnly => state != ServerState::ReadWrite,
            Self::Primary => state != ServerState::Standby,
            Self::Standby => state == ServerState::Standby,
        }
    }
}

impl fmt::Display for SessionAttrs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Any => "any",
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::PreferStandby => "prefer-standby",
        })
    }
}

impl FromStr for SessionAttrs {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|attrs| attrs.to_string() == text)
            .ok_or("expected any, read-write, read-only, primary, standby or prefer-standby")
    }
}

/// Whether a server accepts writes, by its own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerState {
    /// It accepts writes.
    ReadWrite,
    /// It is no standby, but was made read-only.
    ReadOnly,
    /// It is a standby, which accepts no writes until it is promoted.
    Standby,
}

impl ServerState {
    /// Reads the state with one statement, so that a pooler cannot answer from two servers.
    pub(super) async fn read(session: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let row = sqlx::raw_sql(sql::SERVER_STATE).fetch_one(session).await?;
        Ok(match <(bool, bool)>::from_row(&row)? {
            (true, _) => Self::Standby,
            (false, true) => Self::ReadOnly,
            (false, false) => Self::ReadWrite,
        })
    }
}

impl fmt::Display for ServerState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Standby => "a read-only standby",
        })
    }
}

/// The servers of one database, at least one, and which of them may be used.
#[derive(Clone)]
pub(crate) struct Servers {
    all: Vec<PgConnectOptions>,
    wanted: SessionAttrs,
    warnings: ServerWarnings,
}

/// Limits the warnings about each server. It is created with the settings, so that all connections
/// of the process share it.
#[derive(Clone, Debug)]
pub(crate) struct ServerWarnings(Arc<[LogLimiter]>);

impl ServerWarnings {
    pub(crate) fn of_servers(count: usize) -> Self {
        Self((0..count).map(|_| LogLimiter::new(WARNING_INTERVAL)).collect())
    }

    fn may_log(&self, server: usize) -> bool {
        self.0.get(server).is_some_and(|limiter| limiter.count().is_some())
    }
}

impl Servers {
    /// `warnings` has one entry for each server.
    pub(crate) fn new(
        all: Vec<PgConnectOptions>,
        wanted: SessionAttrs,
        warnings: ServerWarnings,
    ) -> Self {
        Self { all, wanted, warnings }
    }

    /// The same servers for connections that `pg_stat_activity` shows as `name`.
    ///
    /// The options are limited to those that every pooler knows. All others are set with each
    /// statement.
    pub(crate) fn named(mut self, name: &str) -> Self {
        let named =
            |options: PgConnectOptions| options.application_name(name).extra_float_digits(None);
        self.all = self.all.into_iter().map(named).collect();
        self
    }

    /// The same servers for a writer, which can use only one that accepts writes.
    pub(super) fn for_writes(self) -> Self {
        Self { wanted: SessionAttrs::ReadWrite, ..self }
    }

    /// How to connect to one of them.
    pub(crate) fn options(&self, server: usize) -> &PgConnectOptions {
        &self.all[server]
    }

    /// The address of one of them, for people.
    pub(super) fn address(&self, server: usize) -> String {
        address(&self.all[server])
    }

    /// Connects to a server that may be used, and returns its index. It tries them in order,
    /// beginning with `first`.
    ///
    /// # Errors
    /// The error of the server if there is only one. Otherwise [`StoreError::Connect`], which says
    /// why each server cannot be used. Both come within [`CONNECT_TIMEOUT`] and [`PATIENCE`] for
    /// each further server; with `prefer-standby`, within twice that.
    pub(crate) async fn connect(&self, first: usize) -> Result<(usize, PgConnection), StoreError> {
        if self.wanted == SessionAttrs::PreferStandby
            && let Ok(connected) = self.connect_to_any(first, SessionAttrs::Standby).await
        {
            return Ok(connected);
        }
        self.connect_to_any(first, self.wanted).await
    }

    async fn connect_to_any(
        &self,
        first: usize,
        wanted: SessionAttrs,
    ) -> Result<(usize, PgConnection), StoreError> {
        let count = self.all.len();
        let in_order: Vec<_> = (0..count).cycle().skip(first).take(count).collect();
        let attempt = async |server| match connect(self.options(server), wanted).await {
            Ok(session) => Ok((server, session)),
            Err(error) => Err(error),
        };
        let attempts: Vec<_> = in_order.iter().map(|server| attempt(*server).boxed()).collect();
        match first_success(attempts, PATIENCE).await {
            Ok(Success { value, unusable }) => {
                for (position, reason) in unusable {
                    self.warn_unusable(in_order[position], &reason);
                }
                Ok(value)
            }
            Err(errors) => {
                let by_server = errors.into_iter().map(|(at, error)| (in_order[at], error));
                Err(self.join(by_server.collect(), wanted))
            }
        }
    }

    /// Logs that a server cannot be used although another one is connected.
    fn warn_unusable(&self, server: usize, reason: &Unusable<StoreError>) {
        // In a healthy cluster, the servers differ in whether they accept writes.
        let is_expected = matches!(reason, Unusable::Failed(StoreError::Unsuitable(_)));
        if !is_expected && self.warnings.may_log(server) {
            tracing::warn!(
                server = self.address(server),
                %reason,
                "a listed database server cannot be used; connected to another one"
            );
        }
    }

    /// One error for the errors of all servers, which it lists in the order of the settings: the
    /// text of an outage that lasts must not change with each attempt.
    fn join(&self, mut errors: Vec<(usize, StoreError)>, wanted: SessionAttrs) -> StoreError {
        if errors.len() == 1
            && let Some((_, error)) = errors.pop()
        {
            return error;
        }
        errors.sort_by_key(|(server, _)| *server);
        let reasons = errors.iter().map(|(server, error)| {
            let address = self.address(*server);
            match error {
                StoreError::Unsuitable(state) => format!("{address} is {state}"),
                StoreError::Connect(cause) => format!("{address}: {cause}"),
                other => format!("{address}: {other}"),
            }
        });
        let reasons = reasons.collect::<Vec<_>>().join("; ");
        StoreError::Connect(match wanted {
            SessionAttrs::Any | SessionAttrs::PreferStandby => {
                format!("no server: {reasons}").into()
            }
            _ => format!("no {wanted} server: {reasons}").into(),
        })
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.all.iter().map(address).collect::<Vec<_>>().join(",");
        let database = self.all.first().and_then(PgConnectOptions::get_database).unwrap_or("");
        write!(formatter, "postgres://***@{addresses}/{database}")?;
        match self.wanted {
            SessionAttrs::Any => Ok(()),
            wanted => write!(formatter, "?target_session_attrs={wanted}"),
        }
    }
}

/// Connects to one server, and checks that it may be used.
async fn connect(
    options: &PgConnectOptions,
    wanted: SessionAttrs,
) -> Result<PgConnection, StoreError> {
    let connecting = async {
        let mut session = options.connect().await?;
        let state = match wanted {
            SessionAttrs::Any | SessionAttrs::PreferStandby => None,
            _ => Some(ServerState::read(&mut session).await?),
        };
        Ok::<_, sqlx::Error>((session, state))
    };
    match within(CONNECT_TIMEOUT, StoreError::Connect, connecting).await? {
        (_, Some(state)) if !wanted.allow(state) => Err(StoreError::Unsuitable(state)),
        (session, _) => Ok(session),
    }
}

fn address(options: &PgConnectOptions) -> String {
    let (host, port) = (options.get_host(), options.get_port());
    match options.get_socket() {
        Some(socket) => format!("{}:{port}", socket.display()),
        None if host.contains(':') => format!("[{host}]:{port}"),
        None => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_mean_the_same_as_in_libpq() {
        use ServerState::{ReadOnly, ReadWrite, Standby};
        for (attrs, allowed) in [
            ("any", &[ReadWrite, ReadOnly, Standby][..]),
            ("read-write", &[ReadWrite]),
            ("read-only", &[ReadOnly, Standby]),
            ("primary", &[ReadWrite, ReadOnly]),
            ("standby", &[Standby]),
            ("prefer-standby", &[ReadWrite, ReadOnly, Standby]),
        ] {
            let parsed: SessionAttrs = attrs.parse().unwrap();
            for state in [ReadWrite, ReadOnly, Standby] {
                assert_eq!(parsed.allow(state), allowed.contains(&state), "{attrs}: {state}");
            }
        }
        assert!("readwrite".parse::<SessionAttrs>().unwrap_err().contains("read-write"));
    }
}
