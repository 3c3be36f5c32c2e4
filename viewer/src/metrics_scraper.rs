//! The services' numbers, read from their metrics.

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

use self::replicas::{Lookup, Replicas, system_lookup};
use crate::config::Service;

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(900);
/// Ours have some 20 KB.
const BYTES_MAX: usize = 2 << 20;

/// A service, and whether it tells its numbers.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Told {
    /// Where; of lastseen "this process".
    url: String,
    /// "ok", or why not.
    status: String,
    /// What is to be done about its settings file; null if nothing is, or that is not known.
    settings: Option<String>,
}

/// What the services do, all of them together. What none of them tells is null.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct Numbers {
    /// Each service that is asked for its numbers.
    services: Vec<Told>,
    /// Callbacks answered, whatever the answer.
    callbacks_per_second: Option<f64>,
    /// Ids listed in accepted callbacks.
    ids_per_second: Option<f64>,
    /// Lookups ended.
    lookups_per_second: Option<f64>,
    /// Lookups running now.
    lookups_in_flight: Option<f64>,
    /// Lookups ended per second, by how.
    lookups_by_outcome: Option<BTreeMap<String, f64>>,
    /// Messages in the queue that no consumer has taken.
    queue_messages: Option<f64>,
    /// Messages that were given up and are kept for a person.
    dead_letters: Option<f64>,
    /// How long ago the oldest message of the queue came in.
    oldest_message_age_seconds: Option<f64>,
    /// Messages on the producers' disks, because the broker takes none.
    spool_messages: Option<f64>,
    /// Whether the status API is asked: 0 by all lookups, 1 by more and more, 2 paused as it asked, 3 by
    /// probes only.
    breaker_state: Option<f64>,
}

/// Asks each service every second.
pub(crate) struct Services {
    /// Locked by the one task that asks.
    asked: tokio::sync::Mutex<Vec<Asked>>,
    /// None if all are in this process: it takes a while to make.
    client: Option<Client>,
    numbers: Mutex<Numbers>,
}

/// A service that is asked, and what each of its replicas said before; a process that asks itself has no address.
struct Asked {
    service: Service,
    replicas: Option<Replicas>,
    before: HashMap<Option<SocketAddr>, Scrape>,
}

type Answers = Vec<(Option<SocketAddr>, Result<Scrape, String>)>;

/// The samples of a service, by their names with labels.
#[derive(Clone)]
struct Scrape {
    samples: HashMap<String, f64>,
    at: Instant,
}

impl Services {
    /// # Errors
    /// When there is no HTTP client to be had.
    pub(crate) fn new(services: Vec<Service>) -> reqwest::Result<Self> {
        Self::with_lookup(services, system_lookup)
    }

    fn with_lookup(services: Vec<Service>, lookup: Lookup) -> reqwest::Result<Self> {
        let is_elsewhere = services.iter().any(|service| matches!(service, Service::At(_)));
        let client = is_elsewhere.then(|| {
            Client::builder()
                .timeout(TIMEOUT)
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .build()
        });
        let client = client.transpose()?;
        let asked = |service| {
            let replicas = match &service {
                Service::At(url) => Some(Replicas::of(url, lookup)),
                Service::ThisProcess => None,
            };
            Asked { service, replicas, before: HashMap::new() }
        };
        let asked: Vec<_> = services.into_iter().map(asked).collect();
        Ok(Self { asked: asked.into(), client, numbers: Mutex::default() })
    }

    pub(crate) fn numbers(&self) -> Numbers {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the numbers true for ever.
    pub(crate) async fn ask(&self) -> std::convert::Infallible {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.ask_once().await;
        }
    }

    async fn ask_once(&self) {
        let mut asked = self.asked.lock().await;
        let client = self.client.as_ref();
        let answers = join_all(asked.iter_mut().map(|asked| asked.scrape(client))).await;
        let mut services = Vec::new();
        let mut pairs = Vec::new();
        for (asked, answers) in asked.iter_mut().zip(answers) {
            let settings = answers.iter().flat_map(|(_, answer)| answer).find_map(Scrape::settings);
            let (url, status) = (asked.service.to_string(), status(&answers));
            services.push(Told { url, status, settings });
            // Replicas that are gone are forgotten.
            let mut before = std::mem::take(&mut asked.before);
            for (address, answer) in answers {
                let Ok(now) = answer else { continue };
                asked.before.insert(address, now.clone());
                pairs.push((before.remove(&address), now));
            }
        }
        drop(asked);
        *self.numbers.lock().unwrap_or_else(PoisonError::into_inner) =
            Numbers { services, ..numbers(&pairs) };
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ThisProcess => formatter.write_str("this process"),
            Self::At(url) => url.fmt(formatter),
        }
    }
}

