//! Rereads the settings file when it has changed or on SIGHUP.
//!
//! To detect a change, it compares the content of the file. inotify would miss changes of mounted
//! files, and of files that are replaced through a link to their directory, as in a Kubernetes
//! `ConfigMap`.
//!
//! Decision: docs/decisions/0069-why-does-the-settings-file-win.md

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::FromArgMatches;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::health::{Health, Status};
use crate::secrets;
use crate::sources::{self, IgnoredSettings, Parsed, Settings, SettingsError, Sources, Values};

/// Time between two reads. A change takes effect once two reads in a row have returned it, because
/// an editor may be halfway through writing.
const READ_INTERVAL: Duration = Duration::from_millis(250);

/// 1 while the settings file is rejected.
const REFUSED: &str = "lastseen_settings_refused";
/// Number of changed settings that take effect with the next start.
const AWAITING: &str = "lastseen_settings_awaiting_restart";
/// Number of times that the settings file was reread, by outcome.
const READ: &str = "lastseen_settings_read_total";

/// Rereads the settings file of a running process and publishes its changes.
pub(crate) struct Reload<C> {
    file: PathBuf,
    sources: Arc<Sources>,
    reloadable: Vec<&'static str>,
    publish: Box<dyn Fn(C) + Send>,
    /// The settings with which the process started.
    at_start: Values,
    /// The settings that were read last.
    current: Values,
    ignored: IgnoredSettings,
    /// The content of the file, or the reason why it cannot be read.
    content: Result<String, String>,
}

/// Rereads the settings file while the process runs. `health` reports when the file is rejected.
pub(crate) fn watch<C: FromArgMatches + Send + 'static>(
    reload: Option<Reload<C>>,
    requests: Arc<Notify>,
    health: &Health,
) -> impl Future<Output = Infallible> + use<C> {
    describe_metrics();
    let (status, watched) = watch::channel(Ok(()));
    if reload.is_some() {
        health.add_optional("settings file", watched);
    }
    async move {
        if let Some(reload) = reload {
            return reload.watch(&requests, &status).await;
        }
        loop {
            requests.notified().await;
            tracing::info!("SIGHUP ignored: LASTSEEN_CONFIG names no settings file to reread");
        }
    }
}

