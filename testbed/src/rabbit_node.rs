//! A RabbitMQ node that belongs to one test, which can kill it and boot it again.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};
use rustix::process::Signal;
use uuid::Uuid;

use crate::authority::Authority;
use crate::process_group::ProcessGroup;
use crate::scratch::Scratch;
use crate::{amqp, eventually, free_port, ports, programs};

const BOOT_DEADLINE: Duration = Duration::from_mins(3);
const DRAIN_DEADLINE: Duration = Duration::from_mins(1);
const SAVE_DEADLINE: Duration = Duration::from_secs(10);
const STOP_DEADLINE: Duration = Duration::from_mins(1);
/// RabbitMQ's own default.
const WATERMARK: &str = "0.4";
const DISK_FREE_LIMIT: &str = "1MB";

/// A RabbitMQ node without plugins. Its own files, ports, cookie and epmd separate it from the
/// RabbitMQ of the machine and of other tests. It boots in about 4 s.
#[derive(Debug)]
pub struct RabbitNode {
    /// `None` while it is down.
    server: Option<ProcessGroup>,
    epmd: Arc<Epmd>,
    name: String,
    amqp_port: u16,
    /// 0 if it has no TLS listener.
    tls_port: u16,
    distribution_port: u16,
    scratch: Scratch,
}

/// The port mapper of one node, or of all nodes of a cluster. It keeps running when a node dies, as
/// on a real machine. The test starts it, because an epmd that is started by a node is a daemon,
/// which the test could not find and end.
#[derive(Debug)]
struct Epmd {
    // Dropped before its files.
    _server: ProcessGroup,
    port: u16,
    _scratch: Scratch,
}

impl Epmd {
    async fn start() -> Arc<Self> {
        let (port, scratch) = (free_port(), Scratch::new("epmd"));
        let mut command = Command::new(programs::find("epmd", &[]));
        command
            .args(["-port", &port.to_string(), "-address", "127.0.0.1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = ProcessGroup::spawn(&mut command, scratch.path());
        eventually("epmd listens", BOOT_DEADLINE, async || ports::is_open(port).then_some(()))
            .await;
        Arc::new(Self { _server: server, port, _scratch: scratch })
    }
}

impl RabbitNode {
    /// Sets up an empty node and boots it.
    pub async fn start() -> Self {
        let mut node = Self::set_up(Epmd::start().await, "");
        node.boot().await;
        node
    }

    /// Like [`RabbitNode::start`], with an additional TLS listener with a certificate of
    /// `authority`.
    pub async fn start_with_tls(authority: &Authority) -> Self {
        let mut node = Self::set_up(Epmd::start().await, "");
        node.tls_port = free_port();
        let files = authority.write_to(node.scratch.path(), None);
        let (port, certificate, key) =
            (node.tls_port, files.certificate.display(), files.key.display());
        let tls = format!(
            "listeners.ssl.own = 127.0.0.1:{port}\n\
             ssl_options.certfile = {certificate}\n\
             ssl_options.keyfile = {key}\n"
        );
        node.configure(&tls);
        node.boot().await;
        node
    }

    /// Boots three empty nodes that form a cluster, which takes about 10 s. A quorum queue has a
    /// member on each node. Its first leader is on the node that declared it.
    pub async fn start_cluster() -> [Self; 3] {
        let (epmd, cookie) = (Epmd::start().await, Uuid::now_v7().simple().to_string());
        let [mut first, mut second, mut third] =
            std::array::from_fn(|_| Self::set_up(Arc::clone(&epmd), &cookie));
        for node in [&second, &third] {
            node.configure(&format!(
                "cluster_formation.peer_discovery_backend = classic_config\n\
                 cluster_formation.classic_config.nodes.1 = {}\n\
                 cluster_formation.classic_config.nodes.2 = {}\n",
                first.name, node.name
            ));
        }
        first.boot().await;
        tokio::join!(second.boot(), third.boot());
        [first, second, third]
    }

    /// Creates the files and chooses the ports of a node. RabbitMQ creates the cookie if it is
    /// empty.
    fn set_up(epmd: Arc<Epmd>, cookie: &str) -> Self {
        let scratch = Scratch::new("rabbitmq");
        let node = Self {
            server: None,
            epmd,
            name: format!("lastseen-{}@localhost", Uuid::now_v7().simple()),
            amqp_port: free_port(),
            tls_port: 0,
            distribution_port: free_port(),
            scratch,
        };
        node.configure(&format!(
            "listeners.tcp.own = 127.0.0.1:{}\n\
             default_user = guest\n\
             default_pass = guest\n\
             disk_free_limit.absolute = {DISK_FREE_LIMIT}\n\
             vm_memory_high_watermark.relative = {WATERMARK}\n\
             log.console = true\n\
             log.file = false\n",
            node.amqp_port
        ));
        node.write("enabled_plugins", "[].\n");
        // Without this file, /etc/rabbitmq/rabbitmq-env.conf would be read.
        node.write("rabbitmq-env.conf", "");
        if !cookie.is_empty() {
            let path = node.write(".erlang.cookie", cookie);
            let secret = fs::set_permissions(path, Permissions::from_mode(0o400));
            secret.expect("a scratch file's mode can be changed");
        }
        node
    }

    /// Appends lines to its configuration, which it reads when it boots.
    fn configure(&self, lines: &str) {
        let path = self.scratch.path().join("rabbitmq.conf");
        let existing = fs::read_to_string(path).unwrap_or_default();
        self.write("rabbitmq.conf", &(existing + lines));
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        fs::write(&path, content).expect("a scratch file should be writable");
        path
    }

    /// Its AMQP URI, as guest on the default vhost.
    #[must_use]
    pub fn amqp_uri(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.amqp_port)
    }

    /// The URI of its TLS listener by the name `host`, as guest on the default vhost.
    #[must_use]
    pub fn amqps_uri(&self, host: &str) -> String {
        format!("amqps://guest:guest@{host}:{}/%2f", self.tls_port)
    }

    /// Its AMQP port, for a proxy.
    #[must_use]
    pub fn amqp_port(&self) -> u16 {
        self.amqp_port
    }

    /// Whether it was booted, and not stopped or killed since.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.server.is_some()
    }