/// "ok" if all replicas have answered, or why not.
fn status(answers: &Answers) -> String {
    let failed: Vec<_> = answers.iter().filter_map(|(_, answer)| answer.as_ref().err()).collect();
    match failed.as_slice() {
        [] => "ok".to_owned(),
        [reason, ..] if answers.len() == 1 => (*reason).clone(),
        [reason, ..] => format!("{} of {} replicas: {reason}", failed.len(), answers.len()),
    }
}

impl Asked {
    /// What each replica says.
    async fn scrape(&mut self, client: Option<&Client>) -> Answers {
        let (Service::At(url), Some(replicas), Some(client)) =
            (&self.service, &mut self.replicas, client)
        else {
            return vec![(None, Ok(Scrape::of_text(&service::render_metrics())))];
        };
        let addresses = match replicas.addresses().await {
            Ok(addresses) => addresses,
            Err(reason) => return vec![(None, Err(reason))],
        };
        let ask = async |addresses: Vec<SocketAddr>| {
            let fetches = addresses.into_iter().map(async |address| {
                let text = fetch(client, url, address).await;
                (Some(address), text.map(|text| Scrape::of_text(&text)))
            });
            join_all(fetches).await
        };
        let answers = ask(addresses.preferred).await;
        let nobody = answers.iter().all(|(_, answer)| answer.is_err());
        if nobody && !addresses.others.is_empty() { ask(addresses.others).await } else { answers }
    }
}

/// What is at `url`, by the replica at `address`.
async fn fetch(client: &Client, url: &Url, address: SocketAddr) -> Result<String, String> {
    let mut at_address = url.clone();
    if at_address.set_ip_host(address.ip()).is_err() {
        return Err("the URL cannot have an address as its host".to_owned());
    }
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let host = format!("{}{port}", url.host_str().unwrap_or_default());
    let failed = |error: reqwest::Error| {
        // The address is told beside it.
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
            return Err("answered far too much".to_owned());
        }
    }
    String::from_utf8(bytes).map_err(|_| "answered what is no text".to_owned())
}

/// The samples in a text of Prometheus's format, but those of histograms' buckets. The exporter writes
/// no timestamps, so the value is what follows the last space.
fn samples(text: &str) -> HashMap<String, f64> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().filter(|line| line.starts_with("lastseen_"));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    lines.filter(|line| !line.contains("_bucket{")).filter_map(sample).collect()
}

/// What services tell together, each with what it told before, if it did.
fn numbers(scrapes: &[(Option<Scrape>, Scrape)]) -> Numbers {
    let sum = |name| gauges(scrapes, name).reduce(|one, other| one + other);
    // All who look at one queue tell the same of it.
    let most = |name| gauges(scrapes, name).reduce(f64::max);
    let rate = |name| rates(scrapes, name).map(|rates| rates.into_values().sum());
    Numbers {
        services: Vec::new(),
        callbacks_per_second: rate("lastseen_callbacks_total"),
        ids_per_second: rate("lastseen_callback_ids_total"),
        lookups_per_second: rate("lastseen_lookups_total"),
        lookups_in_flight: sum("lastseen_lookups_in_flight"),
        lookups_by_outcome: rates(scrapes, "lastseen_lookups_total"),
        queue_messages: most("lastseen_queue_messages"),
        dead_letters: most("lastseen_dead_letters"),
        oldest_message_age_seconds: most("lastseen_oldest_message_age_seconds"),
        spool_messages: sum("lastseen_spool_messages"),
        breaker_state: most("lastseen_breaker_state"),
    }
}

fn gauges(scrapes: &[(Option<Scrape>, Scrape)], name: &'static str) -> impl Iterator<Item = f64> {
    scrapes.iter().flat_map(move |(_, now)| now.of(name)).map(|(_, value)| value)
}

/// How much a counter has grown in a second, by its label `outcome`; nothing if nobody has it.
fn rates(
    scrapes: &[(Option<Scrape>, Scrape)],
    name: &'static str,
) -> Option<BTreeMap<String, f64>> {
    let mut rates = BTreeMap::new();
    for (before, now) in scrapes {
        let Some(before) = before else { continue };
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        for (key, value) in now.of(name) {
            // One that was not there before, or that has started anew, has counted from 0.
            let counted_before = before.samples.get(key).filter(|before| **before <= value);
            let grown = value - counted_before.copied().unwrap_or(0.0);
            let label = key.split_once("outcome=\"").and_then(|(_, rest)| rest.split_once('"'));
            let outcome = label.map_or("", |(outcome, _)| outcome).to_owned();
            *rates.entry(outcome).or_default() += grown / seconds.max(0.001);
        }
    }
    (!rates.is_empty()).then_some(rates)
}