impl<C: FromArgMatches + Send + 'static> Reload<C> {
    /// Starts from `values`, which were read from the settings file with this `content` and from
    /// the other sources. Each change is passed to `publish`. Returns `None` if there is no
    /// settings file.
    pub(crate) fn new(
        sources: Sources,
        content: String,
        (values, ignored): (Values, IgnoredSettings),
        reloadable: Vec<&'static str>,
        publish: impl Fn(C) + Send + 'static,
    ) -> Option<Self> {
        let file = sources.file()?.to_owned();
        Some(Self {
            file,
            sources: Arc::new(sources),
            reloadable,
            publish: Box::new(publish),
            at_start: values.clone(),
            current: values,
            ignored,
            content: Ok(content),
        })
    }

    async fn watch(mut self, requests: &Notify, status: &watch::Sender<Status>) -> Infallible {
        let mut ticks = interval(READ_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut previous = self.content.clone();
        loop {
            let is_requested = tokio::select! {
                _ = ticks.tick() => false,
                () = requests.notified() => true,
            };
            let file = self.file.clone();
            let read = run_blocking(move || sources::read_file(&file)).await;
            let Some(content) = read else { continue };
            let is_stable = previous == content;
            previous.clone_from(&content);
            if !is_requested && (!is_stable || content == self.content) {
                continue;
            }
            self.content.clone_from(&content);
            let sources = Arc::clone(&self.sources);
            let parsed = match content {
                Ok(content) => run_blocking(move || sources.read::<C>(&content)).await,
                Err(reason) => Some(Err(reason)),
            };
            let Some(parsed) = parsed else { continue };
            let outcome = if parsed.is_ok() { "applied" } else { "refused" };
            metrics::counter!(READ, "outcome" => outcome).increment(1);
            metrics::gauge!(REFUSED).set(i32::from(parsed.is_err()));
            _ = status.send_replace(parsed.as_ref().map(|_| ()).map_err(Clone::clone));
            match parsed {
                Ok(Parsed::Run(settings)) => self.apply(settings),
                // Cannot happen, because the flags have not changed and did not request help at the
                // start.
                Ok(Parsed::Print(_)) => {}
                Err(reason) => tracing::error!(
                    reason,
                    "settings file rejected; the previous settings stay in effect until it is fixed"
                ),
            }
        }
    }

    fn apply(&mut self, settings: Settings<C>) {
        let Settings { config, values, ignored, .. } = settings;
        let changed = differences(&self.current, &values);
        let awaiting = self.awaiting_restart(&values);
        metrics::gauge!(AWAITING).set(u32::try_from(awaiting.len()).unwrap_or(u32::MAX));
        let (reloadable, others): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|name| self.reloadable.contains(name));
        if others.iter().any(|name| awaiting.contains(name)) {
            tracing::warn!(
                settings = awaiting.join(", "),
                "changed in the settings file; takes effect with the next start"
            );
        }
        if reloadable.is_empty() {
            tracing::info!("settings reloaded: no reloadable setting changed");
        } else {
            let shown = reloadable.into_iter().map(|name| shown(name, values.get(name)));
            let changed = shown.collect::<Vec<_>>().join(", ");
            tracing::info!(changed, "settings changed");
        }
        if ignored != self.ignored {
            ignored.log();
            self.ignored = ignored;
        }
        (self.publish)(config);
        self.current = values;
    }

    /// The settings that are not reloadable and differ from their values at the start.
    fn awaiting_restart<'a>(&'a self, values: &'a Values) -> Vec<&'a str> {
        let mut awaiting = differences(&self.at_start, values);
        awaiting.retain(|name| !self.reloadable.contains(name));
        awaiting
    }
}

/// Runs `read` on a blocking thread, because files may be on a slow network. Returns `None` if it
/// panicked.
async fn run_blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, SettingsError> + Send + 'static,
) -> Option<Result<T, String>> {
    let result = tokio::task::spawn_blocking(read).await.ok()?;
    Some(result.map_err(|error| error.to_string()))
}

impl IgnoredSettings {
    pub(crate) fn log(&self) {
        let Self { overridden, unknown, warnings } = self;
        if !overridden.is_empty() {
            let settings = overridden.join(", ");
            tracing::warn!(
                settings,
                "set in the settings file without effect, because a command-line flag overrides it"
            );
        }
        if !unknown.is_empty() {
            let settings = unknown.join(", ");
            tracing::info!(settings, "in the settings file, but not a setting of this process");
        }
        for warning in warnings {
            tracing::warn!("{warning}");
        }
    }
}

fn describe_metrics() {
    metrics::describe_counter!(READ, "How often the settings file was reread, by outcome.");
    for outcome in ["applied", "refused"] {
        metrics::counter!(READ, "outcome" => outcome).increment(0);
    }
    metrics::describe_gauge!(REFUSED, "1 while the settings file is rejected, else 0.");
    metrics::gauge!(REFUSED).set(0);
    metrics::describe_gauge!(
        AWAITING,
        "Settings that have changed in the settings file and take effect with the next start."
    );
    metrics::gauge!(AWAITING).set(0);
}

fn differences<'a>(before: &'a Values, now: &'a Values) -> Vec<&'a str> {
    let names: BTreeSet<_> = before.keys().chain(now.keys()).collect();
    let changed = names.into_iter().filter(|name| before.get(*name) != now.get(*name));
    changed.map(String::as_str).collect()
}

fn shown(name: &str, value: Option<&String>) -> String {
    match value {
        Some(value) => format!("{name}={}", secrets::mask(name, value)),
        None => format!("{name} to its default"),
    }
}
