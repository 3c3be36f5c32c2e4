//! The settings of traces. Their names and values are those of OpenTelemetry's specification.

use std::time::Duration;

use clap::ArgAction;
use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Url, redirect};

use crate::settings;

/// How long the collector may take for one batch of spans.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which traces are told, and to whom.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Traces")]
#[group(skip)]
#[expect(clippy::struct_field_names, reason = "the names of the variables are made of them")]
pub(crate) struct Config {
    /// The collector of traces, by OTLP over HTTP (protobuf); /v1/traces is appended. Without it, there are none
    #[arg(long, value_parser = endpoint)]
    otel_exporter_otlp_endpoint: Option<Url>,
    /// Headers for the collector, as NAME=VALUE,NAME=VALUE, the values percent-encoded
    #[arg(long, value_parser = headers)]
    otel_exporter_otlp_headers: Option<HeaderMap>,
    /// What this process is called in traces, if not by its name
    #[arg(long)]
    otel_service_name: Option<String>,
    /// Which traces are taken; parentbased ones leave it to whoever sends the callback, if that says
    #[arg(long, value_enum, ignore_case = true, default_value = "parentbased_always_on")]
    otel_traces_sampler: Taken,
    /// The share of traces that is taken by traceidratio
    #[arg(long, value_parser = settings::number(0.0..=1.0), default_value = "1")]
    otel_traces_sampler_arg: f64,
    /// Whether there are no traces whatever else is set, true or false
    #[arg(long, action = ArgAction::Set, ignore_case = true, default_value = "false")]
    otel_sdk_disabled: bool,
}

/// Which traces are taken.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Taken {
    AlwaysOn,
    AlwaysOff,
    Traceidratio,
    ParentbasedAlwaysOn,
    ParentbasedAlwaysOff,
    ParentbasedTraceidratio,
}

impl Config {
    /// Where to send spans; `None` if traces are off.
    pub(super) fn url(&self) -> Option<String> {
        let endpoint = self.otel_exporter_otlp_endpoint.as_ref()?;
        let url = || format!("{}/v1/traces", endpoint.as_str().trim_end_matches('/'));
        (!self.otel_sdk_disabled).then(url)
    }

    /// What this process is called, whose own name is `name`.
    pub(super) fn service_name(&self, name: &'static str) -> String {
        self.otel_service_name.clone().unwrap_or_else(|| name.to_owned())
    }

    pub(super) fn sampler(&self) -> Sampler {
        let by_ratio = Sampler::TraceIdRatioBased(self.otel_traces_sampler_arg);
        match self.otel_traces_sampler {
            Taken::AlwaysOn => Sampler::AlwaysOn,
            Taken::AlwaysOff => Sampler::AlwaysOff,
            Taken::Traceidratio => by_ratio,
            Taken::ParentbasedAlwaysOn => Sampler::ParentBased(Box::new(Sampler::AlwaysOn)),
            Taken::ParentbasedAlwaysOff => Sampler::ParentBased(Box::new(Sampler::AlwaysOff)),
            Taken::ParentbasedTraceidratio => Sampler::ParentBased(Box::new(by_ratio)),
        }
    }

    /// # Errors
    /// When the HTTP client cannot be set up, for instance without the system's certificates.
    pub(super) fn client(&self) -> Result<Client, reqwest::Error> {
        Client::builder()
            .timeout(EXPORT_TIMEOUT)
            .default_headers(self.otel_exporter_otlp_headers.clone().unwrap_or_default())
            .redirect(redirect::Policy::none())
            .no_proxy()
            .http1_only()
            .build()
    }
}

fn endpoint(text: &str) -> Result<Url, String> {
    text.parse()
        .ok()
        .filter(|url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| "expected http://HOST:PORT or https://…".to_owned())
}

/// The values may be secrets: they are marked, and show in no `Debug`.
fn headers(text: &str) -> Result<HeaderMap, String> {
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value: Vec<u8> = percent_decode_str(value.trim()).collect();
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some((name.trim().parse::<HeaderName>().ok()?, value))
    };
    let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
    pairs
        .map(header)
        .collect::<Option<HeaderMap>>()
        .ok_or_else(|| "expected NAME=VALUE,NAME=VALUE with percent-encoded values".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_opentelemetry_writes_them_and_shown_to_nobody() {
        let headers = headers("Authorization=Basic%20dXNlcjpzM2NyZXQ=, x-tenant = 7,").unwrap();
        assert_eq!(headers["authorization"], "Basic dXNlcjpzM2NyZXQ=");
        assert_eq!(headers["x-tenant"], "7");
        assert!(!format!("{headers:?}").contains("dXNl"), "{headers:?}");
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for text in ["authorization", "two words=1", "x=%0a"] {
            assert!(headers(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_path_is_appended_to_the_endpoint() {
        for (endpoint, url) in [
            ("http://localhost:4318", "http://localhost:4318/v1/traces"),
            ("https://collector/base/", "https://collector/base/v1/traces"),
        ] {
            let endpoint = super::endpoint(endpoint).unwrap();
            let config = Config { otel_exporter_otlp_endpoint: Some(endpoint), ..off() };
            assert_eq!(config.url().as_deref(), Some(url));
            assert_eq!(Config { otel_sdk_disabled: true, ..config }.url(), None);
        }
        for endpoint in ["localhost:4318", "grpc://localhost:4317", "http://"] {
            assert!(super::endpoint(endpoint).is_err(), "{endpoint}");
        }
    }

    fn off() -> Config {
        Config {
            otel_exporter_otlp_endpoint: None,
            otel_exporter_otlp_headers: None,
            otel_service_name: None,
            otel_traces_sampler: Taken::AlwaysOn,
            otel_traces_sampler_arg: 1.0,
            otel_sdk_disabled: false,
        }
    }
}
