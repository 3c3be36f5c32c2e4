//! Sends spans to the collector. They wait in a bounded queue, and those without room are dropped: traces never
//! delay the work that they describe.

use std::error::Error as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Bytes;
use axum::http::{Request, Response};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use reqwest::Client;
use tokio::runtime::Handle;

use super::config::{EXPORT_TIMEOUT, Export};
use super::{Config, TRACER};

/// How long a collector may delay the end of the process.
const FAREWELL: Duration = Duration::from_secs(2);
/// As many as a full batch of rows has: a span for all of them can name each.
const MAX_LINKS: u32 = 1_000;
/// The shortest time between two log lines about a collector that is away now and then.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Traces, if there are any.
pub(crate) struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts to send [`Span`](super::Span)s, on the current runtime. `name` is the service's.
    ///
    /// What cannot be used of `config` is logged and left out, at worst the traces: they are never a reason not to
    /// start.
    pub(crate) fn start(config: &Config, name: &'static str) -> Self {
        let (export, warnings) = config.export(name);
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let Some(export) = export else { return Self(None) };
        match provider(export) {
            Ok(provider) => {
                // There is none yet: this is called once.
                _ = TRACER.set(provider.tracer("lastseen"));
                Self(Some(provider))
            }
            Err(step) => {
                tracing::warn!(
                    step,
                    "traces cannot be set up; there are none until the next start"
                );
                Self(None)
            }
        }
    }

    /// Sends the remaining spans, if the collector accepts them within a short time.
    pub(crate) async fn finish(self) {
        let Some(provider) = self.0 else { return };
        let sending = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FAREWELL));
        if !matches!(sending.await, Ok(Ok(()))) {
            tracing::debug!("the last spans are not sent");
        }
    }
}

/// # Errors
/// The step that failed. The reason is left out: it may quote the URL, in which there may be a password.
fn provider(export: Export) -> Result<SdkTracerProvider, &'static str> {
    let client = export.client().map_err(|_| "HTTP client")?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(EXPORT_TIMEOUT)
        .with_http_client(Collector::new(client))
        .with_endpoint(export.url)
        .build()
        .map_err(|_| "exporter")?;
    let resource = Resource::builder().with_service_name(export.service_name);
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(export.sampler)
        .with_max_links_per_span(MAX_LINKS)
        .with_resource(resource.build())
        .build())
}

/// The client that the exporter posts by.
#[derive(Debug)]
struct Collector {
    client: Client,
    /// The exporter has a thread of its own, and no runtime there.
    runtime: Handle,
    outage: Mutex<Outage>,
}

#[derive(Debug, Default)]
struct Outage {
    lasts: bool,
    told_at: Option<Instant>,
}

impl Collector {
    fn new(client: Client) -> Self {
        Self { client, runtime: Handle::current(), outage: Mutex::default() }
    }

    /// Logs an outage once.
    fn note(&self, posted: &Result<(), String>) {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = std::mem::replace(&mut outage.lasts, posted.is_err());
        let Err(reason) = posted else { return };
        if is_known || outage.told_at.is_some_and(|told_at| told_at.elapsed() < LOG_INTERVAL) {
            return;
        }
        outage.told_at = Some(Instant::now());
        tracing::warn!(reason, "traces cannot be sent; spans are dropped until they can");
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let posted = self.runtime.spawn(post(self.client.clone(), request)).await;
        let posted = posted.unwrap_or_else(|ended| Err(ended.to_string()));
        self.note(&posted);
        // The body of a success is not used.
        Ok(posted.map(|()| Response::new(Bytes::new()))?)
    }
}

/// Posts the request. The error does not contain the URL, which may hold a password.
async fn post(client: Client, request: Request<Bytes>) -> Result<(), String> {
    let posted = async { client.execute(request.try_into()?).await?.error_for_status() };
    posted.await.map(drop).map_err(|error| {
        let error = error.without_url();
        let mut cause = error.source();
        while let Some(deeper) = cause.and_then(std::error::Error::source) {
            cause = Some(deeper);
        }
        cause.map_or_else(|| error.to_string(), ToString::to_string)
    })
}
