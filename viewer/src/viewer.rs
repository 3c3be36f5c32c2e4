//! Builds the viewer from its parts and serves it.

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
use crate::metrics_scraper::MetricsScraper;
use crate::stream::Subscribers;
use crate::table_sync::TableSync;
use crate::view_state::ViewState;

/// How long open requests may take after the stop signal. It is short, because clients can repeat
/// every request of the viewer.
const FAREWELL: Duration = Duration::from_millis(200);

/// The viewer: it listens, but does not serve yet.
pub struct Viewer {
    listener: TcpListener,
    limits: http::Limits,
    health: Health,
    table_sync: TableSync,
    subscriber: Subscriber,
    scraper: Arc<MetricsScraper>,
    view: Arc<ViewState>,
    table_status: watch::Receiver<service::DependencyStatus>,
    hosts: Hosts,
}

impl Viewer {
    /// Listens on `VIEWER_ADDR`.
    ///
    /// # Errors
    /// When it cannot listen on the address.
    pub fn open(config: Config, health: &Health) -> anyhow::Result<Self> {
        describe_metrics();
        let address = config.view.viewer_addr;
        let listener = http::listen(address)
            .with_context(|| format!("cannot listen on VIEWER_ADDR={address}"))?;
        let scraper = MetricsScraper::new(config.metrics_sources())
            .context("cannot build the HTTP client")?;
        let subscriber = Subscriber::new(&config.events.exchange(), "viewer");
        let view = Arc::new(ViewState::new());
        let unread = || watch::channel(Err("not read yet".to_owned()));
        let (table_sender, table_status) = unread();
        let (first_reading_sender, first_reading) = unread();
        // Decision: docs/decisions/0053-when-is-the-viewer-ready.md
        // After its first reading, the viewer stays ready without the table or events and reports
        // them as away. Otherwise a load balancer would remove all viewers at once.
        health.add_required("first reading of the table", first_reading);
        health.add_optional("table", table_status.clone());
        health.add_optional("events", subscriber.status());
        health.finish_registration();
        let limits = http::Limits {
            max_connections: config.view.viewer_max_connections,
            quiet_period: FAREWELL,
            ..http::Limits::default()
        };
        let table_sync = TableSync {
            view: Arc::clone(&view),
            store: config.store,
            table_status: table_sender,
            first_reading: first_reading_sender,
        };
        let scraper = Arc::new(scraper);
        let (health, hosts) = (health.clone(), Hosts::new(&config.view.viewer_hosts));
        Ok(Self {
            listener,
            limits,
            health,
            table_sync,
            subscriber,
            scraper,
            view,
            table_status,
            hosts,
        })
    }

    /// The address that the viewer listens on, with the actual port if the setting was port 0.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, and then ends each subscription.
    ///
    /// # Errors
    /// When one of its tasks has ended.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.address()?, "serving the page and the API");
        let Self {
            listener,
            limits,
            health,
            table_sync,
            subscriber,
            scraper,
            view,
            table_status,
            hosts,
        } = self;
        let shared = Shared {
            view: Arc::clone(&view),
            scraper: Arc::clone(&scraper),
            subscribers: Subscribers::default(),
            table_status,
            events_status: subscriber.status(),
            shutdown: shutdown.clone(),
            hosts,
        };
        let router = api::router(shared).merge(health_routes(health));
        // Separate tasks, so that a large table delays no response, and a panic ends the process.
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(table_sync.run(subscriber));
        tasks.spawn(async move { match view.publish().await {} });
        tasks.spawn(async move { match scraper.run().await {} });
        tokio::select! {
            () = http::serve(listener, router, limits, shutdown) => Ok(()),
            ended = tasks.join_next() => bail!("a task of the viewer ended: {ended:?}"),
        }
    }
}

fn describe_metrics() {
    metrics::describe_gauge!("lastseen_viewer_objects", "Objects that are online.");
    metrics::describe_gauge!(
        "lastseen_viewer_subscribers",
        "Clients connected to the event stream."
    );
    metrics::describe_counter!(
        "lastseen_viewer_slow_subscribers_total",
        "Subscribers that were disconnected because they were too slow."
    );
    metrics::describe_counter!(
        "lastseen_viewer_events_missed_total",
        "Times that events may have been missed; the viewer then reads the table."
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
