//! The settings of traces. Their names and values are those of OpenTelemetry's specification, which also says what
//! becomes of a value that cannot be used: a warning, and the value counts as not set. So none of them keeps
//! a process from starting.

use std::convert::Infallible;
use std::time::Duration;

use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Url, redirect};

use crate::settings;

/// How long the collector may take for one batch of spans.
pub(super) const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A value, or what is allowed instead.
type Lenient<T> = Result<T, String>;

/// Which traces are sent, and to which collector.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Traces")]
#[group(skip)]
#[expect(clippy::struct_field_names, reason = "the names of the variables are made of them")]
pub(crate) struct Config {
    /// The collector of traces, by OTLP over HTTP (protobuf); /v1/traces is appended. Without this or the next one, there are none
    #[arg(long, value_parser = lenient(endpoint))]
    otel_exporter_otlp_endpoint: Option<Lenient<Url>>,
    /// The URL to send traces to, used as it is, instead of the one above
    #[arg(long, value_parser = lenient(endpoint))]
    otel_exporter_otlp_traces_endpoint: Option<Lenient<Url>>,
    /// Headers for the collector, as NAME=VALUE,NAME=VALUE, the values percent-encoded
    #[arg(long, value_parser = lenient(headers))]
    otel_exporter_otlp_headers: Option<Lenient<HeaderMap>>,
    /// Headers for the collector, instead of the ones above
    #[arg(long, value_parser = lenient(headers))]
    otel_exporter_otlp_traces_headers: Option<Lenient<HeaderMap>>,
    /// How traces are sent: http/protobuf is the only way
    #[arg(long, value_parser = lenient(protocol))]
    otel_exporter_otlp_protocol: Option<Lenient<()>>,
    /// The name of this process in traces, if not its own
    #[arg(long)]
    otel_service_name: Option<String>,
    /// Where traces are sent: otlp, or none for no traces
    #[arg(long, value_parser = lenient(exporter))]
    otel_traces_exporter: Option<Lenient<Exporter>>,
    /// Which traces are recorded: `always_on`, `always_off`, `traceidratio`, or `parentbased_…`, which follows the sender of the callback if that says [default: `parentbased_always_on`]
    #[arg(long, value_parser = lenient(recorded))]
    otel_traces_sampler: Option<Lenient<Recorded>>,
    /// The share of traces that traceidratio records, from 0 to 1 [default: 1]
    #[arg(long, value_parser = lenient(settings::number(0.0..=1.0)))]
    otel_traces_sampler_arg: Option<Lenient<f64>>,
    /// Whether there are no traces whatever else is set, true or false
    #[arg(long, value_parser = lenient(is_true))]
    otel_sdk_disabled: Option<Lenient<bool>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exporter {
    Otlp,
    None,
}

/// Which traces are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recorded {
    AlwaysOn,
    AlwaysOff,
    ByRatio,
    ParentElseAlwaysOn,
    ParentElseAlwaysOff,
    ParentElseByRatio,
}

/// Where and how to send traces.
pub(super) struct Export {
    pub(super) url: Url,
    pub(super) service_name: String,
    pub(super) sampler: Sampler,
    headers: HeaderMap,
}

impl Config {
    /// Where and how to send traces, or `None` if they are off, and warnings about values that are ignored. With
    /// traces off, no other variable is looked at. `name` is the process's own.
    pub(super) fn export(&self, name: &'static str) -> (Option<Export>, Vec<String>) {
        let mut warnings = Vec::new();
        if matches!(self.otel_sdk_disabled, Some(Ok(true)))
            || matches!(self.otel_traces_exporter, Some(Ok(Exporter::None)))
        {
            return (None, warnings);
        }
        let mut usable = Usable { warnings: &mut warnings };
        let traces_endpoint = usable.of(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            self.otel_exporter_otlp_traces_endpoint.as_ref(),
        );
        let endpoint = || {
            let endpoint =
                usable.of("OTEL_EXPORTER_OTLP_ENDPOINT", self.otel_exporter_otlp_endpoint.as_ref());
            endpoint.map(with_traces_path)
        };
        let Some(url) = traces_endpoint.or_else(endpoint) else { return (None, warnings) };
        let mut usable = Usable { warnings: &mut warnings };
        usable.of("OTEL_SDK_DISABLED", self.otel_sdk_disabled.as_ref());
        usable.of("OTEL_TRACES_EXPORTER", self.otel_traces_exporter.as_ref());
        usable.of("OTEL_EXPORTER_OTLP_PROTOCOL", self.otel_exporter_otlp_protocol.as_ref());
        let traces_headers = usable.of(
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            self.otel_exporter_otlp_traces_headers.as_ref(),
        );
        let headers = traces_headers.or_else(|| {
            usable.of("OTEL_EXPORTER_OTLP_HEADERS", self.otel_exporter_otlp_headers.as_ref())
        });
        let recorded = usable.of("OTEL_TRACES_SAMPLER", self.otel_traces_sampler.as_ref());
        let share = usable.of("OTEL_TRACES_SAMPLER_ARG", self.otel_traces_sampler_arg.as_ref());
        let export = Export {
            url,
            service_name: self.otel_service_name.clone().unwrap_or_else(|| name.to_owned()),
            sampler: sampler(
                recorded.unwrap_or(Recorded::ParentElseAlwaysOn),
                share.unwrap_or(1.0),
            ),
            headers: headers.unwrap_or_default(),
        };
        (Some(export), warnings)
    }
}

