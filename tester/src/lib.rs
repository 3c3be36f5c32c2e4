//! The outside world of Lastseen, simulated: the partner, who posts callbacks, and the status API,
//! which says slowly whether an object is online. `tester load` measures the callback endpoint.

pub mod api;
mod callback;
pub mod config;
pub mod ledger;
pub mod load;
pub mod partner;
mod report;

use std::io::Write as _;

use anyhow::Context as _;
use authenticity::Authenticity;
use service::{CancellationToken, Description, Health, Invocation};

pub use callback::Outcome;
pub use report::{Latency, Report};

use api::Api;
use config::{Callbacks, Command, Config, Load};
use partner::Partner;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "tester",
    about: "Plays the partner and the status API of Lastseen, and loads its callback endpoint",
    admin_address: ":9094",
    drain_delay: "0s",
    live: &[],
};

/// What the settings ask for: both parts to be played, or what their subcommand does.
///
/// It reports no peer to the [`Health`]: a partner does not stop being one because nobody answers.
#[must_use]
pub fn plan(
    mut config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> Invocation<
    impl Future<Output = anyhow::Result<()>> + Send + 'static,
    impl Future<Output = anyhow::Result<()>> + Send + 'static,
> {
    match config.command.take() {
        None => Invocation::Service(play(config, health, shutdown)),
        Some(Command::Load(load)) => {
            let callbacks = config.callbacks.into_inner();
            Invocation::Command(print_load(load, callbacks, config.authenticity, shutdown))
        }
    }
}

/// Plays the partner and the status API until `shutdown`.
///
/// # Errors
/// When the status API's address cannot be listened on, or no HTTP client can be built.
async fn play(config: Config, health: Health, shutdown: CancellationToken) -> anyhow::Result<()> {
    health.all_told();
    let api = if config.no_api {
        None
    } else {
        let config = config.api.into_inner();
        let address = config.tester_addr;
        let api = Api::bind(config);
        Some(api.with_context(|| format!("cannot listen on TESTER_ADDR={address}"))?)
    };
    let partner = if config.no_partner {
        None
    } else {
        let callbacks = config.callbacks.into_inner();
        let partner = Partner::new(callbacks, config.authenticity, config.partner.into_inner());
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

/// Loads the callback endpoint until the run is over or `shutdown`, and prints the report.
///
/// # Errors
/// When the run fails, or its report cannot be written.
pub async fn print_load(
    load: Load,
    callbacks: Callbacks,
    authenticity: Authenticity,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let report = load::run(&load, &callbacks, &authenticity, shutdown).await?;
    let text = if load.json { serde_json::to_string(&report)? } else { report.to_string() };
    // Not `println!`, which panics when the reader of a pipe has gone.
    writeln!(std::io::stdout(), "{text}").context("cannot write the report")
}
