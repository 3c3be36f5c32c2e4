//! A minimal service for the tests of `testkit::Process`.

use std::process::ExitCode;
use std::time::Duration;

use runtime::{Context, Description, Reloadable};

#[derive(Clone, Debug, clap::Args)]
struct Settings {
    /// Text to log at the start
    #[arg(long, default_value = "nothing")]
    greeting: String,
}

fn main() -> ExitCode {
    let description = Description {
        name: "testkit-sample",
        about: "Does nothing until it is stopped",
        admin_address: ":0",
        drain_delay: "0s",
        reloadable: &[],
    };
    runtime::main(
        description,
        |settings: Reloadable<Settings>, Context { health, shutdown, .. }| async move {
            let (status, watched) = tokio::sync::watch::channel(Err("still warming up".to_owned()));
            health.add_required("itself", watched);
            health.finish_registration();
            tracing::info!(greeting = settings.current().greeting, folder = ?std::env::current_dir()?, "sample");
            metrics::counter!("sample_total", "kind" => "a").increment(2);
            metrics::counter!("sample_total", "kind" => "b").increment(3);
            tokio::time::sleep(Duration::from_millis(100)).await;
            status.send(Ok(()))?;
            shutdown.cancelled().await;
            anyhow::Ok(())
        },
    )
}
