//! Reads the metrics of all services and aggregates them.

mod pipeline_metrics;
mod replicas;
mod text_format;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use reqwest::header::HOST;
use reqwest::{Client, Url};
use tokio::time::MissedTickBehavior;

use self::pipeline_metrics::{Scrape, ServiceStatus, aggregate};
use self::replicas::{Replicas, Resolver, resolve_by_system};
use crate::config::MetricsSource;

pub(crate) use self::pipeline_metrics::PipelineMetrics;

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(900);
/// Bound of one response; the metrics of a Lastseen service have about 20 KB.
const BYTES_MAX: usize = 2 << 20;

/// Reads the metrics of each service every second.
pub(crate) struct MetricsScraper {
    /// Only [`Self::run`] locks it.
    targets: tokio::sync::Mutex<Vec<ScrapeTarget>>,
    /// `None` if all services run in this process, because building a client is slow.
    client: Option<Client>,
    metrics: Mutex<PipelineMetrics>,
}

/// A service to scrape.
struct ScrapeTarget {
    source: MetricsSource,
    /// `None` if the source is this process.
    replicas: Option<Replicas>,
    /// The previous scrape of each replica, by its address; this process has the key `None`.
    previous: HashMap<Option<SocketAddr>, Scrape>,
}

/// The scrape of each replica, with its address.
type ScrapeResults = Vec<(Option<SocketAddr>, Result<Scrape, String>)>;

impl MetricsScraper {
    pub(crate) fn new(sources: Vec<MetricsSource>) -> reqwest::Result<Self> {
        Self::with_resolver(sources, resolve_by_system)
    }

    fn with_resolver(sources: Vec<MetricsSource>, resolver: Resolver) -> reqwest::Result<Self> {
        let needs_client = sources.iter().any(|source| matches!(source, MetricsSource::Url(_)));
        let client = needs_client.then(|| {
            Client::builder()
                .timeout(TIMEOUT)
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .build()
        });
        let client = client.transpose()?;
        let target = |source| {
            let replicas = match &source {
                MetricsSource::Url(url) => Some(Replicas::of(url, resolver)),
                MetricsSource::ThisProcess => None,
            };
            ScrapeTarget { source, replicas, previous: HashMap::new() }
        };
        let targets: Vec<_> = sources.into_iter().map(target).collect();
        Ok(Self { targets: targets.into(), client, metrics: Mutex::default() })
    }

    pub(crate) fn metrics(&self) -> PipelineMetrics {
        self.metrics.lock().clone()
    }

    /// Scrapes all services at each interval, forever.
    pub(crate) async fn run(&self) -> std::convert::Infallible {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.scrape_all().await;
        }
    }

    async fn scrape_all(&self) {
        let mut targets = self.targets.lock().await;
        let client = self.client.as_ref();
        let scrapes = join_all(targets.iter_mut().map(|target| target.scrape(client))).await;
        let mut services = Vec::new();
        let mut pairs = Vec::new();
        for (target, results) in targets.iter_mut().zip(scrapes) {
            let scrapes = results.iter().flat_map(|(_, result)| result);
            let settings = scrapes.into_iter().find_map(Scrape::settings_problem);
            let url = match &target.source {
                MetricsSource::ThisProcess => "this process".to_owned(),
                MetricsSource::Url(url) => url.to_string(),
            };
            let status = status(&results);
            services.push(ServiceStatus { url, status, settings });
            // `take` also drops the previous scrapes of replicas that did not answer.
            let mut previous = std::mem::take(&mut target.previous);
            for (address, result) in results {
                let Ok(now) = result else { continue };
                target.previous.insert(address, now.clone());
                pairs.push((previous.remove(&address), now));
            }
        }
        drop(targets);
        *self.metrics.lock() = aggregate(services, &pairs);
    }
}

/// "ok" if all replicas answered; otherwise the first failure.
fn status(results: &ScrapeResults) -> String {
    let failed: Vec<_> = results.iter().filter_map(|(_, result)| result.as_ref().err()).collect();
    match failed.as_slice() {
        [] => "ok".to_owned(),
        [reason, ..] if results.len() == 1 => (*reason).clone(),
        [reason, ..] => format!("{} of {} replicas: {reason}", failed.len(), results.len()),
    }
}

impl ScrapeTarget {
    /// Reads the metrics of each replica.
    async fn scrape(&mut self, client: Option<&Client>) -> ScrapeResults {
        let (MetricsSource::Url(url), Some(replicas), Some(client)) =
            (&self.source, &mut self.replicas, client)
        else {
            return vec![(None, Ok(Scrape::of_this_process()))];
        };
        let addresses = match replicas.addresses().await {
            Ok(addresses) => addresses,
            Err(reason) => return vec![(None, Err(reason))],
        };
        let scrape = async |addresses: Vec<SocketAddr>| {
            let fetches = addresses.into_iter().map(async |address| {
                let text = fetch(client, url, address).await;
                (Some(address), text.map(|text| Scrape::of_text(&text)))
            });
            join_all(fetches).await
        };
        let results = scrape(addresses.preferred).await;
        let all_failed = results.iter().all(|(_, result)| result.is_err());
        if all_failed && !addresses.others.is_empty() {
            scrape(addresses.others).await
        } else {
            results
        }
    }
}

/// Reads `url` from the replica at `address`.
async fn fetch(client: &Client, url: &Url, address: SocketAddr) -> Result<String, String> {
    let mut at_address = url.clone();
    if at_address.set_ip_host(address.ip()).is_err() {
        return Err("the URL cannot have an address as its host".to_owned());
    }
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let host = format!("{}{port}", url.host_str().unwrap_or_default());
    let failed = |error: reqwest::Error| {
        // The status shows the URL beside this text.
        let error = error.without_url();
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    };
    let mut response = client.get(at_address).header(HOST, host).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(format!("answered {}", response.status()));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > BYTES_MAX {
            return Err(format!("the response is larger than {BYTES_MAX} bytes"));
        }
    }
    String::from_utf8(bytes).map_err(|_| "the response is not UTF-8 text".to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// Answers each request with a gauge of value `count`, until the test ends.
    async fn serve(listener: TcpListener, count: u32) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1_024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].windows(20).any(|part| part == b"host: consumers.test"));
            let body = format!("lastseen_lookups_in_flight {count}\n");
            let length = body.len();
            let response = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(response.as_bytes()).await.unwrap();
        }
    }

    /// Field case 6.10.
    #[tokio::test]
    async fn all_replicas_behind_one_name_are_scraped() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = first.local_addr().unwrap().port();
        let second = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
        tokio::spawn(serve(first, 29));
        tokio::spawn(serve(second, 34));
        let resolver: Resolver = |host, port| {
            assert_eq!(host, "consumers.test");
            let addresses = [1, 2].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
            Box::pin(async move { Ok(addresses.to_vec()) })
        };
        let url = format!("http://consumers.test:{port}/metrics").parse().unwrap();
        let sources = vec![MetricsSource::Url(url)];
        let scraper = MetricsScraper::with_resolver(sources, resolver).unwrap();
        scraper.scrape_all().await;
        let metrics = scraper.metrics();
        let in_flight = metrics.lookups_in_flight.map(|count| count.to_string());
        let statuses: Vec<_> =
            metrics.services.iter().map(|service| service.status.as_str()).collect();
        assert_eq!((in_flight.as_deref(), statuses), (Some("63"), vec!["ok"]));
    }
}
