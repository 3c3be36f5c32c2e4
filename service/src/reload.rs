//! The settings file, read again when it has changed or SIGHUP asks for it.
//!
//! Its content is compared, and not watched by inotify: that misses files that are mounted, and those
//! that are replaced through a link to their directory, as a `ConfigMap` of Kubernetes is.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::FromArgMatches;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::health::{Health, PeerStatus};
use crate::settings::{self, InVain, Parsed, Settings, Sources, Values};

/// A change is heeded when two looks in a row have seen it: an editor may be halfway through.
const INTERVAL: Duration = Duration::from_millis(250);

/// Whether the settings file is refused as it is now.
const REFUSED: &str = "lastseen_settings_refused";
/// How many of its settings wait for a restart.
const AWAITING: &str = "lastseen_settings_awaiting_restart";
const READ: &str = "lastseen_settings_read_total";

/// The settings file of a process that runs.
pub(crate) struct Reload<C> {
    file: PathBuf,
    sources: Sources,
    /// The variables that may change while the process runs.
    live: Vec<&'static str>,
    heed: Box<dyn Fn(C) + Send>,
    at_start: Values,
    now: Values,
    in_vain: InVain,
    /// What the file held, or why it could not be read.
    content: Result<Vec<u8>, String>,
}

/// Reads the settings file again for as long as the process runs, and says in `health` if it is refused.
///
/// # Errors
/// When SIGHUP cannot be watched for.
pub(crate) fn watch<C: FromArgMatches>(
    reload: Option<Reload<C>>,
    health: &Health,
) -> anyhow::Result<impl Future<Output = Infallible> + use<C>> {
    describe_metrics();
    let reload = match reload {
        None => None,
        Some(reload) => {
            let hangups = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
            let (status, told) = watch::channel(Ok(()));
            health.wants("settings file", told);
            Some(reload.watch(hangups, status))
        }
    };
    Ok(async {
        match reload {
            Some(reload) => reload.await,
            None => std::future::pending().await,
        }
    })
}

impl<C: FromArgMatches> Reload<C> {
    /// Of the file whose `content` the settings were `given` by, among others; `heed` is told the settings
    /// when they have changed. `None` if there is no settings file.
    pub(crate) fn new(
        sources: Sources,
        content: Vec<u8>,
        (given, in_vain): (Values, InVain),
        live: Vec<&'static str>,
        heed: impl Fn(C) + Send + 'static,
    ) -> Option<Self> {
        let file = sources.file()?.to_owned();
        let (heed, at_start, content) = (Box::new(heed), given.clone(), Ok(content));
        Some(Self { file, sources, live, heed, at_start, now: given, in_vain, content })
    }

    async fn watch(mut self, mut hangups: Signal, status: watch::Sender<PeerStatus>) -> Infallible {
        let mut looks = interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = self.content.clone();
        self.in_vain.tell();
        loop {
            let asked = tokio::select! {
                _ = looks.tick() => false,
                _ = hangups.recv() => true,
            };
            let file = self.file.clone();
            // By a thread that may wait: the file may be on a network.
            let read = tokio::task::spawn_blocking(move || settings::read_file(&file)).await;
            // It does not panic; and if it did, there would be another look.
            let Ok(content) = read else { continue };
            let content = content.map_err(|error| error.to_string());
            let is_steady = before == content;
            before.clone_from(&content);
            if asked || (is_steady && content != self.content) {
                self.content = content;
                self.read(&status);
            }
        }
    }

    /// Heeds what the file holds, or says why not.
    fn read(&mut self, status: &watch::Sender<PeerStatus>) {
        let read = match &self.content {
            Ok(content) => self.sources.read::<C>(content).map_err(|error| error.to_string()),
            Err(reason) => Err(reason.clone()),
        };
        let outcome = if read.is_ok() { "applied" } else { "refused" };
        metrics::counter!(READ, "outcome" => outcome).increment(1);
        metrics::gauge!(REFUSED).set(i32::from(read.is_err()));
        _ = status.send_replace(read.as_ref().map(|_| ()).map_err(Clone::clone));
        match read {
            Ok(Parsed::Run(settings)) => self.apply(settings),
            // The flags are as they were, and have asked for no help.
            Ok(Parsed::Print(_)) => {}
            Err(reason) => tracing::error!(reason, "the settings stay as they were"),
        }
    }

    fn apply(&mut self, settings: Settings<C>) {
        let Settings { config, given, in_vain } = settings;
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
            tracing::info!("settings read; none has changed that can while this runs");
        } else {
            let live: Vec<_> = live.into_iter().map(|name| shown(name, given.get(name))).collect();
            tracing::info!(changed = live.join(", "), "settings changed");
        }
        if in_vain != self.in_vain {
            in_vain.tell();
            self.in_vain = in_vain;
        }
        (self.heed)(config);
        self.now = given;
    }

    /// What is not as it was at the start, and will be with the next one only.
    fn awaiting_restart<'a>(&'a self, given: &'a Values) -> Vec<&'a str> {
        let mut awaiting = differences(&self.at_start, given);
        awaiting.retain(|name| !self.live.contains(name));
        awaiting
    }
}

impl InVain {
    fn tell(&self) {
        let Self { replaced, unknown } = self;
        if !replaced.is_empty() {
            let settings = replaced.join(", ");
            tracing::warn!(settings, "in the settings file, but a flag of the command line wins");
        }
        if !unknown.is_empty() {
            let settings = unknown.join(", ");
            tracing::info!(settings, "in the settings file, but no settings of this process");
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
        Some(value) => format!("{name}={}", settings::mask(name, value)),
        None => format!("{name} to its default"),
    }
}
