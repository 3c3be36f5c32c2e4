//! The outside world of Lastseen, simulated: the partner, who posts callbacks, and the status API,
//! which says slowly whether an object is online. `tester load` measures the callback endpoint.

pub mod api;
mod callback;
pub mod config;
pub mod load;
pub mod partner;
mod report;

use std::io::Write as _;

use anyhow::Context as _;
use service::{CancellationToken, Health};

pub use callback::Outcome;
pub use report::{Latency, Report};

use api::Api;
use config::{Callbacks, Command, Config, Load};
use partner::Partner;

/// Plays the partner and the status API until `shutdown`, or runs the subcommand.
///
/// It reports no peer to the [`Health`]: a partner does not stop being one because nobody answers.
///
/// # Errors
/// When the status API's address cannot be listened on, no HTTP client can be built, or the report
/// of a load run cannot be written.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    health.all_told();
    api::describe_metrics();
    callback::describe_metrics();
    let callbacks = config.callbacks.into_inner();
    if let Some(Command::Load(load)) = config.command {
        return print_load(&load, &callbacks, shutdown).await;
    }
    let api = if config.no_api {
        None
    } else {
        let config = config.api.into_inner();
        let address = config.tester_addr;
        let api = Api::bind(config).await;
        Some(api.with_context(|| format!("cannot listen on TESTER_ADDR={address}"))?)
    };
    let partner = if config.no_partner {
        None
    } else {
        let partner = Partner::new(callbacks, config.partner.into_inner());
        Some(partner.context("cannot build the HTTP client")?)
    };
    let answering = async {
        if let Some(api) = api {
            tracing::info!(addr = %api.address()?, "status API is listening");
            api.serve(shutdown.clone()).await;
        }
        anyhow::Ok(())
    };
    let posting = async {
        if let Some(partner) = partner {
            partner.post_until(shutdown.clone()).await;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(answering, posting)?;
    Ok(())
}

async fn print_load(
    load: &Load,
    callbacks: &Callbacks,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let report = load::run(load, callbacks, shutdown).await?;
    let text = if load.json { serde_json::to_string(&report)? } else { report.to_string() };
    // Not `println!`, which panics when the reader of a pipe has gone.
    writeln!(std::io::stdout(), "{text}").context("cannot write the report")
}