/// Collects warnings about values that cannot be used.
struct Usable<'a> {
    warnings: &'a mut Vec<String>,
}

impl Usable<'_> {
    fn of<T: Clone>(&mut self, name: &str, value: Option<&Lenient<T>>) -> Option<T> {
        match value {
            Some(Ok(value)) => Some(value.clone()),
            Some(Err(allowed)) => {
                self.warnings.push(format!("{name} is ignored: {allowed}"));
                None
            }
            None => None,
        }
    }
}

impl Export {
    /// # Errors
    /// When the HTTP client cannot be set up, for instance without the system's certificates.
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

/// A value parser that never fails.
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

fn exporter(text: &str) -> Result<Exporter, String> {
    match text {
        "otlp" => Ok(Exporter::Otlp),
        "none" => Ok(Exporter::None),
        _ => Err("expected otlp or none".to_owned()),
    }
}

fn recorded(text: &str) -> Result<Recorded, String> {
    match text.to_ascii_lowercase().as_str() {
        "always_on" => Ok(Recorded::AlwaysOn),
        "always_off" => Ok(Recorded::AlwaysOff),
        "traceidratio" => Ok(Recorded::ByRatio),
        "parentbased_always_on" => Ok(Recorded::ParentElseAlwaysOn),
        "parentbased_always_off" => Ok(Recorded::ParentElseAlwaysOff),
        "parentbased_traceidratio" => Ok(Recorded::ParentElseByRatio),
        _ => Err("expected always_on, always_off, traceidratio, parentbased_always_on, \
                  parentbased_always_off or parentbased_traceidratio; parentbased_always_on applies"
            .to_owned()),
    }
}

/// The specification takes every other value as false.
fn is_true(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("expected true or false; false applies".to_owned()),
    }
}

fn sampler(recorded: Recorded, share: f64) -> Sampler {
    let by_ratio = Sampler::TraceIdRatioBased(share);
    match recorded {
        Recorded::AlwaysOn => Sampler::AlwaysOn,
        Recorded::AlwaysOff => Sampler::AlwaysOff,
        Recorded::ByRatio => by_ratio,
        Recorded::ParentElseAlwaysOn => Sampler::ParentBased(Box::new(Sampler::AlwaysOn)),
        Recorded::ParentElseAlwaysOff => Sampler::ParentBased(Box::new(Sampler::AlwaysOff)),
        Recorded::ParentElseByRatio => Sampler::ParentBased(Box::new(by_ratio)),
    }
}

/// The values may be secrets: they are marked, so that no `Debug` shows them.
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
    fn the_traces_endpoint_alone_is_used_as_it_is() {
        let general = "--otel-exporter-otlp-endpoint";
        let traces = "--otel-exporter-otlp-traces-endpoint";
        for (flags, url) in [
            (vec![format!("{general}=http://a:4318")], Some("http://a:4318/v1/traces")),
            (vec![format!("{general}=https://a/base/")], Some("https://a/base/v1/traces")),
            (vec![format!("{traces}=http://b/own")], Some("http://b/own")),
            (vec![format!("{general}=http://a"), format!("{traces}=http://b")], Some("http://b/")),
            // One that cannot be used counts as not set.
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
