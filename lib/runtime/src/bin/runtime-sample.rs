//! A minimal service with commands, for the tests of the life cycle.

use std::process::ExitCode;

use anyhow::Context as _;
use runtime::{Context, Description, Invocation, Reloadable, Unavailable, settings};

#[derive(Clone, Debug, clap::Args)]
struct Settings {
    /// How the service or command ends
    #[arg(long, value_enum, default_value = "success", global = true)]
    ending: Ending,
    /// Reject the settings and end as `--ending` specifies, before the service or command starts
    #[arg(long, global = true)]
    rejected: bool,
    /// A reloadable setting, printed at the start and after each change
    #[arg(long, value_parser = settings::number(1..=100_u32), default_value = "1")]
    pace: u32,
    /// A setting that is not reloadable
    #[arg(long, default_value = "here")]
    place: String,
    /// Number of lines to log at the start, at each of the levels info and warn
    #[arg(long, value_parser = settings::number(0..=1_000_000_u32), default_value = "0")]
    noise: u32,
    /// The command to run instead of the service
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Ending {
    Success,
    Failure,
    Unavailable,
    Panic,
    /// Run until a critical task panics.
    CriticalPanic,
    /// Run until a signal drains the service, then end with success.
    Drained,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Command {
    /// Log, print and end
    Greet,
    /// Wait until a signal starts the drain
    Wait,
    /// Ignore the drain
    Hang,
}

fn main() -> ExitCode {
    let description = Description {
        name: "runtime-sample",
        about: "Does nothing and ends as --ending specifies",
        admin_address: ":0",
        drain_delay: "0s",
        reloadable: &[&["PACE"]],
    };
    runtime::main_with_commands(description, plan)
}

fn plan(mut reloadable: Reloadable<Settings>, context: Context) -> anyhow::Result<Invocation> {
    let settings = reloadable.current();
    if settings.rejected {
        end(settings.ending)?;
    }
    Ok(match settings.command {
        Some(command) => Invocation::command(run_command(command, settings.ending, context)),
        None => Invocation::service(async move {
            count();
            tracing::info!(pace = settings.pace, place = settings.place, "settings");
            tracing::debug!("in detail");
            for _ in 0..settings.noise {
                tracing::info!("{:200}", "noise");
                tracing::warn!("failed again");
            }
            let Context { health, shutdown, supervisor } = &context;
            if settings.ending == Ending::CriticalPanic {
                let panicking = async { panic!("requested by --ending") };
                let _task = supervisor.spawn_critical("sample task", panicking);
                std::future::pending::<()>().await;
            }
            if settings.ending == Ending::Drained {
                health.finish_registration();
                println!("{}", settings.pace);
                while let Some(changed) = shutdown.run_until_cancelled(reloadable.changed()).await {
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
    tracing::info!(total = runtime::metric_total("sample_total"), "counted");
}

async fn run_command(
    command: Command,
    ending: Ending,
    Context { shutdown, .. }: Context,
) -> anyhow::Result<()> {
    match command {
        Command::Greet => {
            tracing::info!("about to greet");
            println!("hello, total {}", runtime::metric_total("lastseen_build_info"));
            tracing::warn!("greeted");
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
        Ending::Success | Ending::Drained => Ok(()),
        Ending::Failure => Err(anyhow::anyhow!("inner cause")).context("outer context"),
        Ending::Unavailable => Err(Unavailable("in use by another process".to_owned()))
            .context("cannot open the file")
            .context("outer context"),
        Ending::Panic | Ending::CriticalPanic => panic!("requested by --ending"),
    }
}
