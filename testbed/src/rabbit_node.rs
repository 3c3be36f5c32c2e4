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

/// A RabbitMQ node without plugins. It has its own files, ports, cookie and epmd, so that it interferes
/// neither with the machine's RabbitMQ nor with another test's. It boots in about 4 s.
#[derive(Debug)]
pub struct RabbitNode {
    /// `None` while it is down.
    server: Option<ProcessGroup>,
    epmd: Arc<Epmd>,
    name: String,
    amqp_port: u16,
    /// 0 when it has no such listener.
    tls_port: u16,
    distribution_port: u16,
    scratch: Scratch,
}

/// The port mapper of one node, or of all nodes of a cluster. It stays up all the time, as it does when a
/// node on a real machine dies. The test starts it because an epmd that a node starts is a daemon, which
/// nobody could find again.
#[derive(Debug)]
struct Epmd {
    // Before its files.
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

    /// Like [`RabbitNode::start`], with a listener for TLS besides, that has the authority's
    /// certificate.
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

    /// Boots three empty nodes that form a cluster, which takes about 10 s. A quorum queue has a member
    /// on each; its first leader is on the node that declared it.
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

    /// The files and ports of a node, whose cookie RabbitMQ makes if it is empty.
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
        let known = fs::read_to_string(path).unwrap_or_default();
        self.write("rabbitmq.conf", &(known + lines));
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        fs::write(&path, content).expect("a scratch file should be writable");
        path
    }

    /// Where it is, for guest, on the default vhost.
    #[must_use]
    pub fn amqp_uri(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.amqp_port)
    }

    /// Where its listener for TLS is, by that `host`, for guest, on the default vhost.
    #[must_use]
    pub fn amqps_uri(&self, host: &str) -> String {
        format!("amqps://guest:guest@{host}:{}/%2f", self.tls_port)
    }

    /// Its AMQP port, for a proxy.
    #[must_use]
    pub fn amqp_port(&self) -> u16 {
        self.amqp_port
    }

    /// Whether it was booted and neither stopped nor killed since.
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

    /// Starts it on the same files and ports, and waits until it takes AMQP connections.
    ///
    /// # Panics
    /// When it runs already, or is not there within three minutes.
    pub async fn boot(&mut self) {
        assert!(self.server.is_none(), "the node runs already");
        let log = File::options().create(true).append(true).open(self.log_path());
        let log = log.expect("a scratch file should be writable");
        let mut command = self.command("rabbitmq-server");
        command
            .stdout(log.try_clone().expect("a file handle can be duplicated"))
            .stderr(log)
            // The script then becomes the server instead of standing between it and our signals.
            .env("RUNNING_UNDER_SYSTEMD", "true");
        let (port, uri) = (self.amqp_port, self.amqp_uri());
        let server = self.server.insert(ProcessGroup::spawn(&mut command, self.scratch.path()));
        eventually("the RabbitMQ node takes connections", BOOT_DEADLINE, async || {
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

    /// Kills it as the kernel would, and waits until its port is closed. Nothing happens when it is
    /// down.
    ///
    /// First it waits, for up to a second, until RabbitMQ has saved the names of quorum queues just
    /// declared: killed before that, it would lose them with all their messages.
    pub async fn kill(&mut self) {
        if self.server.is_some() {
            let folder = self.scratch.path().join("mnesia").join(&self.name).join("quorum");
            let names = folder.join(&self.name).join("names.dets");
            let what = "RabbitMQ has saved which quorum queues there are";
            eventually(what, SAVE_DEADLINE, async || ra_has_saved(&names).then_some(())).await;
        }
        drop(self.server.take());
        ports::closed(self.amqp_port).await;
    }

    /// Stops it in good order, as an operator would.
    ///
    /// # Panics
    /// When it is down, or not down within 60 s.
    pub async fn stop(&mut self) {
        let server = self.server.as_mut().expect("only a node that runs can be stopped");
        server.signal(Signal::TERM);
        eventually("the RabbitMQ node stops", STOP_DEADLINE, async || server.try_wait()).await;
        self.server = None;
        ports::closed(self.amqp_port).await;
    }

    /// Stops it in good order and boots it again.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.boot().await;
    }

    /// Raises or clears the memory alarm; while it is up, the broker reads nothing from connections
    /// that publish.
    pub async fn set_memory_alarm(&self, raised: bool) {
        let watermark = if raised { "0" } else { WATERMARK };
        self.rabbitmqctl(&["set_vm_memory_high_watermark", watermark]).await;
    }

    /// Raises or clears the disk alarm, which does the same as that of the memory.
    pub async fn set_disk_alarm(&self, raised: bool) {
        // In bytes: more than any disk has.
        let limit = if raised { "1000000000000000" } else { DISK_FREE_LIMIT };
        self.rabbitmqctl(&["set_disk_free_limit", limit]).await;
    }

    /// Declares a durable queue with these arguments and no others, so a classic one.
    ///
    /// # Panics
    /// When there is another of that name.
    pub async fn declare_queue(&self, name: &str, arguments: &[(&str, i32)]) {
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert((*key).into(), AMQPValue::LongInt(*value));
        }
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let (_connection, channel) = self.channel().await;
        channel.queue_declare(name.into(), durable, table).await.expect("the queue is free");
    }

    /// Deletes a queue with all that is in it.
    ///
    /// # Panics
    /// When the broker is not there.
    pub async fn delete_queue(&self, name: &str) {
        let (_connection, channel) = self.channel().await;
        let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
        deleted.expect("a queue can be deleted");
    }

    /// Deletes a queue once it is there and all that came in has been delivered, and gives from when to
    /// when the broker was at it: what came in meanwhile may have gone with the queue.
    ///
    /// # Panics
    /// When the broker is not there, or the queue is not emptied within a minute.
    pub async fn delete_queue_once_empty(&self, name: &str) -> (SystemTime, SystemTime) {
        let (passive, none) =
            (QueueDeclareOptions { passive: true, ..Default::default() }, FieldTable::default());
        eventually("all that came in is delivered", DRAIN_DEADLINE, async || {
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

    /// Runs `rabbitmqctl` on the node, which takes a second or two, and gives what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub async fn rabbitmqctl(&self, arguments: &[&str]) -> String {
        let mut command = self.command("rabbitmqctl");
        command.arg("--quiet").args(arguments);
        programs::run(command).await
    }

    /// Runs a script that calls `rabbitmqctl`, as beside the node in its container, with that
    /// environment, and gives what it printed, errors included.
    ///
    /// # Panics
    /// When it fails.
    pub async fn run_script(&self, script: &Path, environment: &[(&str, &str)]) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" 2>&1"]).arg(script);
        let mut command = self.within(command);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", scripts().display()))
            .envs(environment.iter().copied());
        programs::run(command).await
    }

    async fn channel(&self) -> (Connection, Channel) {
        let connection = amqp::connect(&self.amqp_uri()).await;
        let connection = connection.expect("the node should take connections");
        let channel = connection.create_channel().await.expect("a channel should open");
        (connection, channel)
    }

    fn command(&self, script: &str) -> Command {
        self.within(Command::new(programs::find(script, &[scripts()])))
    }

    /// Gives the command the environment by which the node, and nothing else, is found.
    fn within(&self, mut command: Command) -> Command {
        let folder = self.scratch.path();
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LANG", "C.UTF-8")
            // The Erlang cookie is there.
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

/// RabbitMQ's own scripts, which run as any user. Debian's scripts in /usr/sbin insist on the user rabbitmq.
fn scripts() -> PathBuf {
    programs::servers_root().join("usr/lib/rabbitmq/bin")
}

/// Such as `3.10.8`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("rabbitmqctl", &[scripts()]));
    // Its home is where it would keep a cookie.
    command.arg("version").env("HOME", std::env::temp_dir());
    programs::output(&mut command)
}

/// Whether the file by which Ra, the Raft of quorum queues, finds a queue's log has all that it
/// should have.
///
/// It is saved only after half a second without a change (Ra 2.2, `auto_save` in `ra_directory`). A
/// queue that is not in it when the node is killed comes back without its messages, and without a
/// leader for good, so that every call to it hangs. This is RabbitMQ's to mend and not what our
/// tests are about. In the header of a dets file, the third word is 0 while a change is not saved.
fn ra_has_saved(names: &Path) -> bool {
    let content = fs::read(names).expect("a node that has booted has this file");
    content.get(8..12).is_some_and(|word| word != [0; 4])
}
