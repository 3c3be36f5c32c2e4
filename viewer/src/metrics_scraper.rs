//! Scrapes the metrics of all services and aggregates them.

mod replicas;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::header::HOST;
use reqwest::{Client, Url};
use serde::Serialize;
use tokio::time::MissedTickBehavior;
use utoipa::ToSchema;

use self::replicas::{Replicas, Resolver, resolve_by_system};
use crate::config::MetricsSource;

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(900);
/// Bound of one response; the metrics of a Lastseen service have about 20 KB.
const BYTES_MAX: usize = 2 << 20;

/// A service, and whether its metrics can be read.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ServiceStatus {
    /// The URL of its metrics; `this process` for the roles of `lastseen`.
    url: String,
    /// `ok`, or why its metrics cannot be read.
    status: String,
    /// The problem with its settings file; null if there is none, or if it is unknown.
    settings: Option<String>,
}

/// Metrics of all services together; null if no service reports the metric.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct PipelineMetrics {
    /// Each service whose metrics the viewer reads.
    services: Vec<ServiceStatus>,
    /// Callbacks answered per second, with any status.
    callbacks_per_second: Option<f64>,
    /// Ids in accepted callbacks per second.
    ids_per_second: Option<f64>,
    /// Lookups ended per second.
    lookups_per_second: Option<f64>,
    /// Lookups started but not yet answered.
    lookups_in_flight: Option<f64>,
    /// Lookups ended per second, by outcome.
    lookups_by_outcome: Option<BTreeMap<String, f64>>,
    /// Messages in the queue that are not delivered to a consumer.
    queue_messages: Option<f64>,
    /// Messages that the system gave up on, kept for a person.
    dead_letters: Option<f64>,
    /// Age of the oldest message in the queue.
    oldest_message_age_seconds: Option<f64>,
    /// Messages in the spools of the producers, which the broker has not confirmed.
    spool_messages: Option<f64>,
    /// State of the circuit breaker around the status API: 0 closed, 1 half-open, 2 paused because
    /// the API asked for it, 3 open (probes only).
    breaker_state: Option<f64>,
}

/// Reads the metrics of each service every second.
pub(crate) struct MetricsScraper {
    /// Only the task that scrapes locks it.
    targets: tokio::sync::Mutex<Vec<ScrapeTarget>>,
    /// `None` if all services run in this process, because building a client is slow.
    client: Option<Client>,
    metrics: Mutex<PipelineMetrics>,
}

/// A service to scrape, with the previous scrape of each replica. This process has no address.
struct ScrapeTarget {
    source: MetricsSource,
    replicas: Option<Replicas>,
    previous: HashMap<Option<SocketAddr>, Scrape>,
}

type ScrapeResults = Vec<(Option<SocketAddr>, Result<Scrape, String>)>;

/// The samples of one replica, by name with labels.
#[derive(Clone)]
struct Scrape {
    samples: HashMap<String, f64>,
    at: Instant,
}

impl MetricsScraper {
    /// # Errors
    /// When the HTTP client cannot be built.
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

    /// The metrics of the latest scrape.
    pub(crate) fn metrics(&self) -> PipelineMetrics {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
            let (url, status) = (target.source.to_string(), status(&results));
            services.push(ServiceStatus { url, status, settings });
            // This forgets replicas that did not answer.
            let mut previous = std::mem::take(&mut target.previous);
            for (address, result) in results {
                let Ok(now) = result else { continue };
                target.previous.insert(address, now.clone());
                pairs.push((previous.remove(&address), now));
            }
        }
        drop(targets);
        *self.metrics.lock().unwrap_or_else(PoisonError::into_inner) =
            PipelineMetrics { services, ..aggregate(&pairs) };
    }
}

impl std::fmt::Display for MetricsSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ThisProcess => formatter.write_str("this process"),
            Self::Url(url) => url.fmt(formatter),
        }
    }
}

/// "ok" if all replicas answered, otherwise the first failure.
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
            return vec![(None, Ok(Scrape::of_text(&service::render_metrics())))];
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

/// Parses the samples in Prometheus's text format, except for histogram buckets. The exporter
/// writes no timestamps, so the value follows the last space.
fn samples(text: &str) -> HashMap<String, f64> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().filter(|line| line.starts_with("lastseen_"));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    lines.filter(|line| !line.contains("_bucket{")).filter_map(sample).collect()
}

/// Aggregates the scrapes of all replicas, each with its previous scrape if there is one.
fn aggregate(scrapes: &[(Option<Scrape>, Scrape)]) -> PipelineMetrics {
    let sum = |name| gauges(scrapes, name).reduce(|one, other| one + other);
    // All replicas report the same queue, so their values must not be added.
    let max = |name| gauges(scrapes, name).reduce(f64::max);
    let rate = |name| rates(scrapes, name).map(|rates| rates.into_values().sum());
    PipelineMetrics {
        services: Vec::new(),
        callbacks_per_second: rate("lastseen_callbacks_total"),
        ids_per_second: rate("lastseen_callback_ids_total"),
        lookups_per_second: rate("lastseen_lookups_total"),
        lookups_in_flight: sum("lastseen_lookups_in_flight"),
        lookups_by_outcome: rates(scrapes, "lastseen_lookups_total"),
        queue_messages: max("lastseen_queue_messages"),
        dead_letters: max("lastseen_dead_letters"),
        oldest_message_age_seconds: max("lastseen_oldest_message_age_seconds"),
        spool_messages: sum("lastseen_spool_messages"),
        breaker_state: max("lastseen_breaker_state"),
    }
}

