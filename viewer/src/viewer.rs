//! The parts together.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use events::Subscriber;
use service::{CancellationToken, Health, health_routes, http};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::api::{self, Shared};
use crate::config::Config;
use crate::hosts::Hosts;
use crate::metrics_scraper::Services;
use crate::stream::Subscribers;
use crate::table_sync::TableSync;
use crate::view_state::ViewState;

/// Everything here can be asked again.
const FAREWELL: Duration = Duration::from_millis(200);

/// The viewer, listening and not yet serving.
pub struct Viewer {
    listener: TcpListener,
    limits: http::Limits,
    health: Health,
    table_sync: TableSync,
    subscriber: Subscriber,
    services: Arc<Services>,
    view: Arc<ViewState>,
    table: watch::Receiver<service::DependencyStatus>,
    hosts: Hosts,
}

impl Viewer {
    /// Listens on `VIEWER_ADDR`.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn open(config: Config, health: &Health) -> anyhow::Result<Self> {
        describe_metrics();
        let address = config.view.viewer_addr;
        let listener = http::listen(address)
            .with_context(|| format!("cannot listen on VIEWER_ADDR={address}"))?;
        let services = Services::new(config.services()).context("cannot build the HTTP client")?;
        let subscriber = Subscriber::new(&config.events.exchange(), "viewer");
        let view = Arc::new(ViewState::new());
        let not_yet = || watch::channel(Err("not read yet".to_owned()));
        let ((table, watched), (first_reading, is_read)) = (not_yet(), not_yet());
        // Decision: docs/decisions/0053-when-is-the-viewer-ready.md
        // Once it has read the table, it shows what it knows, with a word about what is away: without
        // that, whatever balances the load would take away all viewers at once.
        health.add_required("first reading of the table", is_read);
        health.add_optional("table", watched.clone());
        health.add_optional("events", subscriber.status());
        health.finish_registration();
        let limits = http::Limits {
            max_connections: config.view.viewer_max_connections,
            quiet_period: FAREWELL,
            ..http::Limits::default()
        };
        let table_sync =
            TableSync { view: Arc::clone(&view), store: config.store, table, first_reading };
        let services = Arc::new(services);
        let (health, hosts) = (health.clone(), Hosts::new(&config.view.viewer_hosts));
        Ok(Self {
            listener,
            limits,
            health,
            table_sync,
            subscriber,
            services,
            view,
            table: watched,
            hosts,
        })
    }

    /// The address that it listens on, with the port that was free if any was asked for.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `shutdown`, and then ends each subscription.
    ///
    /// # Errors
    /// When a part that it needs has died.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.address()?, "showing who is online");
        let Self { listener, limits, health, table_sync, subscriber, services, view, table, hosts } =
            self;
        let shared = Shared {
            view: Arc::clone(&view),
            services: Arc::clone(&services),
            subscribers: Subscribers::default(),
            table,
            events: subscriber.status(),
            shutdown: shutdown.clone(),
            hosts,
        };
        let router = api::router(shared).merge(health_routes(health));
        // Each as a task of its own, so that a large table holds up no answer, and a panic is seen.
        let mut parts = tokio::task::JoinSet::new();
        parts.spawn(table_sync.run(subscriber));
        parts.spawn(async move { match view.publish().await {} });
        parts.spawn(async move { match services.ask().await {} });
        tokio::select! {
            () = http::serve(listener, router, limits, shutdown) => Ok(()),
            ended = parts.join_next() => bail!("a part of the viewer has died: {ended:?}"),
        }
    }
}

fn describe_metrics() {
    metrics::describe_gauge!("lastseen_viewer_objects", "Objects that are online.");
    metrics::describe_gauge!("lastseen_viewer_subscribers", "Connected to the stream of changes.");
    metrics::describe_counter!(
        "lastseen_viewer_slow_subscribers_total",
        "Subscribers that were disconnected, being too slow."
    );
    metrics::describe_counter!(
        "lastseen_viewer_events_missed_total",
        "Times that events may have been missed; each is a reason to read the table."
    );
    metrics::describe_counter!(
        "lastseen_viewer_readings_total",
        "Readings of the table by outcome."
    );
    for counter in ["lastseen_viewer_slow_subscribers_total", "lastseen_viewer_events_missed_total"]
    {
        metrics::counter!(counter).increment(0);
    }
    for outcome in ["ok", "failed"] {
        metrics::counter!("lastseen_viewer_readings_total", "outcome" => outcome).increment(0);
    }
    for gauge in ["lastseen_viewer_objects", "lastseen_viewer_subscribers"] {
        metrics::gauge!(gauge).set(0.0);
    }
}
