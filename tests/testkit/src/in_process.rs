//! A service that runs in the test's process.

use clap::{Args, Command};
use runtime::{CancellationToken, Context, Health, ReloadHandle, Reloadable, Supervisor};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::{PATIENCE, wait_until};

/// Parses settings from flags such as `--max-consumers=3`. The last value of a flag counts.
pub fn parse<C: Args>(flags: impl IntoIterator<Item = impl AsRef<str>>) -> C {
    let command = C::augment_args(Command::new("test").no_binary_name(true));
    let flags = flags.into_iter().map(|flag| flag.as_ref().to_owned());
    let matches = command.args_override_self(true).try_get_matches_from(flags);
    let matches = matches.unwrap_or_else(|error| panic!("{error}"));
    C::from_arg_matches(&matches).unwrap_or_else(|error| panic!("{error}"))
}

/// A service with settings that can change while it runs.
pub struct InProcess<C> {
    /// The health of the service's dependencies.
    pub health: Health,
    /// Cancelling this drains the service.
    pub shutdown: CancellationToken,
    /// The supervisor of the service's tokio tasks.
    pub supervisor: Supervisor,
    /// The tokio task that runs the service.
    pub run: JoinHandle<anyhow::Result<()>>,
    flags: Vec<String>,
    settings: ReloadHandle<C>,
}

impl<C: Args + Clone + Send + Sync + 'static> InProcess<C> {
    /// Starts `run` with settings parsed from `flags`.
    pub fn start<F>(run: impl FnOnce(Reloadable<C>, Context) -> F, flags: Vec<String>) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let context = Context::default();
        let (settings, config) = Reloadable::with_handle(parse(&flags));
        let run = tokio::spawn(run(config, context.clone()));
        let Context { health, shutdown, supervisor } = context;
        Self { health, shutdown, supervisor, run, flags, settings }
    }

    /// Adds `further` flags to those of the start, and changes the settings accordingly.
    pub fn change(&self, further: &[&str]) {
        self.settings
            .set(parse(self.flags.iter().map(String::as_str).chain(further.iter().copied())));
    }

    /// Drains the service, which must end without an error.
    pub async fn stop(self) {
        self.shutdown.cancel();
        let ended = timeout(PATIENCE, self.run).await.expect("the service should drain");
        let result = ended.expect("the service should not panic");
        result.expect("the service should end without an error");
    }

    /// The required dependencies that the service reports as away.
    pub fn missing(&self) -> Vec<&'static str> {
        self.health.missing().into_iter().map(|(dependency, _)| dependency).collect()
    }

    /// Waits until the service reports exactly these required dependencies as away.
    pub async fn wait_until_missing(&self, dependencies: &[&str]) {
        let what = format!("the service misses {dependencies:?}");
        wait_until(&what, async || self.missing() == dependencies).await;
    }
}
