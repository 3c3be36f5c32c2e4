//! Simulates the systems around Lastseen: the partner, which posts callbacks, and the slow status
//! API. `tester load` measures the callback endpoint.

pub mod api;
mod callback;
pub mod config;
pub mod ledger;
pub mod load;
pub mod partner;
mod report;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use runtime::authenticity::Authenticity;
use runtime::{CancellationToken, Context, Description, Invocation};

pub use callback::Outcome;
pub use report::{Latency, Report};

use api::Api;
use config::{Callbacks, Command, Config, Load};
use partner::Partner;

/// The name and the admin address of the process.
pub const DESCRIPTION: Description = Description {
    name: "tester",
    about: "Simulates the partner and the status API, and generates load for the callback endpoint",
    admin_address: ":9094",
    drain_delay: "0s",
    reloadable: &[],
};

/// The complete `main` of the tester as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main_with_commands(DESCRIPTION, |config, context| Ok(plan(config.current(), context)))
}

/// Plans the simulation, or the command that the settings name.
///
/// The tester registers no dependency: a partner keeps posting even if the producer is down.
#[must_use]
pub fn plan(mut config: Config, context: Context) -> Invocation {
    match config.command.take() {
        None => Invocation::service(simulate(config, context)),
        Some(Command::Load(load)) => {
            let callbacks = config.callbacks.into_inner();
            Invocation::command(run_load(load, callbacks, config.authenticity, context.shutdown))
        }
    }
}

/// Simulates the partner and the status API until the shutdown.
///
/// # Errors
/// When it cannot listen on the status API's address or build an HTTP client.
async fn simulate(config: Config, context: Context) -> anyhow::Result<()> {
    let Context { health, shutdown, .. } = context;
    health.finish_registration();
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
    let serve_api = async {
        if let Some(api) = api {
            tracing::info!(addr = %api.address()?, "status API is listening");
            api.serve(shutdown.clone()).await;
        }
        anyhow::Ok(())
    };
    let post_callbacks = async {
        if let Some(partner) = partner {
            partner.post_until(shutdown.clone()).await;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(serve_api, post_callbacks)?;
    Ok(())
}

/// Generates load until the run is over or `shutdown`, and prints the report.
///
/// # Errors
/// When the run fails, or its report cannot be written.
pub async fn run_load(
    load: Load,
    callbacks: Callbacks,
    authenticity: Authenticity,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let report = load::run(&load, &callbacks, &authenticity, shutdown).await?;
    let text = if load.json { serde_json::to_string(&report)? } else { report.to_string() };
    // Not `println!`, which panics when the reader of a pipe has closed it.
    writeln!(std::io::stdout(), "{text}").context("cannot write the report")
}
