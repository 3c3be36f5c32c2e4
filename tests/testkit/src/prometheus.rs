//! A private Prometheus.

use url::form_urlencoded;

use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{free_port, http_get, ports, wait_for};

/// A Prometheus with its own files and port. It is killed on drop.
#[derive(Debug)]
pub struct Prometheus {
    _group: ProcessGroup,
    port: u16,
    _scratch: Scratch,
}

impl Prometheus {
    /// Starts a Prometheus with `config` as its `prometheus.yml`, and returns when it answers.
    /// Paths in the configuration must be absolute.
    pub async fn start(config: &str) -> Self {
        let (scratch, port) = (Scratch::new("prometheus"), free_port());
        scratch.write("prometheus.yml", config);
        let address = format!("--web.listen-address=127.0.0.1:{port}");
        let flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", &address];
        let group = scratch.spawn("prometheus", &flags);
        let prometheus = Self { _group: group, port, _scratch: scratch };
        wait_for("Prometheus answers", async || {
            let reply = http_get(ports::local(port), "/-/ready").await.ok()?;
            (reply.status == 200).then_some(())
        })
        .await;
        prometheus
    }

    /// Returns the JSON response of its HTTP API to `query`.
    pub async fn query(&self, query: &str) -> String {
        let query: String = form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let path = format!("/api/v1/query?query={query}");
        let reply = http_get(ports::local(self.port), &path).await;
        let reply = reply.expect("Prometheus should answer");
        assert_eq!(reply.status, 200, "{query}: {}", reply.body);
        reply.body
    }
}
