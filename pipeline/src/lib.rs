//! Helpers of the end-to-end tests: a [`Partner`] that posts callbacks and keeps a ledger of the
//! responses, and a [`System`] that starts the services.

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "only tests use it, and a test fails by panicking"
)]

mod partner;

pub use partner::{Ledger, Partner};
use testbed::{Process, StatusApi};

/// The servers that the services of one system use.
#[derive(Clone, Debug)]
pub struct System {
    /// `AMQP_URI`.
    pub amqp_uri: String,
    /// `QUEUE_NAME`.
    pub queue: String,
    /// The variables that locate the database, such as `POSTGRES_*`.
    pub database: Vec<(&'static str, String)>,
    /// `TESTER_ENDPOINT`.
    pub status_api: String,
}

impl System {
    /// A system with this broker, queue name, database and status API.
    #[must_use]
    pub fn new(
        amqp_uri: &str,
        queue: &str,
        database: Vec<(&'static str, String)>,
        status_api: &StatusApi,
    ) -> Self {
        Self {
            amqp_uri: amqp_uri.to_owned(),
            queue: queue.to_owned(),
            database,
            status_api: status_api.endpoint(),
        }
    }

    /// Starts `service` with `extra` variables.
    #[must_use]
    pub fn spawn(&self, service: &str, extra: &[(&'static str, &str)]) -> Process {
        self.spawn_wrapped(&[], service, extra)
    }

    /// Like [`System::spawn`], through a `wrapper` as in [`Process::spawn_wrapped`].
    #[must_use]
    pub fn spawn_wrapped(
        &self,
        wrapper: &[&str],
        service: &str,
        extra: &[(&'static str, &str)],
    ) -> Process {
        let mut environment = vec![
            ("AMQP_URI", self.amqp_uri.clone()),
            ("QUEUE_NAME", self.queue.clone()),
            ("TESTER_ENDPOINT", self.status_api.clone()),
            ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
            ("VIEWER_ADDR", "127.0.0.1:0".to_owned()),
        ];
        environment.extend(self.database.iter().cloned());
        environment.extend(extra.iter().map(|(name, value)| (*name, (*value).to_owned())));
        Process::spawn_wrapped(wrapper, service, &environment, &[])
    }
}

/// The callback URL of a producer, from its log.
pub async fn callback_endpoint(producer: &Process) -> String {
    let line = producer.wait_for_log("accepting callbacks").await;
    let address = line.split("address=").nth(1).expect("the line should end with the address");
    format!("http://{}/callback", address.trim())
}

/// The base URL of a viewer, from its log.
pub async fn viewer_url(viewer: &Process) -> String {
    let line = viewer.wait_for_log("serving the page and the API").await;
    let address = line.split("address=").nth(1).expect("the line should end with the address");
    format!("http://{}", address.trim())
}
