//! Builds the viewer from its parts and serves it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use messaging::events::{Emitter, Exchange, Subscriber};
use runtime::{Context, health_routes, http};
use store::History;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::api::{self, Shared};
use crate::config::View;
use crate::groups::{LoadedGroups, Parts};
use crate::history::HistoryReader;
use crate::hosts::Hosts;
use crate::metrics_scraper::MetricsScraper;
use crate::snapshot::Snapshot;
use crate::stream::Subscribers;
use crate::table_sync::TableSync;
use crate::view_state::ViewState;

/// After the stop signal, the viewer ends once no request has arrived for this time. The time is
/// short, because clients can repeat every request of the viewer.
const QUIET_PERIOD: Duration = Duration::from_millis(200);

/// The viewer: it listens, but does not serve yet.
pub struct Viewer {
    listener: TcpListener,
    limits: http::Limits,
    router: Router,
    context: Context,
    table_sync: TableSync,
    subscriber: Subscriber,
    scraper: Arc<MetricsScraper>,
    history: HistoryReader,
    groups: Option<Parts>,
}

/// The resources of the viewer.
pub struct Resources {
    /// Where the table is. Each reading opens a new connection.
    pub store: store::Config,
    /// The exchange from which the viewer receives events about changes.
    pub exchange: Exchange,
    /// The groups, if there are any.
    pub groups: Option<LoadedGroups>,
    /// Whether the services run in this process, so that their metrics need no scrape over HTTP.
    pub is_pipeline: bool,
}

impl Viewer {
    /// Listens on `VIEWER_ADDR`.
    ///
    /// # Errors
    /// When it cannot listen on the address.
    pub fn open(view: &View, resources: Resources, context: Context) -> anyhow::Result<Self> {
        describe_metrics();
        let health = &context.health;
        let Resources { store, exchange, groups, is_pipeline } = resources;
        let address = view.viewer_addr;
        let listener = http::listen(address)
            .with_context(|| format!("cannot listen on VIEWER_ADDR={address}"))?;
        let scraper = MetricsScraper::new(view.metrics_sources(is_pipeline))
            .context("cannot build the HTTP client")?;
        let scraper = Arc::new(scraper);
        let subscriber = Subscriber::new(&exchange, "viewer");
        let state = Arc::new(ViewState::new());
        let status_channel = || watch::channel(Err("not read yet".to_owned()));
        let (table_sender, table_status) = status_channel();
        let (first_reading_sender, first_reading) = status_channel();
        // Decision: docs/decisions/0053-when-is-the-viewer-ready.md
        // After its first reading, the viewer stays ready without the table or events and reports
        // them as away. Otherwise an outage would make all viewers unready, and the load balancer
        // would have none left.
        health.add_required("first reading of the table", first_reading);
        health.add_optional("table", table_status.clone());
        health.add_optional("events", subscriber.status());
        let groups_history = store.history.is_on().then(|| History::new(&store));
        let groups = groups.map(|groups| {
            let emitter = Emitter::start(&exchange, "viewer groups", &context.supervisor);
            if let Some(status) = emitter.status() {
                health.add_optional("events of groups", status);
            }
            groups.into_parts(groups_history, emitter)
        });
        if let Some(groups) = &groups {
            health.add_optional("groups file", groups.status.clone());
        }
        health.finish_registration();
        let limits = http::Limits {
            max_connections: view.viewer_max_connections,
            quiet_period: QUIET_PERIOD,
            ..http::Limits::default()
        };
        let history = HistoryReader::new(&store);
        let router = api::router(Shared {
            view: Arc::clone(&state),
            scraper: Arc::clone(&scraper),
            subscribers: Subscribers::default(),
            table_status,
            events_status: subscriber.status(),
            history: history.clone(),
            groups: groups.as_ref().map(|parts| Arc::clone(&parts.groups)),
            shutdown: context.shutdown.clone(),
            hosts: Hosts::new(&view.viewer_hosts),
        });
        let router = router.merge(health_routes(health.clone()));
        let readings_history = store.history.is_on().then(|| History::new(&store));
        let snapshot = view.viewer_snapshot.clone().zip(readings_history.clone());
        let snapshot =
            snapshot.map(|(path, history)| Snapshot::new(path, Arc::clone(&state), history));
        let table_sync = TableSync {
            view: state,
            store,
            table_status: table_sender,
            first_reading: first_reading_sender,
            history: readings_history,
            snapshot,
            groups: groups.as_ref().map(|parts| Arc::clone(&parts.groups)),
        };
        Ok(Self {
            listener,
            limits,
            router,
            context,
            table_sync,
            subscriber,
            scraper,
            history,
            groups,
        })
    }

    /// The address that the viewer listens on, with the actual port if the setting was port 0.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the shutdown, and then ends each subscription.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub async fn serve(self) -> anyhow::Result<()> {
        tracing::info!(address = %self.address()?, "serving the page and the API");
        let Self {
            listener,
            limits,
            router,
            context,
            table_sync,
            subscriber,
            scraper,
            history,
            groups,
        } = self;
        let Context { shutdown, supervisor, .. } = context;
        let view = Arc::clone(&table_sync.view);
        let snapshot = table_sync.snapshot.clone();
        let save = snapshot.clone().map(|snapshot| {
            let save = async move { match snapshot.save_repeatedly().await {} };
            supervisor.spawn_critical("snapshot", save)
        });
        let (follower, watch) = groups.map(|parts| (parts.follower, parts.watch)).unzip();
        let _watch =
            watch.map(|watch| supervisor.spawn_critical("watch of the groups", watch.run()));
        // Separate tasks, so that a large table delays no response.
        let _tasks = [
            supervisor.spawn_critical("table sync", table_sync.run(subscriber)),
            supervisor.spawn_critical("publisher of changes", async move {
                match view.publish(follower).await {}
            }),
            supervisor
                .spawn_critical("metrics scraper", async move { match scraper.run().await {} }),
        ];
        let _feed = history.spawn(&supervisor);
        http::serve(listener, router, limits, shutdown).await;
        drop(save);
        if let Some(snapshot) = snapshot {
            snapshot.save_at_the_end().await;
        }
        Ok(())
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
