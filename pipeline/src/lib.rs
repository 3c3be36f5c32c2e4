//! Drives the whole system in tests: a [`Partner`] that posts callbacks and keeps a ledger of what
//! it was promised, and the environment in which the services run.

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "it serves tests only, where a panic with a reason is how to fail"
)]

mod partner;

pub use partner::{Ledger, Partner};
use testbed::{Process, StatusApi};

/// Where one pipeline of services finds its servers.
#[derive(Clone, Debug)]
pub struct System {
    /// `AMQP_URI`.
    pub amqp_uri: String,
    /// `QUEUE_NAME`.
    pub queue: String,
    /// The `POSTGRES_*` variables, or another way to the database.
    pub database: Vec<(&'static str, String)>,
    /// `TESTER_ENDPOINT`.
    pub status_api: String,
}

impl System {
    /// Those of a broker, a queue name on it, a database and a status API.
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

    /// Starts the service of that name, with `extra` variables.
    #[must_use]
    pub fn spawn(&self, service: &str, extra: &[(&'static str, &str)]) -> Process {
        self.spawn_wrapped(&[], service, extra)
    }

    /// Like [`System::spawn`], by a command as [`Process::spawn_wrapped`] describes it.
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

/// Where a producer takes callbacks, as it says in its log.
pub async fn callback_endpoint(producer: &Process) -> String {
    let line = producer.wait_for_log("accepting callbacks").await;
    let address = line.split("address=").nth(1).expect("the line should end in the address");
    format!("http://{}/callback", address.trim())
}

/// Where a viewer is, as it says in its log: `http://` and its address.
pub async fn viewer_url(viewer: &Process) -> String {
    let line = viewer.wait_for_log("serving the page and the API").await;
    let address = line.split("address=").nth(1).expect("the line should end in the address");
    format!("http://{}", address.trim())
}
