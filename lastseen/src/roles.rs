//! Runs all roles in one process. The roles start in the order of their dependencies, and the
//! simulated status API stops last.

use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use consumer::Lookups;
use messaging::events::Exchange;
use messaging::queue::Broker;
use producer::CallbackServer;
use runtime::http::reachable_ip;
use runtime::{CancellationToken, Context, Reloadable, Supervisor};
use store::Database;
use tester::api::Api;
use tester::partner::Partner;
use tokio::task::JoinSet;
use url::Url;
use viewer::Viewer;

use crate::banner::Addresses;
use crate::{Config, banner, status_line};

/// All roles, not started yet: their settings, and the broker and the database that they share.
pub(crate) struct AllRoles {
    config: Config,
    broker: Broker,
    database: Database,
}

impl AllRoles {
    pub(crate) fn open(config: Config, supervisor: &Supervisor) -> anyhow::Result<Self> {
        let broker = config.broker().open(supervisor)?;
        let database = config.store().open(supervisor)?;
        Ok(Self { config, broker, database })
    }

    /// Runs the roles until `shutdown`. The simulated status API stops last, because the lookups in
    /// flight need it.
    ///
    /// # Errors
    /// When a role cannot start, fails, or ends before `shutdown`.
    pub(crate) async fn run(
        self,
        reloadable: Reloadable<Config>,
        context: Context,
    ) -> anyhow::Result<()> {
        let Context { health, shutdown, supervisor } = &context;
        let Self { config, broker, database } = self;
        let database = database.with_retention(reloadable.map(|config| config.history));
        // Reports where a damaged file is kept. The process works with a new file instead.
        for (name, kept) in [("intact queue", broker.kept()), ("intact table", database.kept())] {
            if let Some(kept) = kept {
                health.add_optional(name, kept);
            }
        }
        let without = config.without;
        // Before any role starts, because invalid groups end the process.
        let groups = if without.no_viewer {
            None
        } else {
            let mut groups = config.groups.clone();
            groups.groups_cache.get_or_insert_with(|| config.lastseen_dir.join("groups.cache"));
            groups.load(reloadable.map(|config| config.cleanup.object_ttl)).await?
        };
        let mut lookups = config.lookups.clone();
        let mut partner_callbacks = config.partner_callbacks.clone().into_inner();
        // On RabbitMQ, other programs receive the events too.
        let on_rabbitmq = |access| Exchange::on_rabbitmq(access, &broker.destination().name);
        let exchange = broker.access().map_or_else(Exchange::in_process, on_rabbitmq);
        let mut roles = RunningRoles { tasks: JoinSet::new(), shutdown: shutdown.clone() };

        let api = if without.api() {
            None
        } else {
            let address = config.api.tester_addr;
            let api = Api::bind(config.api.clone().into_inner());
            let api = api.with_context(|| format!("cannot listen on TESTER_ADDR={address}"))?;
            lookups.tester_endpoint = url_of(api.address()?, "")?;
            Some(api)
        };
        let status_api = (!without.no_consumer).then(|| lookups.tester_endpoint.clone());
        let mut callbacks_url = None;
        if !without.no_producer {
            let mut callbacks = config.callbacks.clone();
            callbacks.spool_dir.get_or_insert_with(|| config.lastseen_dir.join("spool"));
            let authenticity = config.authenticity.clone();
            let (broker, context) = (broker.clone(), context.role("producer"));
            let producer = CallbackServer::open(callbacks, authenticity, broker, context).await?;
            let url = url_of(producer.address()?, "callback")?;
            partner_callbacks.callback_endpoint = url.clone();
            callbacks_url = Some(url);
            roles.start("producer", producer.serve());
        }
        if !without.no_consumer {
            let resources = consumer::Resources {
                broker: broker.clone(),
                database: database.clone(),
                exchange: exchange.clone(),
            };
            let lookups = reloadable_lookups(&reloadable, lookups.tester_endpoint);
            let consumer = consumer::run_with(lookups, resources, context.role("consumer"));
            roles.start("consumer", consumer);
        }
        if !without.no_routine {
            let resources =
                routine::Resources { database: database.clone(), exchange: exchange.clone() };
            let cleanup = reloadable.map(|config| config.cleanup);
            let routine = routine::run_with(cleanup, resources, context.role("routine"));
            roles.start("routine", routine);
        }
        let mut viewer_url = None;
        if !without.no_viewer {
            let store = config.store();
            let resources = viewer::Resources { store, exchange, groups, is_pipeline: true };
            let mut view = config.view.clone();
            let snapshot = || config.lastseen_dir.join("viewer.snapshot");
            view.viewer_snapshot.get_or_insert_with(snapshot);
            let viewer = Viewer::open(&view, resources, context.role("viewer"))?;
            viewer_url = Some(url_of(viewer.address()?, "")?);
            roles.start("viewer", viewer.serve());
        }
        if !without.partner() {
            let authenticity = config.authenticity.clone();
            let partner = config.partner.clone().into_inner();
            let partner = Partner::new(partner_callbacks, authenticity, partner);
            let partner = partner.context("cannot build the HTTP client")?;
            let shutdown = shutdown.clone();
            roles.start("partner", async move {
                partner.post_until(shutdown).await;
                Ok(())
            });
        }
        let api_shutdown = CancellationToken::new();
        let api = api.map(|api| {
            supervisor.spawn_critical("simulated status API", api.serve(api_shutdown.clone()))
        });
        health.finish_registration();
        let addresses = Addresses { viewer: viewer_url, callbacks: callbacks_url, status_api };
        banner::print(&config, &addresses)?;
        let status_line = status_line::draw(config.broker(), config.store(), shutdown.clone());
        roles.start("status line", async move {
            status_line.await;
            Ok(())
        });

        roles.wait_for_all().await?;
        if let Some(api) = api {
            let finished = api.finish();
            api_shutdown.cancel();
            finished.await;
        }
        tokio::join!(broker.close(), database.close());
        Ok(())
    }
}

struct RunningRoles {
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl RunningRoles {
    fn start(
        &mut self,
        name: &'static str,
        role: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.tasks.spawn(async move { (name, role.await) });
    }

    /// Waits until all roles have ended. Fails if one fails, or ends before the shutdown.
    async fn wait_for_all(&mut self) -> anyhow::Result<()> {
        while let Some(joined) = self.tasks.join_next().await {
            let (name, result) = joined.context("a role panicked")?;
            result.with_context(|| format!("{name} failed"))?;
            if !self.shutdown.is_cancelled() {
                bail!("{name} stopped unexpectedly");
            }
        }
        Ok(())
    }
}

/// The settings of lookups, which follow the settings file except for the address of the status
/// API: only this process knows the address of the simulated status API.
fn reloadable_lookups(
    reloadable: &Reloadable<Config>,
    tester_endpoint: Url,
) -> Reloadable<Lookups> {
    reloadable
        .map(move |config| Lookups { tester_endpoint: tester_endpoint.clone(), ..config.lookups })
}

/// The URL by which a process on this machine reaches a server that listens on `address`.
fn url_of(address: SocketAddr, path: &str) -> anyhow::Result<Url> {
    let address = SocketAddr::new(reachable_ip(address.ip()), address.port());
    let url = format!("http://{address}/{path}");
    url.parse().with_context(|| format!("cannot make a URL of {address}"))
}
