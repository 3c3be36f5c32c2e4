//! Runs all roles in one process. They start and stop in the order of their dependencies.

use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use consumer::Lookups;
use producer::CallbackServer;
use service::http::reachable_ip;
use service::{CancellationToken, Health, Reloadable};
use tester::api::Api;
use tester::partner::Partner;
use tokio::task::JoinSet;
use url::Url;
use viewer::Viewer;

use crate::banner::Addresses;
use crate::{Config, banner, status_line};

/// All roles with their settings and their files, which are open but not yet in use.
pub(crate) struct AllRoles {
    config: Config,
    broker: broker::Config,
    store: store::Config,
    claims: (broker::Claim, store::Claim),
}

impl AllRoles {
    /// Opens the files.
    ///
    /// # Errors
    /// When a file cannot be opened, or another process has it.
    pub(crate) fn open(config: Config) -> anyhow::Result<Self> {
        let (broker, store) = (config.broker(), config.store());
        let claims = (broker.claim()?, store.claim()?);
        Ok(Self { config, broker, store, claims })
    }

    /// Runs the roles until `shutdown`. The simulated status API stops last, because the lookups in
    /// flight need it.
    ///
    /// # Errors
    /// When a role cannot start, fails, or ends before `shutdown`.
    pub(crate) async fn run(
        self,
        reloadable: Reloadable<Config>,
        health: Health,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let Self { config, broker, store, claims } = self;
        report_kept_files(&claims, &health);
        let without = config.without;
        let mut lookups = config.lookups.clone();
        let mut partner_callbacks = config.partner_callbacks.clone().into_inner();
        let exchange = config.exchange();
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
            let producer = producer::Config { callbacks, authenticity, broker: broker.clone() };
            let producer = CallbackServer::open(&producer, &health.role("producer")).await?;
            let url = url_of(producer.address()?, "callback")?;
            partner_callbacks.callback_endpoint = url.clone();
            callbacks_url = Some(url);
            roles.start("producer", producer.serve(shutdown.clone()));
        }
        if !without.no_consumer {
            let consumer = consumer::Config {
                lookups,
                broker: broker.clone(),
                store: store.clone(),
                events: Some(exchange.clone()),
            };
            let consumer = consumer_settings(&reloadable, consumer);
            let health = health.role("consumer");
            roles.start("consumer", consumer::run(consumer, health, shutdown.clone()));
        }
        if !without.no_routine {
            let events = events::Config::with_exchange(exchange.clone());
            let store = store.clone();
            let routine = reloadable.map(move |config| routine::Config {
                cleanup: config.cleanup,
                once: false,
                store: store.clone(),
                events: events.clone(),
            });
            roles.start("routine", routine::run(routine, health.role("routine"), shutdown.clone()));
        }
        let mut viewer_url = None;
        if !without.no_viewer {
            let events = events::Config::with_exchange(exchange.clone());
            let view = config.view.clone();
            let viewer = viewer::Config { view, events, store: store.clone(), scrapes_self: true };
            let viewer = Viewer::open(viewer, &health.role("viewer"))?;
            viewer_url = Some(url_of(viewer.address()?, "")?);
            roles.start("viewer", viewer.serve(shutdown.clone()));
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
        let api = tokio::spawn({
            let shutdown = api_shutdown.clone();
            async move {
                match api {
                    Some(api) => api.serve(shutdown).await,
                    None => shutdown.cancelled().await,
                }
            }
        });
        health.finish_registration();
        let addresses = Addresses { viewer: viewer_url, callbacks: callbacks_url, status_api };
        banner::print(&config, &addresses)?;
        let status_line = status_line::draw(broker, store, shutdown);
        roles.start("status line", async move {
            status_line.await;
            Ok(())
        });

        let mut api = std::pin::pin!(api);
        tokio::select! {
            result = roles.wait_for_all() => result?,
            _ = &mut api => bail!("the simulated status API stopped unexpectedly"),
        }
        api_shutdown.cancel();
        api.await.context("the simulated status API failed")?;
        tokio::join!(claims.0.close(), claims.1.close());
        Ok(())
    }
}

/// Shows in `health` where a damaged file is kept. The process works with a new file instead.
fn report_kept_files((queue, table): &(broker::Claim, store::Claim), health: &Health) {
    if let Some(kept) = queue.kept() {
        health.add_optional("intact queue", kept);
    }
    if let Some(kept) = table.kept() {
        health.add_optional("intact table", kept);
    }
}

/// The roles that run.
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

/// The consumer's settings, in which the reloadable lookup settings change. The address of the
/// status API does not: it may be that of the simulated one.
fn consumer_settings(
    reloadable: &Reloadable<Config>,
    consumer: consumer::Config,
) -> Reloadable<consumer::Config> {
    reloadable.map(move |config| {
        let tester_endpoint = consumer.lookups.tester_endpoint.clone();
        let lookups = Lookups { tester_endpoint, ..config.lookups };
        consumer::Config { lookups, ..consumer.clone() }
    })
}

/// The URL by which a process on this machine reaches a server that listens on `address`.
fn url_of(address: SocketAddr, path: &str) -> anyhow::Result<Url> {
    let address = SocketAddr::new(reachable_ip(address.ip()), address.port());
    let url = format!("http://{address}/{path}");
    url.parse().with_context(|| format!("cannot make a URL of {address}"))
}
