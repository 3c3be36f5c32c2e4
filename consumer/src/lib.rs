//! The lookup: takes messages, asks the status API about each object, writes down who is online,
//! and acknowledges a message only when all that is committed.

mod breaker;
mod config;
mod lookups;
mod resizable_semaphore;
mod status_api;
mod writer;

use std::sync::Arc;

use broker::{Consumer, Publisher};
use events::Emitter;
use service::{CancellationToken, Description, Health, Live, Misconfigured};
use store::Store;
use tokio::sync::watch;

pub use config::{Concurrency, Config, Lookups};
pub use writer::{Recording, Writer, WriterDied, Written};

use crate::breaker::Breaker;
use crate::lookups::Intake;
use crate::status_api::StatusApi;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "consumer",
    about: "Looks each object up at the status API and records when it was last seen",
    admin_address: ":9092",
    drain_delay: "0s",
    live: &[Lookups::LIVE],
};

/// Statements at once: one for the batch being written; one for the rows that are set aside; a third so
/// that a connection which the server has dropped does not hold up the next batch.
const DATABASE_CONNECTIONS: u32 = 3;

/// Looks objects up until `shutdown`, then finishes what is in flight and returns. While it runs, it heeds
/// changes of [`Lookups::LIVE`].
///
/// # Errors
/// When a file cannot be opened, or a part that it cannot do without has died.
pub async fn run(
    config: Live<Config>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let live = config.part(|config| config.lookups);
    let config = config.now();
    let exchange = config.exchange();
    let Config { lookups, broker, store, .. } = config;
    let breaker = Breaker::new(&lookups);
    let status_api = StatusApi::new(&lookups, breaker.status())?;
    let store = Arc::new(Store::start(&store, "consumer", DATABASE_CONNECTIONS)?);
    let publisher = Publisher::start(&broker, "consumer: retries and dead letters")?;
    let deliveries = Consumer::new(&publisher, "consumer", lookups.prefetch());
    health.needs("broker", deliveries.status());
    health.needs("broker, for retries", publisher.status());
    health.needs("database", store.status());
    health.needs("status API", status_api.status());
    let events = Emitter::start(&exchange, "consumer: events");
    if let Some(status) = events.status() {
        health.wants("events", status);
    }
    let writer = Writer::start(Arc::clone(&store), events.clone(), &lookups);
    health.needs("database writes", writer.status());
    health.all_told();

    let parts = (publisher.clone(), Arc::clone(&store), writer.clone(), events.clone());
    let rejecting = Arc::clone(&store);
    let died = died(parts, status_api.status());
    let intake =
        Intake::new(live, status_api, Arc::clone(&breaker), writer, broker.destination(), shutdown);
    tokio::select! {
        ended = intake.run(deliveries) => ended?,
        part = died => anyhow::bail!("{part} has died"),
        reason = rejecting.rejected() => return Err(Misconfigured(reason).into()),
        never = breaker.watch() => match never {},
    }
    tokio::join!(publisher.close(), events.close());
    Ok(())
}

/// Waits until a part has died that runs by itself, and says which. Without one of them, this process
/// would do nothing, or not know it, for as long as it lives.
async fn died(
    (publisher, store, writer, events): (Publisher, Arc<Store>, Writer, Emitter),
    mut status_api: watch::Receiver<Result<(), String>>,
) -> &'static str {
    // Its sender is gone only with the probe.
    let probe_died = async { while status_api.changed().await.is_ok() {} };
    tokio::select! {
        () = publisher.died() => "the publisher",
        () = store.died() => "the store",
        () = writer.died() => "the batch writer",
        () = events.died() => "what tells events",
        () = probe_died => "the status API's probe",
    }
}
