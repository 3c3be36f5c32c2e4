//! A private pgbouncer.

use std::fmt::Write as _;

use rustix::process::geteuid;
use url::Url;

use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{free_port, ports, wait_for};

/// A pgbouncer with its own port and Debian's default settings. It is killed on drop.
#[derive(Debug)]
pub struct PgBouncer {
    _group: ProcessGroup,
    url: String,
    _scratch: Scratch,
}

impl PgBouncer {
    /// Starts a pgbouncer in front of the database at `url`, with the `pool_mode` `session`,
    /// `transaction` or `statement` and up to `pool_size` connections to the server.
    pub async fn start(url: &str, pool_mode: &str, pool_size: u32) -> Self {
        let (scratch, port) = (Scratch::new("pgbouncer"), free_port());
        let mut url = Url::parse(url).expect("a postgres URL should be a URL");
        let host = url.host_str().expect("a postgres URL should have a host");
        let server_port = url.port().unwrap_or(5432);
        // An empty password would be a syntax error.
        let password = url.password().map(|password| format!(" password='{password}'"));
        let (user, password) = (url.username(), password.unwrap_or_default());
        let mut config = format!(
            "[databases]\n* = host={host} port={server_port} user={user}{password}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {pool_mode}\ndefault_pool_size = {pool_size}\n"
        );
        if geteuid().is_root() {
            // pgbouncer refuses to run as root. Writing to a string cannot fail.
            _ = writeln!(config, "user = nobody");
        }
        scratch.write("pgbouncer.ini", &config);
        let group = scratch.spawn("pgbouncer", &["pgbouncer.ini"]);
        url.set_host(Some("127.0.0.1")).expect("an address is a host");
        url.set_port(Some(port)).expect("a postgres URL can have a port");
        let bouncer = Self { _group: group, url: url.into(), _scratch: scratch };
        wait_for("pgbouncer accepts connections", async || {
            tokio::net::TcpStream::connect(ports::local(port)).await.ok()
        })
        .await;
        bouncer
    }

    /// The `postgres://` URL of the database through pgbouncer.
    pub fn url(&self) -> &str {
        &self.url
    }
}
