//! Sends spans to the collector. Spans wait in a bounded queue. When the queue is full, new spans
//! are dropped, so that traces never delay callbacks.

use std::error::Error as _;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Bytes;
use axum::http::{Request, Response};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use parking_lot::Mutex;
use reqwest::Client;
use tokio::runtime::Handle;

use super::config::{EXPORT_TIMEOUT, Export};
use super::{Config, TRACER};

/// How long the collector may delay the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of links in a span: as many as a full batch has rows by default, so that the span
/// of the batch can link to the span of each row.
const MAX_LINKS: u32 = 1_000;
/// The shortest time between two log lines about an unreliable collector.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// The span exporter, or `None` if traces are off.
pub(crate) struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts to send [`Span`](super::Span)s on the current tokio runtime. `name` is the name of
    /// the service.
    ///
    /// An unusable value in `config` is logged and ignored, because a problem with traces must
    /// never prevent a service from starting.
    pub(crate) fn start(config: &Config, name: &'static str) -> Self {
        let (export, warnings) = config.export(name);
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let Some(export) = export else { return Self(None) };
        match provider(export) {
            Ok(provider) => {
                // Cannot fail, because this is called once.
                _ = TRACER.set(provider.tracer("lastseen"));
                Self(Some(provider))
            }
            Err(step) => {
                tracing::warn!(step, "cannot set up traces; none are sent until the next start");
                Self(None)
            }
        }
    }

    /// Sends the remaining spans, if the collector accepts them within a short time.
    pub(crate) async fn finish(self) {
        let Some(provider) = self.0 else { return };
        let flush =
            tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_TIMEOUT));
        if !matches!(flush.await, Ok(Ok(()))) {
            tracing::debug!("the last spans were not sent");
        }
    }
}

/// Builds the provider.
///
/// # Errors
/// The step that failed. The reason is omitted, because it may quote the URL with its password.
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

/// The exporter's HTTP client.
#[derive(Debug)]
struct Collector {
    client: Client,
    /// Runs the requests, because the exporter calls this client from a thread without a tokio
    /// runtime.
    runtime: Handle,
    outage: Mutex<Outage>,
}

#[derive(Debug, Default)]
struct Outage {
    is_ongoing: bool,
    logged_at: Option<Instant>,
}

impl Collector {
    fn new(client: Client) -> Self {
        Self { client, runtime: Handle::current(), outage: Mutex::default() }
    }

    /// Logs the beginning of an outage, at most once in [`LOG_INTERVAL`].
    fn record(&self, result: &Result<(), String>) {
        let mut outage = self.outage.lock();
        let was_ongoing = std::mem::replace(&mut outage.is_ongoing, result.is_err());
        let Err(reason) = result else { return };
        if was_ongoing || outage.logged_at.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            return;
        }
        outage.logged_at = Some(Instant::now());
        tracing::warn!(
            reason,
            "cannot send traces; spans are dropped until the collector accepts them"
        );
    }
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let result = self.runtime.spawn(post(self.client.clone(), request)).await;
        let result = result.unwrap_or_else(|error| Err(error.to_string()));
        self.record(&result);
        // The exporter does not use the body of a success.
        Ok(result.map(|()| Response::new(Bytes::new()))?)
    }
}

/// Posts the request. The error does not contain the URL, which may hold a password.
async fn post(client: Client, request: Request<Bytes>) -> Result<(), String> {
    let response = async { client.execute(request.try_into()?).await?.error_for_status() };
    response.await.map(drop).map_err(|error| {
        let error = error.without_url();
        let mut cause = error.source();
        while let Some(deeper) = cause.and_then(std::error::Error::source) {
            cause = Some(deeper);
        }
        cause.map_or_else(|| error.to_string(), ToString::to_string)
    })
}
