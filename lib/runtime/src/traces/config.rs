//! The settings of traces. Names and values follow the OpenTelemetry specification. As the
//! specification requires, an unusable value is ignored with a warning and does not prevent the
//! start.

use std::convert::Infallible;
use std::time::Duration;

use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Url, redirect};

use crate::settings;

/// How long the collector may take to accept one batch of spans.
pub(super) const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A usable value, or else a description of the allowed values.
type Lenient<T> = Result<T, String>;

/// Which traces are sent, and to which collector.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Traces")]
#[group(skip)]
#[expect(clippy::struct_field_names, reason = "the variables are named after them")]
pub(crate) struct Config {
    /// URL of the trace collector (OTLP over HTTP, protobuf), to which /v1/traces is appended.
    /// Without this setting and the next one, no traces are sent
    #[arg(long, value_parser = lenient(endpoint))]
    otel_exporter_otlp_endpoint: Option<Lenient<Url>>,
    /// URL to send traces to. It is used unchanged and replaces `OTEL_EXPORTER_OTLP_ENDPOINT`
    #[arg(long, value_parser = lenient(endpoint))]
    otel_exporter_otlp_traces_endpoint: Option<Lenient<Url>>,
    /// Headers for the collector, as NAME=VALUE,NAME=VALUE with percent-encoded values
    #[arg(long, value_parser = lenient(headers))]
    otel_exporter_otlp_headers: Option<Lenient<HeaderMap>>,
    /// Headers for the collector, which replace `OTEL_EXPORTER_OTLP_HEADERS`
    #[arg(long, value_parser = lenient(headers))]
    otel_exporter_otlp_traces_headers: Option<Lenient<HeaderMap>>,
    /// Protocol for sending traces; only http/protobuf is supported
    #[arg(long, value_parser = lenient(protocol))]
    otel_exporter_otlp_protocol: Option<Lenient<()>>,
    /// Name of this process in traces [default: the program's name]
    #[arg(long)]
    otel_service_name: Option<String>,
    /// Whether to send traces: otlp, or none
    #[arg(long, value_parser = lenient(is_otlp))]
    otel_traces_exporter: Option<Lenient<bool>>,
    /// Which traces to record: `always_on`, `always_off`, `traceidratio`, or `parentbased_…`, which
    /// follows the sampling decision of the callback's sender if the callback contains one
    /// [default: `parentbased_always_on`]
    #[arg(long, value_parser = lenient(sampling))]
    otel_traces_sampler: Option<Lenient<Sampling>>,
    /// Fraction of traces that traceidratio records, from 0 to 1 [default: 1]
    #[arg(long, value_parser = lenient(settings::number(0.0..=1.0)))]
    otel_traces_sampler_arg: Option<Lenient<f64>>,
    /// true turns traces off regardless of the other settings
    #[arg(long, value_parser = lenient(is_true))]
    otel_sdk_disabled: Option<Lenient<bool>>,
}

/// Makes a sampler from the fraction of traces to record. Some samplers ignore the fraction.
type Sampling = fn(f64) -> Sampler;

/// Where and how to send traces.
pub(super) struct Export {
    pub(super) url: Url,
    pub(super) service_name: String,
    pub(super) sampler: Sampler,
    headers: HeaderMap,
}

impl Config {
    /// Returns where and how to send traces, or `None` if traces are off. Also returns warnings
    /// about ignored values. While traces are off, values are not checked. `name` is the name of
    /// the program.
    pub(super) fn export(&self, name: &'static str) -> (Option<Export>, Vec<String>) {
        let mut checker = Checker::default();
        if matches!(self.otel_sdk_disabled, Some(Ok(true)))
            || matches!(self.otel_traces_exporter, Some(Ok(false)))
        {
            return (None, checker.warnings);
        }
        let traces_endpoint = checker.check(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            self.otel_exporter_otlp_traces_endpoint.as_ref(),
        );
        let endpoint = || {
            let endpoint = checker
                .check("OTEL_EXPORTER_OTLP_ENDPOINT", self.otel_exporter_otlp_endpoint.as_ref());
            endpoint.map(with_traces_path)
        };
        let Some(url) = traces_endpoint.or_else(endpoint) else {
            return (None, checker.warnings);
        };
        checker.check("OTEL_SDK_DISABLED", self.otel_sdk_disabled.as_ref());
        checker.check("OTEL_TRACES_EXPORTER", self.otel_traces_exporter.as_ref());
        checker.check("OTEL_EXPORTER_OTLP_PROTOCOL", self.otel_exporter_otlp_protocol.as_ref());
        let traces_headers = checker.check(
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            self.otel_exporter_otlp_traces_headers.as_ref(),
        );
        let headers = traces_headers.or_else(|| {
            checker.check("OTEL_EXPORTER_OTLP_HEADERS", self.otel_exporter_otlp_headers.as_ref())
        });
        let sampling = checker.check("OTEL_TRACES_SAMPLER", self.otel_traces_sampler.as_ref());
        let ratio = checker.check("OTEL_TRACES_SAMPLER_ARG", self.otel_traces_sampler_arg.as_ref());
        let sampling = sampling.unwrap_or(|_| parent_else(Sampler::AlwaysOn));
        let export = Export {
            url,
            service_name: self.otel_service_name.clone().unwrap_or_else(|| name.to_owned()),
            sampler: sampling(ratio.unwrap_or(1.0)),
            headers: headers.unwrap_or_default(),
        };
        (Some(export), checker.warnings)
    }
}

/// Collects warnings about unusable values.
#[derive(Default)]
struct Checker {
    warnings: Vec<String>,
}