    /// Whether the leader of a quorum queue is on this node.
    ///
    /// # Panics
    /// When it is down.
    pub async fn leads(&self, queue: &str) -> bool {
        let leaders = ["list_queues", "--no-table-headers", "name", "leader"];
        let leaders = self.rabbitmqctl(&leaders).await;
        leaders.lines().any(|line| line.split_whitespace().eq([queue, &self.name]))
    }

    /// Starts it on the same files and ports, and waits until it accepts AMQP connections.
    ///
    /// # Panics
    /// When it already runs, or does not accept connections within three minutes.
    pub async fn boot(&mut self) {
        assert!(self.server.is_none(), "the node runs already");
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.expect("a scratch file should be writable");
        let mut command = self.command("rabbitmq-server");
        command
            .stdout(log.try_clone().expect("a file handle can be duplicated"))
            .stderr(log)
            // Makes the script replace itself by the server, so that signals reach the server.
            .env("RUNNING_UNDER_SYSTEMD", "true");
        let (port, uri) = (self.amqp_port, self.amqp_uri());
        let server = self.server.insert(ProcessGroup::spawn(&mut command, self.scratch.path()));
        eventually("the RabbitMQ node accepts connections", BOOT_DEADLINE, async || {
            if let Some(status) = server.try_wait() {
                panic!("the RabbitMQ node ended while booting: {status}");
            }
            // lapin would leak a thread for each refused attempt.
            if !ports::is_open(port) {
                return None;
            }
            amqp::connect(&uri).await.ok()
        })
        .await;
    }

    /// Kills it with SIGKILL, and waits until its port is closed. Does nothing if it is down.
    ///
    /// It first waits up to a second until RabbitMQ has saved the names of newly declared quorum
    /// queues. If it were killed before, it would lose them with all their messages.
    pub async fn kill(&mut self) {
        if self.server.is_some() {
            let folder = self.scratch.path().join("mnesia").join(&self.name).join("quorum");
            let names = folder.join(&self.name).join("names.dets");
            let what = "RabbitMQ has saved the names of its quorum queues";
            eventually(what, SAVE_DEADLINE, async || has_ra_saved(&names).then_some(())).await;
        }
        drop(self.server.take());
        ports::wait_until_closed(self.amqp_port).await;
    }

    /// Stops it gracefully, as an operator would.
    ///
    /// # Panics
    /// When it is down, or does not stop within 60 s.
    pub async fn stop(&mut self) {
        let server = self.server.as_mut().expect("only a running node can be stopped");
        server.signal(Signal::TERM);
        eventually("the RabbitMQ node stops", STOP_DEADLINE, async || server.try_wait()).await;
        self.server = None;
        ports::wait_until_closed(self.amqp_port).await;
    }

