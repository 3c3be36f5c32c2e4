//! A collector that records spans, and access to their fields.

use std::sync::Arc;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
pub(crate) use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use prost::Message as _;
use testkit::Collector;

/// The header that each export request must contain, as `OTEL_EXPORTER_OTLP_HEADERS`.
pub(crate) const HEADERS: &str = "authorization=Bearer%20s3cret";

/// A collector that records all spans with the names of their services.
pub(crate) struct SpanCollector {
    pub(crate) collector: Collector,
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

impl SpanCollector {
    pub(crate) async fn start() -> Self {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&spans);
        let collector = Collector::start(move |headers, body| {
            assert_eq!(headers["authorization"], "Bearer s3cret");
            let request = ExportTraceServiceRequest::decode(body.as_ref()).unwrap();
            for resource_spans in request.resource_spans {
                let resource = resource_spans.resource.unwrap();
                let service = text(&resource.attributes, "service.name").unwrap();
                let spans = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
                recorded.lock().extend(spans.map(|span| (service.clone(), span)));
            }
        })
        .await;
        Self { collector, spans }
    }

    /// The spans with this name, the earliest first.
    pub(crate) fn named(&self, service: &str, name: &str) -> Vec<Span> {
        let spans = self.spans.lock();
        let named = spans.iter().filter(|(of, span)| of == service && span.name == name);
        let mut named: Vec<Span> = named.map(|(_, span)| span.clone()).collect();
        named.sort_by_key(|span| span.start_time_unix_nano);
        named
    }

    /// The only child of `parent` with this name.
    pub(crate) fn child_of(&self, parent: &Span, service: &str, name: &str) -> Span {
        let mut children = self.named(service, name);
        children.retain(|span| span.parent_span_id == parent.span_id);
        let [child] = children.as_slice() else { panic!("{name} of {parent:?}: {children:?}") };
        assert_eq!(child.trace_id, parent.trace_id, "{child:?}");
        child.clone()
    }
}

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

/// The ids of the spans to which a span is linked.
pub(crate) fn linked(span: &Span) -> Vec<&[u8]> {
    span.links.iter().map(|link| link.span_id.as_slice()).collect()
}

/// The `traceparent` header that names the span.
pub(crate) fn traceparent_of(span: &Span) -> String {
    traceparent(&span.trace_id, &span.span_id)
}

pub(crate) fn traceparent(trace_id: &[u8], span_id: &[u8]) -> String {
    let trace_id = u128::from_be_bytes(trace_id.try_into().unwrap());
    let span_id = u64::from_be_bytes(span_id.try_into().unwrap());
    format!("00-{trace_id:032x}-{span_id:016x}-01")
}