impl Checker {
    /// Returns the value if it is usable; otherwise adds a warning.
    fn check<T: Clone>(&mut self, name: &str, value: Option<&Lenient<T>>) -> Option<T> {
        let value = value?.clone();
        value
            .inspect_err(|allowed| self.warnings.push(format!("{name} is ignored: {allowed}")))
            .ok()
    }
}

impl Export {
    pub(super) fn client(&self) -> Result<Client, reqwest::Error> {
        Client::builder()
            .timeout(EXPORT_TIMEOUT)
            .default_headers(self.headers.clone())
            .redirect(redirect::Policy::none())
            .no_proxy()
            .http1_only()
            .build()
    }
}

/// A value parser that never fails: an error of `parse` becomes part of the value.
fn lenient<T: Clone + Send + Sync + 'static>(
    parse: impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static,
) -> impl Fn(&str) -> Result<Lenient<T>, Infallible> + Clone + Send + Sync + 'static {
    move |text| Ok(parse(text.trim()))
}

fn endpoint(text: &str) -> Result<Url, String> {
    text.parse()
        .ok()
        .filter(|url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| "expected http://HOST:PORT or https://…".to_owned())
}

fn with_traces_path(mut endpoint: Url) -> Url {
    let path = format!("{}/v1/traces", endpoint.path().trim_end_matches('/'));
    endpoint.set_path(&path);
    endpoint
}

fn protocol(text: &str) -> Result<(), String> {
    match text {
        "http/protobuf" => Ok(()),
        _ => Err("traces are sent by http/protobuf only".to_owned()),
    }
}

fn is_otlp(text: &str) -> Result<bool, String> {
    match text {
        "otlp" => Ok(true),
        "none" => Ok(false),
        _ => Err("expected otlp or none".to_owned()),
    }
}

fn sampling(text: &str) -> Result<Sampling, String> {
    match text.to_ascii_lowercase().as_str() {
        "always_on" => Ok(|_| Sampler::AlwaysOn),
        "always_off" => Ok(|_| Sampler::AlwaysOff),
        "traceidratio" => Ok(Sampler::TraceIdRatioBased),
        "parentbased_always_on" => Ok(|_| parent_else(Sampler::AlwaysOn)),
        "parentbased_always_off" => Ok(|_| parent_else(Sampler::AlwaysOff)),
        "parentbased_traceidratio" => Ok(|ratio| parent_else(Sampler::TraceIdRatioBased(ratio))),
        _ => Err("expected always_on, always_off, traceidratio, parentbased_always_on, \
                  parentbased_always_off or parentbased_traceidratio; parentbased_always_on applies"
            .to_owned()),
    }
}

/// Parses a boolean. An error is only a warning: as the specification requires, every value other
/// than `true` then counts as false.
fn is_true(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("expected true or false; false applies".to_owned()),
    }
}

fn parent_else(sampler: Sampler) -> Sampler {
    Sampler::ParentBased(Box::new(sampler))
}

/// Parses headers. Their values may be secrets, so they are marked as sensitive, and `Debug` hides
/// them.
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
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    #[test]
    fn headers_are_percent_decoded_and_hidden_in_debug() {
        let headers = headers("Authorization=Basic%20dXNlcjpzM2NyZXQ=, x-tenant = 7,").unwrap();
        assert_eq!(headers["authorization"], "Basic dXNlcjpzM2NyZXQ=");
        assert_eq!(headers["x-tenant"], "7");
        assert!(!format!("{headers:?}").contains("dXNl"), "{headers:?}");
    }

    #[test]
    fn malformed_headers_are_rejected() {
        for text in ["authorization", "two words=1", "x=%0a"] {
            assert!(headers(text).is_err(), "{text}");
        }
    }

    fn config(flags: &[&str]) -> Config {
        let command = Config::augment_args(clap::Command::new("service"));
        let flags = std::iter::once("service").chain(flags.iter().copied());
        Config::from_arg_matches(&command.get_matches_from(flags)).unwrap()
    }

    /// Field case 6.8.
    #[test]
    fn traces_endpoint_is_used_unchanged() {
        let general = "--otel-exporter-otlp-endpoint";
        let traces = "--otel-exporter-otlp-traces-endpoint";
        for (flags, url) in [
            (vec![format!("{general}=http://a:4318")], Some("http://a:4318/v1/traces")),
            (vec![format!("{general}=https://a/base/")], Some("https://a/base/v1/traces")),
            (vec![format!("{traces}=http://b/own")], Some("http://b/own")),
            (vec![format!("{general}=http://a"), format!("{traces}=http://b")], Some("http://b/")),
            // An unusable value counts as not set.
            (
                vec![format!("{general}=http://a"), format!("{traces}=b:4318")],
                Some("http://a/v1/traces"),
            ),
            (vec![format!("{general}=localhost:4318")], None),
            (vec![format!("{general}=grpc://a:4317")], None),
            (vec![], None),
        ] {
            let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let (export, warnings) = config(&flags).export("service");
            assert_eq!(export.map(|export| export.url.to_string()).as_deref(), url, "{flags:?}");
            // Without http:, HOST:PORT is no URL.
            let is_bad = flags.iter().any(|flag| {
                flag.ends_with(":4318") && !flag.contains("http:") || flag.contains("grpc")
            });
            assert_eq!(!warnings.is_empty(), is_bad, "{flags:?}: {warnings:?}");
            for off in ["--otel-sdk-disabled=TRUE", "--otel-traces-exporter=none"] {
                flags.push(off);
                let (export, warnings) = config(&flags).export("service");
                assert!(export.is_none() && warnings.is_empty(), "{flags:?}: {warnings:?}");
                flags.pop();
            }
        }
    }
}