    /// Stops it gracefully and boots it again.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.boot().await;
    }

    /// Raises or clears the memory alarm. While it is raised, the broker does not read from
    /// connections that publish.
    pub async fn set_memory_alarm(&self, raised: bool) {
        let watermark = if raised { "0" } else { WATERMARK };
        self.rabbitmqctl(&["set_vm_memory_high_watermark", watermark]).await;
    }

    /// Raises or clears the disk alarm, which has the same effect as the memory alarm.
    pub async fn set_disk_alarm(&self, raised: bool) {
        // In bytes, and more than any disk has.
        let limit = if raised { "1000000000000000" } else { DISK_FREE_LIMIT };
        self.rabbitmqctl(&["set_disk_free_limit", limit]).await;
    }

    /// Declares a durable classic queue with these arguments only.
    ///
    /// # Panics
    /// When there is another queue of that name.
    pub async fn declare_queue(&self, name: &str, arguments: &[(&str, i32)]) {
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert((*key).into(), AMQPValue::LongInt(*value));
        }
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let (_connection, channel) = self.channel().await;
        channel
            .queue_declare(name.into(), durable, table)
            .await
            .expect("the queue can be declared");
    }

    /// Deletes a queue and its messages.
    ///
    /// # Panics
    /// When the broker is not reachable.
    pub async fn delete_queue(&self, name: &str) {
        let (_connection, channel) = self.channel().await;
        let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
        deleted.expect("a queue can be deleted");
    }

    /// Waits until a queue exists and all its messages are delivered, and deletes it. Returns the
    /// times before and after the deletion: messages that arrived in between may be lost with the
    /// queue.
    ///
    /// # Panics
    /// When the broker is not reachable, or the queue does not become empty within a minute.
    pub async fn delete_queue_once_empty(&self, name: &str) -> (SystemTime, SystemTime) {
        let (passive, none) =
            (QueueDeclareOptions { passive: true, ..Default::default() }, FieldTable::default());
        eventually("all messages are delivered", DRAIN_DEADLINE, async || {
            let (_connection, channel) = self.channel().await;
            let from = SystemTime::now();
            let queue = channel.queue_declare(name.into(), passive, none.clone()).await.ok()?;
            if queue.message_count() > 0 {
                return None;
            }
            let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
            deleted.expect("a queue can be deleted");
            Some((from, SystemTime::now()))
        })
        .await
    }

    /// Runs `rabbitmqctl` on the node, which takes a second or two, and returns its output.
    ///
    /// # Panics
    /// When it fails.
    pub async fn rabbitmqctl(&self, arguments: &[&str]) -> String {
        let mut command = self.command("rabbitmqctl");
        command.arg("--quiet").args(arguments);
        programs::run(command).await
    }

    /// Runs a script that calls `rabbitmqctl`, as in the node's container, and returns its output
    /// including errors.
    ///
    /// # Panics
    /// When it fails.
    pub async fn run_script(&self, script: &Path, environment: &[(&str, &str)]) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" 2>&1"]).arg(script);
        let mut command = self.with_environment(command);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", scripts().display()))
            .envs(environment.iter().copied());
        programs::run(command).await
    }

    async fn channel(&self) -> (Connection, Channel) {
        let connection = amqp::connect(&self.amqp_uri()).await;
        let connection = connection.expect("the node should accept connections");
        let channel = connection.create_channel().await.expect("a channel should open");
        (connection, channel)
    }

    fn command(&self, script: &str) -> Command {
        self.with_environment(Command::new(programs::find(script, &[scripts()])))
    }

    /// Sets the environment of the command so that it uses this node and no other one.
    fn with_environment(&self, mut command: Command) -> Command {
        let folder = self.scratch.path();
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LANG", "C.UTF-8")
            // The folder of the Erlang cookie.
            .env("HOME", folder)
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_EPMD_PORT", self.epmd.port.to_string())
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_DIST_PORT", self.distribution_port.to_string())
            .env("RABBITMQ_CONF_ENV_FILE", folder.join("rabbitmq-env.conf"))
            .env("RABBITMQ_CONFIG_FILE", folder.join("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", folder.join("advanced.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.join("enabled_plugins"))
            .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", folder.join("log"))
            .env("RABBITMQ_PID_FILE", folder.join("server.pid"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1}",
            )
            .current_dir(folder);
        command
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("server.log")
    }
}

impl Drop for RabbitNode {
    fn drop(&mut self) {
        programs::print_tail_if_panicking(&self.log_path());
    }
}

/// RabbitMQ's own scripts, which run as any user. Debian's scripts in /usr/sbin insist on the user
/// rabbitmq.
fn scripts() -> PathBuf {
    programs::servers_root().join("usr/lib/rabbitmq/bin")
}

/// The version of RabbitMQ, such as `3.10.8`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("rabbitmqctl", &[scripts()]));
    // It may create a cookie in its home.
    command.arg("version").env("HOME", std::env::temp_dir());
    programs::output(&mut command)
}

/// Whether Ra, the Raft implementation of quorum queues, has saved the file by which it finds the
/// logs of the queues.
///
/// It saves the file only after half a second without a change (Ra 2.2, `auto_save` in
/// `ra_directory`). If the node is killed before, a new queue comes back without its messages and
/// never gets a leader, so that every call to it hangs. That is a defect of RabbitMQ, which our
/// tests do not cover. In the header of a dets file, the third word is 0 while a change is not
/// saved.
fn has_ra_saved(names: &Path) -> bool {
    let content = fs::read(names).expect("a node that has booted has this file");
    content.get(8..12).is_some_and(|word| word != [0; 4])
}
