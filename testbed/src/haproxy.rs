//! `HAProxy` in front of several producers.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{eventually, free_port, http_get, ports, programs};

const DEADLINE: Duration = Duration::from_secs(30);

/// An `HAProxy` that checks `/readyz` of its backends every two seconds, opens a new connection for
/// each request and never retries. Other settings have their defaults. It is killed on drop.
#[derive(Debug)]
pub struct HaProxy {
    _group: ProcessGroup,
    statistics_port: u16,
    log: PathBuf,
    _scratch: Scratch,
}

impl HaProxy {
    /// Starts it on `address`, and returns when it runs. The `backends` may start later.
    ///
    /// # Panics
    /// When it is not installed, or refuses to start.
    pub async fn start(address: SocketAddr, backends: &[SocketAddr]) -> Self {
        let (scratch, statistics_port) = (Scratch::new("haproxy"), free_port());
        let log = scratch.path().join("log");
        let output = File::create(&log).expect("a scratch file should be writable");
        let errors = output.try_clone().expect("a file can be opened twice");
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
        fs::write(scratch.path().join("haproxy.cfg"), config)
            .expect("a scratch file should be writable");
        let mut command = Command::new(programs::find("haproxy", &[]));
        command
            .args(["-db", "-f", "haproxy.cfg"])
            .current_dir(scratch.path())
            .stdout(output)
            .stderr(errors);
        let group = ProcessGroup::spawn(&mut command, scratch.path());
        let haproxy = Self { _group: group, statistics_port, log, _scratch: scratch };
        eventually("HAProxy runs", DEADLINE, async || haproxy.healthy().await.map(drop)).await;
        haproxy
    }

    /// Waits until exactly `backends` of its backends are healthy.
    ///
    /// # Panics
    /// When that takes longer than half a minute.
    pub async fn wait_for_healthy(&self, backends: usize) {
        let what = format!("HAProxy reports {backends} healthy backends");
        eventually(&what, DEADLINE, async || (self.healthy().await? == backends).then_some(()))
            .await;
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

impl Drop for HaProxy {
    fn drop(&mut self) {
        programs::print_tail_if_panicking(&self.log);
    }
}
