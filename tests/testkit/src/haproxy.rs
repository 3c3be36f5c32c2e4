//! `HAProxy` in front of several producers.

use std::net::SocketAddr;

use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{free_port, http_get, ports, wait_for};

/// An `HAProxy` that checks `/readyz` of its backends every two seconds, opens a new connection for
/// each request and never retries. Other settings have their defaults. It is killed on drop.
#[derive(Debug)]
pub struct HaProxy {
    _group: ProcessGroup,
    statistics_port: u16,
    _scratch: Scratch,
}

impl HaProxy {
    /// Starts an `HAProxy` on `address`, and returns when it runs. The `backends` may start later.
    pub async fn start(address: SocketAddr, backends: &[SocketAddr]) -> Self {
        let (scratch, statistics_port) = (Scratch::new("haproxy"), free_port());
        let servers: Vec<String> = backends
            .iter()
            .enumerate()
            .map(|(number, backend)| format!("  server backend{number} {backend} check inter 2s\n"))
            .collect();
        let servers = servers.concat();
        let config = format!(
            "global\n  maxconn 4000\n\
             defaults\n  mode http\n  retries 0\n  timeout connect 1s\n  timeout client 60s\n  timeout server 10s\n\
             frontend callbacks\n  bind {address}\n  default_backend producers\n\
             frontend statistics\n  bind 127.0.0.1:{statistics_port}\n  stats enable\n  stats uri /\n\
             backend producers\n  option httpchk GET /readyz\n  option http-server-close\n  http-reuse never\n{servers}"
        );
        scratch.write("haproxy.cfg", &config);
        let group = scratch.spawn("haproxy", &["-db", "-f", "haproxy.cfg"]);
        let haproxy = Self { _group: group, statistics_port, _scratch: scratch };
        wait_for("HAProxy runs", async || haproxy.healthy().await.map(drop)).await;
        haproxy
    }

    /// Waits until exactly `backends` of its backends are healthy.
    pub async fn wait_for_healthy(&self, backends: usize) {
        let what = format!("HAProxy reports {backends} healthy backends");
        wait_for(&what, async || (self.healthy().await? == backends).then_some(())).await;
    }

    /// The number of healthy backends; `None` while `HAProxy` does not answer.
    async fn healthy(&self) -> Option<usize> {
        let reply = http_get(ports::local(self.statistics_port), "/;csv").await.ok()?;
        // Columns: the proxy, the server, and as the 18th the status, such as "UP" or "DOWN 1/2".
        let is_up = |line: &&str| {
            let mut columns = line.split(',');
            let (proxy, server) = (columns.next(), columns.next());
            proxy == Some("producers")
                && server.is_some_and(|server| server.starts_with("backend"))
                && columns.nth(15).is_some_and(|status| status.starts_with("UP"))
        };
        (reply.status == 200).then(|| reply.body.lines().filter(is_up).count())
    }
}
