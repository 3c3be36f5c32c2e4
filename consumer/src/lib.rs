//! The lookup: takes messages, asks the status API about each object, writes down who is online,
//! and acknowledges a message only when all that is committed.

mod config;
mod lookups;
mod status_api;
mod writer;

use std::sync::Arc;

use broker::{Consumer, Publisher};
use service::{CancellationToken, Description, Health};
use store::Store;

pub use config::{Config, Lookups};

use crate::lookups::Intake;
use crate::status_api::StatusApi;
use crate::writer::Writer;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "consumer",
    about: "Looks each object up at the status API and records when it was last seen",
    admin_address: ":9092",
};

/// Statements at once: one for the batch being written; a second so that a connection which the
/// server has dropped does not hold up the next batch.
const DATABASE_CONNECTIONS: u32 = 2;

/// Looks objects up until `shutdown`, then finishes what is in flight and returns.
///
/// # Errors
/// When a file cannot be opened, or a part that it cannot do without has died.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let Config { lookups, broker, store } = config;
    let status_api = StatusApi::new(&lookups)?;
    let store = Arc::new(Store::start(&store, "consumer", DATABASE_CONNECTIONS)?);
    let publisher = Publisher::start(&broker, "consumer: retries and dead letters")?;
    let deliveries = Consumer::new(&publisher, "consumer", lookups.prefetch());
    health.needs("broker", deliveries.status());
    health.needs("broker, for retries", publisher.status());
    health.needs("database", store.status());
    health.needs("status API", status_api.status());
    health.all_told();

    let writer = Writer::start(Arc::clone(&store), &lookups);
    let intake = Intake::new(&lookups, status_api, writer);
    tokio::select! {
        ended = intake.run(deliveries, shutdown) => ended?,
        () = publisher.died() => anyhow::bail!("the publisher has died"),
        () = store.died() => anyhow::bail!("the store has died"),
    }
    publisher.close().await;
    Ok(())
}
