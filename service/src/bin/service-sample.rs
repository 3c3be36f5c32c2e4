//! The smallest service that has commands as well, for the tests of the life cycle.

use std::process::ExitCode;

use anyhow::Context as _;
use service::{CancellationToken, Description, Health, Invocation, Live, Unavailable, settings};

#[derive(Clone, Debug, clap::Args)]
struct Settings {
    /// How it ends
    #[arg(long, value_enum, default_value = "well", global = true)]
    ending: Ending,
    /// End like that at once, without beginning anything
    #[arg(long, global = true)]
    refused: bool,
    /// What it prints with each change, and at its start
    #[arg(long, value_parser = settings::number(1..=100_u32), default_value = "1")]
    pace: u32,
    /// What does not change while it runs
    #[arg(long, default_value = "here")]
    place: String,
    /// How many lines it logs at its start, as information and as warnings
    #[arg(long, value_parser = settings::number(0..=1_000_000_u32), default_value = "0")]
    noise: u32,
    /// What to do instead of serving
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Ending {
    Well,
    Failure,
    Unavailable,
    Panic,
    /// Well, when a signal drains it.
    Drained,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Command {
    /// Log, print and end
    Greet,
    /// Wait for the signal to drain
    Wait,
    /// Do not end, whatever the signal
    Hang,
}

fn main() -> ExitCode {
    let description = Description {
        name: "service-sample",
        about: "Serves nothing and ends as it is told",
        admin_address: ":0",
        drain_delay: "0s",
        live: &[&["PACE"]],
    };
    service::main_with_commands(description, plan)
}

fn plan(
    mut live: Live<Settings>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<
    Invocation<
        impl Future<Output = anyhow::Result<()>> + Send + 'static,
        impl Future<Output = anyhow::Result<()>> + Send + 'static,
    >,
> {
    let settings = live.now();
    if settings.refused {
        end(settings.ending)?;
    }
    Ok(match settings.command {
        Some(command) => Invocation::Command(carry_out(command, settings.ending, shutdown)),
        None => Invocation::Service(async move {
            count();
            tracing::info!(pace = settings.pace, place = settings.place, "settings");
            tracing::debug!("in detail");
            for _ in 0..settings.noise {
                tracing::info!("{:200}", "noise");
                tracing::warn!("failed again");
            }
            if settings.ending == Ending::Drained {
                health.all_told();
                println!("{}", settings.pace);
                while let Some(changed) = shutdown.run_until_cancelled(live.changed()).await {
                    tracing::debug!(place = changed.place, "changed");
                    println!("{}", changed.pace);
                }
            }
            end(settings.ending)
        }),
    })
}

fn count() {
    metrics::counter!("sample_total", "kind" => "a").increment(2);
    metrics::counter!("sample_total", "kind" => "b").increment(3);
    tracing::info!(total = service::metric_total("sample_total"), "counted");
}

async fn carry_out(
    command: Command,
    ending: Ending,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    match command {
        Command::Greet => {
            tracing::info!("about to greet");
            println!("hello, total {}", service::metric_total("lastseen_build_info"));
            tracing::warn!("have greeted");
        }
        Command::Wait => {
            println!("waiting");
            shutdown.cancelled().await;
            println!("drained");
        }
        Command::Hang => {
            println!("waiting");
            std::future::pending::<()>().await;
        }
    }
    end(ending)
}

fn end(ending: Ending) -> anyhow::Result<()> {
    match ending {
        Ending::Well | Ending::Drained => Ok(()),
        Ending::Failure => Err(anyhow::anyhow!("no luck")).context("cannot end well"),
        Ending::Unavailable => Err(Unavailable("another one has it".to_owned()))
            .context("cannot have it")
            .context("cannot end well"),
        Ending::Panic => panic!("told to"),
    }
}
