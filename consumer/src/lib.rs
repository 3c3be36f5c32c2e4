//! The consumer: takes messages, looks each object up at the status API, records the objects that
//! are online, and acks a message only after the commit.

mod breaker;
mod config;
mod lookups;
mod resizable_semaphore;
mod status_api;
mod writer;

use std::sync::Arc;

use broker::{Consumer, Publisher};
use events::Emitter;
use service::{CancellationToken, Description, Health, Misconfigured, Reloadable};
use store::Store;
use tokio::sync::watch;

pub use config::{Concurrency, Config, Lookups};
pub use writer::{PendingWrite, WriteOutcome, Writer, WriterDied};

use crate::breaker::Breaker;
use crate::lookups::LookupScheduler;
use crate::status_api::StatusApi;

/// The name of the process, its help text and its admin address.
pub const DESCRIPTION: Description = Description {
    name: "consumer",
    about: "Looks each object up at the status API and records when it was last seen",
    admin_address: ":9092",
    drain_delay: "0s",
    reloadable: &[Lookups::RELOADABLE],
};

/// One connection for the batch that is being written, one for the rows that are set aside, and a
/// third so that a connection that the server has dropped does not delay the next batch.
const DATABASE_CONNECTIONS: u32 = 3;

/// Looks objects up until `shutdown`, then drains and returns. Meanwhile, it applies changes of the
/// settings in [`Lookups::RELOADABLE`].
///
/// # Errors
/// When a file cannot be opened, or a component that the consumer needs has stopped.
pub async fn run(
    config: Reloadable<Config>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let live = config.map(|config| config.lookups);
    let config = config.current();
    let exchange = config.exchange();
    let Config { lookups, broker, store, .. } = config;
    let breaker = Breaker::new(&lookups);
    let status_api = StatusApi::new(&lookups, breaker.status())?;
    let store = Arc::new(Store::start(&store, "consumer", DATABASE_CONNECTIONS)?);
    let publisher = Publisher::start(&broker, "consumer: retries and dead letters")?;
    let deliveries = Consumer::new(&publisher, "consumer", lookups.prefetch());
    health.add_required("broker", deliveries.status());
    health.add_required("broker, for retries", publisher.status());
    health.add_required("database", store.status());
    health.add_required("status API", status_api.status());
    let events = Emitter::start(&exchange, "consumer: events");
    if let Some(status) = events.status() {
        health.add_optional("events", status);
    }
    let writer = Writer::start(Arc::clone(&store), events.clone(), &lookups);
    health.add_required("database writes", writer.status());
    health.finish_registration();

    let components = (publisher.clone(), Arc::clone(&store), writer.clone(), events.clone());
    let store_rejected = Arc::clone(&store);
    let stopped = first_stopped(components, status_api.status());
    let destination = broker.destination();
    let scheduler =
        LookupScheduler::new(live, status_api, Arc::clone(&breaker), writer, destination, shutdown);
    tokio::select! {
        ended = scheduler.run(deliveries) => ended?,
        component = stopped => anyhow::bail!("{component} stopped"),
        reason = store_rejected.rejected() => return Err(Misconfigured(reason).into()),
        never = breaker.run() => match never {},
    }
    tokio::join!(publisher.close(), events.close());
    Ok(())
}

/// Waits until one of the components with a task of their own has stopped, and names it. Without
/// it, the consumer would do nothing, possibly without any sign of it, until it is restarted.
async fn first_stopped(
    (publisher, store, writer, events): (Publisher, Arc<Store>, Writer, Emitter),
    mut status_api: watch::Receiver<Result<(), String>>,
) -> &'static str {
    // The monitor drops the sender only when it stops.
    let monitor_stopped = async { while status_api.changed().await.is_ok() {} };
    tokio::select! {
        () = publisher.died() => "the publisher",
        () = store.died() => "the store",
        () = writer.died() => "the batch writer",
        () = events.died() => "the event publisher",
        () = monitor_stopped => "the status API monitor",
    }
}
