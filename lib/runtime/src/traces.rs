//! Traces by OpenTelemetry. A trace consists of the steps by which one callback is handled, and is
//! sent to a collector.
//!
//! Traces are off unless `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is
//! set. While they are off, a [`Span`] is empty and its description is never computed, so a span
//! allocates no memory and reads no clock.
//!
//! Decision: docs/decisions/0071-why-are-traces-not-tracing-spans.md

mod collector;
mod config;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::sync::OnceLock;

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Link, Span as _, SpanContext, Status, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;

pub use opentelemetry::KeyValue;
pub use opentelemetry::trace::SpanKind;

pub(crate) use collector::Traces;
pub(crate) use config::Config;

/// The header by which a request or a message names the span that it belongs to (W3C Trace
/// Context).
pub const TRACEPARENT: &str = "traceparent";

/// Set once by [`Traces::start`], unless traces are off.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// A step of a trace. Dropping the span ends the step.
#[derive(Default)]
pub struct Span(Option<Box<opentelemetry_sdk::trace::Span>>);

/// The description of a span, by OpenTelemetry's semantic conventions.
pub struct Step {
    /// The name, from a small fixed set. It must not contain an id.
    pub name: Cow<'static, str>,
    /// Its relation to other spans, such as client or server.
    pub kind: SpanKind,
    /// Attributes that are known at the start.
    pub attributes: Vec<KeyValue>,
}

impl Span {
    /// Begins a span. It is a child of the span that `traceparent` names, usually in another
    /// process. Without a valid `traceparent`, it begins a new trace.
    pub fn begin<'a>(
        traceparent: impl FnOnce() -> Option<&'a str>,
        step: impl FnOnce() -> Step,
    ) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let mut parent = Context::new();
        if let Some(traceparent) = traceparent() {
            let headers = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
            // An invalid traceparent is ignored.
            parent = TraceContextPropagator::new().extract_with_context(&parent, &headers);
        }
        Self::start(tracer, &parent, Vec::new(), step())
    }

    /// Begins a child of this span.
    #[must_use]
    pub fn child(&self, step: impl FnOnce() -> Step) -> Self {
        Self::joint(std::iter::once(self), step)
    }

    // Decision: docs/decisions/0072-how-are-shared-steps-traced.md
    /// Begins one step that all of `spans` share. The step is a child of the first sampled span and
    /// links to the other sampled spans. If no span is sampled, the step is a child of the first
    /// span.
    #[must_use]
    pub fn joint<'a>(
        spans: impl IntoIterator<Item = &'a Self>,
        step: impl FnOnce() -> Step,
    ) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let mut contexts: Vec<&SpanContext> = spans.into_iter().filter_map(Self::context).collect();
        contexts.sort_by_key(|context| !context.is_sampled());
        let Some((first, others)) = contexts.split_first() else { return Self(None) };
        let sampled = others.iter().take_while(|context| context.is_sampled());
        let links = sampled.map(|context| Link::with_context((*context).clone())).collect();
        let parent = Context::new().with_remote_span_context((*first).clone());
        Self::start(tracer, &parent, links, step())
    }

    fn start(tracer: &SdkTracer, parent: &Context, links: Vec<Link>, step: Step) -> Self {
        let Step { name, kind, attributes } = step;
        let builder = tracer.span_builder(name).with_kind(kind);
        let builder = builder.with_attributes(attributes).with_links(links);
        Self(Some(Box::new(builder.start_with_context(tracer, parent))))
    }

    /// The value of [`TRACEPARENT`] to send to a process that continues the trace.
    #[must_use]
    pub fn traceparent(&self) -> Option<String> {
        let context = self.context()?;
        let (trace, span) = (context.trace_id(), context.span_id());
        Some(format!("00-{trace}-{span}-{:02x}", u8::from(context.is_sampled())))
    }

    /// Adds an attribute that became known after the start.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(name, value));
        }
    }

    /// Marks the step as failed, with the reason.
    pub fn fail(&mut self, reason: impl Display) {
        if let Some(span) = &mut self.0 {
            span.set_status(Status::error(reason.to_string()));
        }
    }

    /// Links this span to another one.
    pub fn link(&mut self, other: &Self) {
        if let (Some(span), Some(context)) = (&mut self.0, other.context()) {
            span.add_link(context.clone(), Vec::new());
        }
    }

    fn context(&self) -> Option<&SpanContext> {
        self.0.as_ref().map(|span| span.span_context())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_traces_off_no_description_is_computed() {
        let step = || panic!("a description was computed");
        let span = Span::begin(|| panic!("a traceparent was read"), step);
        let mut joint = Span::joint([&span, &span.child(step)], step);
        joint.set("http.route", "/callback");
        joint.fail("no reason");
        joint.link(&span);
        assert!(joint.0.is_none());
        assert_eq!(joint.traceparent(), None);
        assert_eq!(size_of::<Span>(), size_of::<usize>());
    }
}
