//! Starts the services as processes that belong together.

use std::net::SocketAddr;

use crate::{Database, Process, Queue};

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
    /// A system on shared servers.
    pub fn new(queue: &Queue, database: &Database, status_api: &str) -> Self {
        Self::at(queue.uri(), &queue.name, database.environment(), status_api)
    }

    /// A system with this broker, queue name, database and status API.
    pub fn at(
        amqp_uri: &str,
        queue: &str,
        database: Vec<(&'static str, String)>,
        status_api: &str,
    ) -> Self {
        let [amqp_uri, queue, status_api] = [amqp_uri, queue, status_api].map(str::to_owned);
        Self { amqp_uri, queue, database, status_api }
    }

    /// A system of producers only, with the broker at `amqp_uri`.
    pub fn of_producers(amqp_uri: &str, queue: &Queue) -> Self {
        Self::at(amqp_uri, &queue.name, Vec::new(), "http://127.0.0.1:1")
    }

    /// Starts `service` with `extra` variables.
    pub fn spawn(&self, service: &str, extra: &[(&'static str, &str)]) -> Process {
        self.spawn_wrapped(&[], service, extra)
    }

    /// Like [`System::spawn`], and waits until the service is ready.
    pub async fn start(&self, service: &str, extra: &[(&'static str, &str)]) -> Process {
        let process = self.spawn(service, extra);
        process.ready().await;
        process
    }

    /// Like [`System::spawn`], through a `wrapper` as in [`Process::spawn_wrapped`].
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

/// Waits until all of these services are ready.
pub async fn all_ready<'a>(services: impl IntoIterator<Item = &'a Process>) {
    for service in services {
        service.ready().await;
    }
}

/// The address at which a producer accepts callbacks.
pub async fn producer_address(producer: &Process) -> SocketAddr {
    producer.logged_address("accepting callbacks").await
}

/// The callback URL of a producer.
pub async fn callback_endpoint(producer: &Process) -> String {
    format!("http://{}/callback", producer_address(producer).await)
}

/// The address of a viewer.
pub async fn viewer_address(viewer: &Process) -> SocketAddr {
    viewer.logged_address("serving the page and the API").await
}
