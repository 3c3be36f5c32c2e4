//! Reads the settings file again when it has changed or on SIGHUP.
//!
//! Its content is compared instead of watched by inotify, which misses files that are mounted and files that are
//! replaced through a link to their directory, as in a Kubernetes `ConfigMap`.
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

use crate::health::{Health, PeerStatus};
use crate::secrets;
use crate::sources::{self, IgnoredSettings, Parsed, Settings, SettingsError, Sources, Values};

/// A change takes effect once two reads in a row have seen it: an editor may be halfway through.
const INTERVAL: Duration = Duration::from_millis(250);

/// 1 while the settings file is rejected.
const REFUSED: &str = "lastseen_settings_refused";
/// Number of changed settings that take effect with the next start.
const AWAITING: &str = "lastseen_settings_awaiting_restart";
const READ: &str = "lastseen_settings_read_total";

/// Follows the settings file of a running process.
pub(crate) struct Reload<C> {
    file: PathBuf,
    sources: Arc<Sources>,
    /// The variables that may change while the process runs.
    live: Vec<&'static str>,
    heed: Box<dyn Fn(C) + Send>,
    at_start: Values,
    now: Values,
    ignored: IgnoredSettings,
    /// The content of the file, or why it cannot be read.
    content: Result<String, String>,
}

/// Reads the settings file again for as long as the process runs, and reports in `health` if it is rejected.
pub(crate) fn watch<C: FromArgMatches + Send + 'static>(
    reload: Option<Reload<C>>,
    hangups: Arc<Notify>,
    health: &Health,
) -> impl Future<Output = Infallible> + use<C> {
    describe_metrics();
    let (status, told) = watch::channel(Ok(()));
    if reload.is_some() {
        health.wants("settings file", told);
    }
    async move {
        if let Some(reload) = reload {
            return reload.watch(&hangups, &status).await;
        }
        loop {
            hangups.notified().await;
            tracing::info!("SIGHUP: there is no settings file to read (LASTSEEN_CONFIG)");
        }
    }
}

impl<C: FromArgMatches + Send + 'static> Reload<C> {
    /// Starts from the settings that were `given` by the file's `content` and other sources; `heed` is called with
    /// the settings when they have changed. `None` if there is no settings file.
    pub(crate) fn new(
        sources: Sources,
        content: String,
        (given, ignored): (Values, IgnoredSettings),
        live: Vec<&'static str>,
        heed: impl Fn(C) + Send + 'static,
    ) -> Option<Self> {
        let file = sources.file()?.to_owned();
        Some(Self {
            file,
            sources: Arc::new(sources),
            live,
            heed: Box::new(heed),
            at_start: given.clone(),
            now: given,
            ignored,
            content: Ok(content),
        })
    }

    async fn watch(mut self, hangups: &Notify, status: &watch::Sender<PeerStatus>) -> Infallible {
        let mut looks = interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = self.content.clone();
        loop {
            let asked = tokio::select! {
                _ = looks.tick() => false,
                () = hangups.notified() => true,
            };
            let file = self.file.clone();
            let Some(content) = aside(move || sources::read_file(&file)).await else { continue };
            let is_steady = before == content;
            before.clone_from(&content);
            if !asked && (!is_steady || content == self.content) {
                continue;
            }
            self.content.clone_from(&content);
            let sources = Arc::clone(&self.sources);
            let read = match content {
                Ok(content) => aside(move || sources.read::<C>(&content)).await,
                Err(reason) => Some(Err(reason)),
            };
            let Some(read) = read else { continue };
            let outcome = if read.is_ok() { "applied" } else { "refused" };
            metrics::counter!(READ, "outcome" => outcome).increment(1);
            metrics::gauge!(REFUSED).set(i32::from(read.is_err()));
            _ = status.send_replace(read.as_ref().map(|_| ()).map_err(Clone::clone));
            match read {
                Ok(Parsed::Run(settings)) => self.apply(settings),
                // The flags have not changed, and did not ask for help at the start.
                Ok(Parsed::Print(_)) => {}
                Err(reason) => tracing::error!(reason, "the settings stay as they were"),
            }
        }
    }

    fn apply(&mut self, settings: Settings<C>) {
        let Settings { config, given, ignored, .. } = settings;
        let changed = differences(&self.now, &given);
        let awaiting = self.awaiting_restart(&given);
        metrics::gauge!(AWAITING).set(u32::try_from(awaiting.len()).unwrap_or(u32::MAX));
        let (live, others): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|name| self.live.contains(name));
        if others.iter().any(|name| awaiting.contains(name)) {
            tracing::warn!(
                settings = awaiting.join(", "),
                "changed in the settings file; takes effect with the next start"
            );
        }
        if live.is_empty() {
            tracing::info!("settings reloaded: no reloadable setting changed");
        } else {
            let live: Vec<_> = live.into_iter().map(|name| shown(name, given.get(name))).collect();
            tracing::info!(changed = live.join(", "), "settings changed");
        }
        if ignored != self.ignored {
            ignored.log();
            self.ignored = ignored;
        }
        (self.heed)(config);
        self.now = given;
    }

    /// The settings that differ from those of the start and cannot change while the process runs.
    fn awaiting_restart<'a>(&'a self, given: &'a Values) -> Vec<&'a str> {
        let mut awaiting = differences(&self.at_start, given);
        awaiting.retain(|name| !self.live.contains(name));
        awaiting
    }
}

/// Runs `read` on a thread that may block, since the files may be on a network. `None` if it panicked.
async fn aside<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, SettingsError> + Send + 'static,
) -> Option<Result<T, String>> {
    let read = tokio::task::spawn_blocking(read).await.ok()?;
    Some(read.map_err(|error| error.to_string()))
}

impl IgnoredSettings {
    /// Logs what was set without effect.
    pub(crate) fn log(&self) {
        let Self { replaced, unknown, warnings } = self;
        if !replaced.is_empty() {
            let settings = replaced.join(", ");
            tracing::warn!(
                settings,
                "in the settings file, but a flag of the command line replaces it"
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
    metrics::describe_counter!(READ, "How often the settings file was read again, by outcome.");
    for outcome in ["applied", "refused"] {
        metrics::counter!(READ, "outcome" => outcome).increment(0);
    }
    metrics::describe_gauge!(
        REFUSED,
        "Whether the settings file is refused as it is now: 1, or 0."
    );
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