fn gauges(scrapes: &[(Option<Scrape>, Scrape)], name: &'static str) -> impl Iterator<Item = f64> {
    scrapes.iter().flat_map(move |(_, now)| now.of(name)).map(|(_, value)| value)
}

/// The growth of a counter per second, by its label `outcome`; `None` if no replica reports it.
fn rates(
    scrapes: &[(Option<Scrape>, Scrape)],
    name: &'static str,
) -> Option<BTreeMap<String, f64>> {
    let mut rates = BTreeMap::new();
    for (previous, now) in scrapes {
        let Some(previous) = previous else { continue };
        let seconds = now.at.duration_since(previous.at).as_secs_f64();
        for (key, value) in now.of(name) {
            // A new counter, or one of a restarted process, has counted from 0.
            let previous_value = previous.samples.get(key).filter(|previous| **previous <= value);
            let growth = value - previous_value.copied().unwrap_or(0.0);
            let label = key.split_once("outcome=\"").and_then(|(_, rest)| rest.split_once('"'));
            let outcome = label.map_or("", |(outcome, _)| outcome).to_owned();
            *rates.entry(outcome).or_default() += growth / seconds.max(0.001);
        }
    }
    (!rates.is_empty()).then_some(rates)
}

impl Scrape {
    fn of_text(text: &str) -> Self {
        Self { samples: samples(text), at: Instant::now() }
    }

    /// The problem with this process's settings file, if it reports one.
    fn settings_problem(&self) -> Option<String> {
        let of = |name| self.of(name).map(|(_, value)| value).sum::<f64>();
        if of("lastseen_settings_refused") > 0.0 {
            let rejected =
                "the file was rejected and the old settings apply; see the service's log";
            return Some(rejected.to_owned());
        }
        let awaiting = of("lastseen_settings_awaiting_restart");
        (awaiting > 0.0).then(|| format!("changed settings that need a restart: {awaiting}"))
    }

    /// The samples of one metric, with any labels.
    fn of(&self, name: &'static str) -> impl Iterator<Item = (&String, f64)> {
        let has_name = move |key: &str| {
            key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.samples.iter().filter(move |(key, _)| has_name(key)).map(|(key, value)| (key, *value))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn scrape(text: &str, at: Instant) -> Scrape {
        Scrape { samples: samples(text), at }
    }

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

    #[test]
    fn rejected_or_pending_settings_file_is_reported() {
        let problem = |text| scrape(text, Instant::now()).settings_problem();
        let fine = "lastseen_settings_refused 0\nlastseen_settings_awaiting_restart 0";
        assert_eq!(problem(fine), None);
        assert_eq!(problem(""), None);
        let rejected = "lastseen_settings_refused 1\nlastseen_settings_awaiting_restart 2";
        assert!(problem(rejected).unwrap().contains("rejected"));
        let pending = problem("lastseen_settings_awaiting_restart 2").unwrap();
        assert!(pending.contains("a restart: 2"), "{pending}");
    }

    // Field case 1.3
    #[test]
    fn byte_order_mark_before_metrics_is_ignored() {
        assert!(samples("\u{feff}lastseen_dead_letters 5").contains_key("lastseen_dead_letters"));
    }

    #[test]
    fn counters_become_rates_and_gauges_are_aggregated() {
        let start = Instant::now();
        let later = start + Duration::from_secs(2);
        let before = "lastseen_lookups_total{outcome=\"online\"} 100\nlastseen_lookups_in_flight 1";
        let now = "# HELP lastseen_lookups_total 7\n\
                   lastseen_lookups_total{outcome=\"online\"} 110\n\
                   lastseen_lookups_total{outcome=\"timeout\"} 4\n\
                   lastseen_lookups_total_others 1000\n\
                   lastseen_lookups_in_flight 3\nlastseen_dead_letters 5";
        // A process that has restarted, so its counter is smaller.
        let restarted = "lastseen_lookups_total{outcome=\"online\"} 6\n\
                     lastseen_lookups_in_flight 4\nlastseen_dead_letters 5";
        let metrics = aggregate(&[
            (Some(scrape(before, start)), scrape(now, later)),
            (Some(scrape(before, start)), scrape(restarted, later)),
            (None, scrape(now, later)),
        ]);
        let by_outcome = metrics.lookups_by_outcome.unwrap();
        assert_eq!(by_outcome["online"].to_string(), "8");
        assert_eq!(by_outcome["timeout"].to_string(), "2");
        assert_eq!(metrics.lookups_per_second.map(|rate| rate.to_string()), Some("10".to_owned()));
        assert_eq!(metrics.lookups_in_flight.map(|count| count.to_string()), Some("10".to_owned()));
        assert_eq!(metrics.dead_letters.map(|count| count.to_string()), Some("5".to_owned()));
        assert!(metrics.callbacks_per_second.is_none() && metrics.queue_messages.is_none());
    }
}
