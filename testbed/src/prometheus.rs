//! A private Prometheus.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use url::form_urlencoded;

use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{eventually, free_port, http_get, ports, programs};

const START_DEADLINE: Duration = Duration::from_secs(30);

/// A Prometheus with its own files and port. It is killed on drop.
#[derive(Debug)]
pub struct Prometheus {
    _group: ProcessGroup,
    port: u16,
    log: PathBuf,
    _scratch: Scratch,
}

impl Prometheus {
    /// Starts it with `config` as its `prometheus.yml`, and returns when it answers. Paths in the
    /// configuration must be absolute.
    ///
    /// # Panics
    /// When it is not installed or rejects the configuration.
    pub async fn start(config: &str) -> Self {
        let (scratch, port) = (Scratch::new("prometheus"), free_port());
        let log = scratch.path().join("log");
        let output = File::create(&log).expect("a scratch file should be writable");
        let errors = output.try_clone().expect("a file can be opened twice");
        fs::write(scratch.path().join("prometheus.yml"), config)
            .expect("a scratch file should be writable");
        let mut command = Command::new(programs::find("prometheus", &[]));
        command
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .current_dir(scratch.path())
            .stdout(output)
            .stderr(errors);
        let group = ProcessGroup::spawn(&mut command, scratch.path());
        let prometheus = Self { _group: group, port, log, _scratch: scratch };
        eventually("Prometheus answers", START_DEADLINE, async || {
            let reply = http_get(ports::local(port), "/-/ready").await.ok()?;
            (reply.status == 200).then_some(())
        })
        .await;
        prometheus
    }

    /// Returns the JSON response of its HTTP API to `query`.
    ///
    /// # Panics
    /// When it rejects the query.
    pub async fn query(&self, query: &str) -> String {
        let query: String = form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let path = format!("/api/v1/query?query={query}");
        let reply = http_get(ports::local(self.port), &path).await;
        let reply = reply.expect("Prometheus should answer");
        assert_eq!(reply.status, 200, "{query}: {}", reply.body);
        reply.body
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        programs::print_tail_if_panicking(&self.log);
    }
}