impl Scrape {
    fn of_text(text: &str) -> Self {
        Self { samples: samples(text), at: Instant::now() }
    }

    /// What is to be done about the settings file of whoever tells this.
    fn settings(&self) -> Option<String> {
        let of = |name| self.of(name).map(|(_, value)| value).sum::<f64>();
        if of("lastseen_settings_refused") > 0.0 {
            let refused = "the file is refused, and they stay as they were; its log says why";
            return Some(refused.to_owned());
        }
        let awaiting = of("lastseen_settings_awaiting_restart");
        (awaiting > 0.0).then(|| format!("changed in the file: {awaiting}, with the next start"))
    }

    /// The samples of one name, whatever their labels.
    fn of(&self, name: &'static str) -> impl Iterator<Item = (&String, f64)> {
        let is_it = move |key: &str| {
            key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.samples.iter().filter(move |(key, _)| is_it(key)).map(|(key, value)| (key, *value))
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

    /// Answers every request with a counter that stands at `count`, until the test ends.
    async fn serve(listener: TcpListener, count: u32) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1_024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].windows(20).any(|part| part == b"host: consumers.test"));
            let body = format!("lastseen_lookups_in_flight {count}\n");
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    /// Field case 6.10.
    #[tokio::test]
    async fn all_replicas_behind_one_name_are_asked() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = first.local_addr().unwrap().port();
        let second = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
        tokio::spawn(serve(first, 29));
        tokio::spawn(serve(second, 34));
        let lookup: Lookup = |host, port| {
            assert_eq!(host, "consumers.test");
            let addresses = [1, 2].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
            Box::pin(async move { Ok(addresses.to_vec()) })
        };
        let url = format!("http://consumers.test:{port}/metrics").parse().unwrap();
        let services = Services::with_lookup(vec![Service::At(url)], lookup).unwrap();
        services.ask_once().await;
        let numbers = services.numbers();
        let in_flight = numbers.lookups_in_flight.map(|count| count.to_string());
        let statuses: Vec<_> = numbers.services.iter().map(|told| told.status.as_str()).collect();
        assert_eq!((in_flight.as_deref(), statuses), (Some("63"), vec!["ok"]));
    }

    #[test]
    fn a_settings_file_that_is_refused_or_waits_for_a_restart_is_told() {
        let told = |text| scrape(text, Instant::now()).settings();
        assert_eq!(told("lastseen_settings_refused 0\nlastseen_settings_awaiting_restart 0"), None);
        assert_eq!(told(""), None);
        let refused = "lastseen_settings_refused 1\nlastseen_settings_awaiting_restart 2";
        assert!(told(refused).unwrap().contains("refused"));
        assert!(told("lastseen_settings_awaiting_restart 2").unwrap().contains("file: 2, with"));
    }

    // Field case 1.3
    #[test]
    fn a_byte_order_mark_before_metrics_is_ignored() {
        assert!(samples("\u{feff}lastseen_dead_letters 5").contains_key("lastseen_dead_letters"));
    }

    #[test]
    fn counters_are_shown_as_rates_and_gauges_of_all_services_together() {
        let start = Instant::now();
        let later = start + Duration::from_secs(2);
        let before = "lastseen_lookups_total{outcome=\"online\"} 100\nlastseen_lookups_in_flight 1";
        let now = "# HELP lastseen_lookups_total 7\n\
                   lastseen_lookups_total{outcome=\"online\"} 110\n\
                   lastseen_lookups_total{outcome=\"timeout\"} 4\n\
                   lastseen_lookups_total_others 1000\n\
                   lastseen_lookups_in_flight 3\nlastseen_dead_letters 5";
        // Restarted meanwhile.
        let other = "lastseen_lookups_total{outcome=\"online\"} 6\n\
                     lastseen_lookups_in_flight 4\nlastseen_dead_letters 5";
        let numbers = numbers(&[
            (Some(scrape(before, start)), scrape(now, later)),
            (Some(scrape(before, start)), scrape(other, later)),
            (None, scrape(now, later)),
        ]);
        let by_outcome = numbers.lookups_by_outcome.unwrap();
        assert_eq!(by_outcome["online"].to_string(), "8");
        assert_eq!(by_outcome["timeout"].to_string(), "2");
        assert_eq!(numbers.lookups_per_second.map(|rate| rate.to_string()), Some("10".to_owned()));
        assert_eq!(numbers.lookups_in_flight.map(|count| count.to_string()), Some("10".to_owned()));
        assert_eq!(numbers.dead_letters.map(|count| count.to_string()), Some("5".to_owned()));
        assert!(numbers.callbacks_per_second.is_none() && numbers.queue_messages.is_none());
    }
}
