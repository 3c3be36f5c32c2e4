//! What a collector was told.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
pub(crate) use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use testbed::Collector;

/// Those who send spans must send this header along.
pub(crate) const HEADERS: &str = "authorization=Bearer%20s3cret";

/// A collector, and all spans that it was told, with the names of their services.
pub(crate) struct Told {
    pub(crate) collector: Collector,
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

impl Told {
    pub(crate) async fn start() -> Self {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&spans);
        let collector = Collector::start(move |headers, body| {
            assert_eq!(headers["authorization"], "Bearer s3cret");
            let request = ExportTraceServiceRequest::decode(body.as_ref()).unwrap();
            for of_resource in request.resource_spans {
                let resource = of_resource.resource.unwrap();
                let service = text(&resource.attributes, "service.name").unwrap();
                let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                telling.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
            }
        })
        .await;
        Self { collector, spans }
    }

    /// The spans of that name, the earliest first.
    pub(crate) fn named(&self, service: &str, name: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap();
        let named = spans.iter().filter(|(of, span)| of == service && span.name == name);
        let mut named: Vec<Span> = named.map(|(_, span)| span.clone()).collect();
        named.sort_by_key(|span| span.start_time_unix_nano);
        named
    }

    /// The only span of that name that is a step of `parent`.
    pub(crate) fn step_of(&self, parent: &Span, service: &str, name: &str) -> Span {
        let mut steps = self.named(service, name);
        steps.retain(|span| span.parent_span_id == parent.span_id);
        let [step] = steps.as_slice() else { panic!("{name} of {parent:?}: {steps:?}") };
        assert_eq!(step.trace_id, parent.trace_id, "{step:?}");
        step.clone()
    }
}

/// An attribute, as text.
pub(crate) fn attribute(span: &Span, name: &str) -> Option<String> {
    text(&span.attributes, name)
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.clone()?.value? {
        Value::StringValue(text) => Some(text),
        Value::IntValue(number) => Some(number.to_string()),
        Value::BoolValue(is) => Some(is.to_string()),
        other => panic!("{name}: {other:?}"),
    }
}

/// The ids of the spans that it is linked to.
pub(crate) fn linked(span: &Span) -> Vec<&[u8]> {
    span.links.iter().map(|link| link.span_id.as_slice()).collect()
}

/// How the span is named in a header.
pub(crate) fn traceparent_of(span: &Span) -> String {
    traceparent(&span.trace_id, &span.span_id)
}

pub(crate) fn traceparent(trace_id: &[u8], span_id: &[u8]) -> String {
    let trace_id = u128::from_be_bytes(trace_id.try_into().unwrap());
    let span_id = u64::from_be_bytes(span_id.try_into().unwrap());
    format!("00-{trace_id:032x}-{span_id:016x}-01")
}
