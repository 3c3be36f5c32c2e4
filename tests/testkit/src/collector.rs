//! A trace collector.

use std::net::SocketAddr;

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use runtime::CancellationToken;
use runtime::http::{Limits, serve};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::free_port;
use crate::ports::local;

/// Receives spans by OTLP over HTTP until this value is dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Collector {
    /// Starts a collector on a free port. `receive` gets the headers and the protobuf body of each
    /// request.
    pub async fn start(
        receive: impl Fn(&HeaderMap, &Bytes) + Clone + Send + Sync + 'static,
    ) -> Self {
        let listener =
            TcpListener::bind(local(free_port())).await.expect("a free port can be listened on");
        let address = listener.local_addr().expect("a listener has an address");
        let handle = async move |headers: HeaderMap, body: Bytes| receive(&headers, &body);
        let router = Router::new().route("/v1/traces", post(handle));
        let limits = Limits { max_connections: 100, ..Limits::default() };
        let serving = tokio::spawn(serve(listener, router, limits, CancellationToken::new()));
        Self { address, serving }
    }

    /// The value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
