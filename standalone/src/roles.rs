//! The roles of one process, begun and ended in the order in which they need each other.

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

/// What the roles are to play with: the settings, and the files, open for this process.
pub(crate) struct Stage {
    pub(crate) config: Config,
    pub(crate) broker: broker::Config,
    pub(crate) store: store::Config,
    claims: (broker::Claim, store::Claim),
}

/// A file that was damaged is kept beside the new one. The process works without it, and says so.
fn report_kept_files((queue, table): &(broker::Claim, store::Claim), health: &Health) {
    if let Some(kept) = queue.kept() {
        health.add_optional("intact queue", kept);
    }
    if let Some(kept) = table.kept() {
        health.add_optional("intact table", kept);
    }
}

impl Stage {
    /// Opens the files.
    ///
    /// # Errors
    /// When one of them cannot be had.
    pub(crate) fn set(config: Config) -> anyhow::Result<Self> {
        let (broker, store) = (config.broker(), config.store());
        let claims = (broker.claim()?, store.claim()?);
        Ok(Self { config, broker, store, claims })
    }

    /// Plays the roles until `shutdown`. The simulated status API goes last: what is in flight needs it.
    ///
    /// # Errors
    /// When one of them cannot begin, or ends before it is told to.
    pub(crate) async fn play(
        self,
        live: Reloadable<Config>,
        health: Health,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let Self { config, broker, store, claims } = self;
        report_kept_files(&claims, &health);
        let without = config.without;
        let mut lookups = config.lookups.clone();
        let mut partners_callbacks = config.partners_callbacks.clone().into_inner();
        let exchange = config.exchange();
        let mut roles = Roles { running: JoinSet::new(), shutdown: shutdown.clone() };

        let api = if without.api() {
            None
        } else {
            let address = config.api.tester_addr;
            let api = Api::bind(config.api.clone().into_inner());
            let api = api.with_context(|| format!("cannot listen on TESTER_ADDR={address}"))?;
            lookups.tester_endpoint = url_of(api.address()?, "")?;
            Some(api)
        };
        let lookups_at = (!without.no_consumer).then(|| lookups.tester_endpoint.clone());
        let mut callbacks_to = None;
        if !without.no_producer {
            let mut callbacks = config.callbacks.clone();
            callbacks.spool_dir.get_or_insert_with(|| config.lastseen_dir.join("spool"));
            let authenticity = config.authenticity.clone();
            let door = producer::Config { callbacks, authenticity, broker: broker.clone() };
            let door = CallbackServer::open(&door, &health.role("producer")).await?;
            let url = url_of(door.address()?, "callback")?;
            partners_callbacks.callback_endpoint = url.clone();
            callbacks_to = Some(url);
            roles.begin("producer", door.serve(shutdown.clone()));
        }
        if !without.no_consumer {
            let consumer = consumer::Config {
                lookups,
                broker: broker.clone(),
                store: store.clone(),
                events: Some(exchange.clone()),
            };
            let consumer = with_lookups_of(&live, consumer);
            let health = health.role("consumer");
            roles.begin("consumer", consumer::run(consumer, health, shutdown.clone()));
        }
        if !without.no_routine {
            let events = events::Config::with_exchange(exchange.clone());
            let store = store.clone();
            let routine = live.map(move |now| routine::Config {
                cleanup: now.cleanup,
                once: false,
                store: store.clone(),
                events: events.clone(),
            });
            roles.begin("routine", routine::run(routine, health.role("routine"), shutdown.clone()));
        }
        let mut shown_at = None;
        if !without.no_viewer {
            let events = events::Config::with_exchange(exchange.clone());
            let view = config.view.clone();
            let viewer = viewer::Config { view, events, store: store.clone(), is_among_them: true };
            let viewer = Viewer::open(viewer, &health.role("viewer"))?;
            shown_at = Some(url_of(viewer.address()?, "")?);
            roles.begin("viewer", viewer.serve(shutdown.clone()));
        }
        if !without.partner() {
            let authenticity = config.authenticity.clone();
            let partner = config.partner.clone().into_inner();
            let partner = Partner::new(partners_callbacks, authenticity, partner);
            let partner = partner.context("cannot build the HTTP client")?;
            let shutdown = shutdown.clone();
            roles.begin("partner", async move {
                partner.post_until(shutdown).await;
                Ok(())
            });
        }
        let last = CancellationToken::new();
        let answering = tokio::spawn({
            let last = last.clone();
            async move {
                match api {
                    Some(api) => api.serve(last).await,
                    None => last.cancelled().await,
                }
            }
        });
        health.finish_registration();
        let addresses = Addresses { shown_at, callbacks_to, lookups_at };
        banner::print(&config, &addresses)?;
        let status_line = status_line::draw(broker, store, shutdown);
        roles.begin("status line", async move {
            status_line.await;
            Ok(())
        });

        let mut answering = std::pin::pin!(answering);
        tokio::select! {
            ended = roles.end() => ended?,
            _ = &mut answering => bail!("the simulated status API has died"),
        }
        last.cancel();
        answering.await.context("the simulated status API has died")?;
        tokio::join!(claims.0.close(), claims.1.close());
        Ok(())
    }
}

/// The roles that are being played.
struct Roles {
    running: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Roles {
    fn begin(
        &mut self,
        name: &'static str,
        role: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.running.spawn(async move { (name, role.await) });
    }

    /// Waits until all have ended, which they may not do before they are told to.
    async fn end(&mut self) -> anyhow::Result<()> {
        while let Some(ended) = self.running.join_next().await {
            let (name, ended) = ended.context("a role has died")?;
            ended.with_context(|| format!("{name} failed"))?;
            if !self.shutdown.is_cancelled() {
                bail!("{name} has ended by itself");
            }
        }
        Ok(())
    }
}

/// The consumer's settings, of which the lookups change with the pipeline's. The API stays the one that is
/// played.
fn with_lookups_of(
    live: &Reloadable<Config>,
    consumer: consumer::Config,
) -> Reloadable<consumer::Config> {
    live.map(move |now| {
        let tester_endpoint = consumer.lookups.tester_endpoint.clone();
        let lookups = Lookups { tester_endpoint, ..now.lookups };
        consumer::Config { lookups, ..consumer.clone() }
    })
}

/// How to reach from this machine what listens on `address`.
fn url_of(address: SocketAddr, path: &str) -> anyhow::Result<Url> {
    let address = SocketAddr::new(reachable_ip(address.ip()), address.port());
    let url = format!("http://{address}/{path}");
    url.parse().context("an address should make a URL")
}
