//! The consumer: takes messages, looks each object up at the status API, records the objects that
//! are online, and acks a message only after the commit.

mod breaker;
mod config;
mod lookups;
mod resizable_semaphore;
mod status_api;
mod writer;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use messaging::events::{Emitter, Exchange};
use messaging::queue::{Broker, Consumer, Publisher};
use runtime::{Context, Description, Misconfigured, Reloadable};
use store::{Database, Retention, Store};

pub use config::{Concurrency, Config, Lookups};
pub use writer::{PendingWrite, WriteOutcome, Writer, WriterStopped};

use crate::breaker::Breaker;
use crate::lookups::LookupScheduler;
use crate::status_api::StatusApi;

/// The name of the process, its help text and its admin address.
pub const DESCRIPTION: Description = Description {
    name: "consumer",
    about: "Looks each object up at the status API and records when it was last seen",
    admin_address: ":9092",
    drain_delay: "0s",
    reloadable: &[Lookups::RELOADABLE, Retention::RELOADABLE],
};

/// The complete `main` of the consumer as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main(DESCRIPTION, run)
}

/// One connection for the batch that is being written, one for the rows that are set aside, and a
/// third so that a connection that the server has dropped does not delay the next batch.
const DATABASE_CONNECTIONS: u32 = 3;

/// The open resources of the consumer.
pub struct Resources {
    /// Delivers the messages.
    pub broker: Broker,
    /// Has the table in which the consumer records objects.
    pub database: Database,
    /// Carries the events about committed changes.
    pub exchange: Exchange,
}

/// Opens the resources that the settings name, and runs the consumer with them. With a queue in a
/// file there is no exchange for events.
///
/// # Errors
/// When a file cannot be opened, and in the same cases as [`run_with`].
pub async fn run(config: Reloadable<Config>, context: Context) -> anyhow::Result<()> {
    let Config { broker, store, .. } = config.current();
    let retention = config.map(|config| config.store.history);
    let database = store.open(&context.supervisor)?.with_retention(retention);
    let broker = broker.open(&context.supervisor)?;
    let on_rabbitmq = |access| Exchange::on_rabbitmq(access, &broker.destination().name);
    let exchange = broker.access().map_or_else(Exchange::disabled, on_rabbitmq);
    let resources = Resources { broker, database, exchange };
    run_with(config.map(|config| config.lookups), resources, context).await
}

/// Looks objects up until the shutdown, then drains and returns. Meanwhile, it applies changes of
/// the settings in [`Lookups::RELOADABLE`].
///
/// # Errors
/// When the table is unusable, or a lookup task panics.
pub async fn run_with(
    settings: Reloadable<Lookups>,
    resources: Resources,
    context: Context,
) -> anyhow::Result<()> {
    let Context { health, shutdown, supervisor } = context;
    let Resources { broker, database, exchange } = resources;
    let lookups = settings.current();
    let destination = broker.destination();
    let breaker = Breaker::new(&lookups);
    let status_api = StatusApi::new(&lookups, breaker.status(), &supervisor)?;
    let store = Arc::new(Store::start(database, "consumer", DATABASE_CONNECTIONS));
    let publisher = Publisher::start(broker, "consumer: retries and dead letters");
    let deliveries = Consumer::new(&publisher, "consumer", lookups.prefetch());
    health.add_required("broker", deliveries.status());
    health.add_required("broker, for retries", publisher.status());
    health.add_required("database", store.status());
    health.add_required("status API", status_api.status());
    if let Some(status) = store.history_status() {
        health.add_optional("history", status);
    }
    let events = Emitter::start(&exchange, "consumer: events", &supervisor);
    if let Some(status) = events.status() {
        health.add_optional("events", status);
    }
    let writer =
        Writer::start(Arc::clone(&store), events.clone(), &lookups, &supervisor, shutdown.clone());
    health.add_required("database writes", writer.status());
    health.finish_registration();

    let _breaker = supervisor.spawn_critical("breaker", Arc::clone(&breaker).run());
    let scheduler = LookupScheduler::new(
        settings,
        status_api,
        breaker,
        writer,
        events.clone(),
        destination,
        shutdown,
    );
    tokio::select! {
        ended = scheduler.run(deliveries) => ended?,
        reason = store.rejected() => return Err(Misconfigured(reason).into()),
    }
    tokio::join!(publisher.close(), events.close());
    Ok(())
}

/// An endless sequence of waits that grow from `min` to `max`.
fn backoff(min: Duration, max: Duration) -> ExponentialBackoff {
    let waits = ExponentialBuilder::new().with_min_delay(min).with_max_delay(max);
    waits.with_jitter().without_max_times().build()
}
