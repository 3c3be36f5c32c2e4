//! A RabbitMQ node that belongs to one test, which can kill it and boot it again.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
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
/// The file of the Erlang cookie, in the home directory.
const COOKIE: &str = ".erlang.cookie";
/// RabbitMQ's own default.
const WATERMARK: &str = "0.4";
/// A test machine is often nearly full, and a blocked broker looks like a hanging test.
const DISK_FREE_LIMIT: &str = "50MB";

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
        let flags = ["-port", &port.to_string(), "-address", "127.0.0.1"];
        let server = scratch.spawn("epmd", &flags);
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
        let [certificate, key] = authority.write_to(node.scratch.path(), None);
        node.configure(&format!(
            "listeners.ssl.own = 127.0.0.1:{}\n\
             ssl_options.certfile = {}\n\
             ssl_options.keyfile = {}\n",
            node.tls_port,
            certificate.display(),
            key.display()
        ));
        node.boot().await;
        node
    }

    /// Boots three empty nodes that form a cluster, which takes about 10 s. A quorum queue has a
    /// member on each node. Its first leader is on the node on which it was declared.
    pub async fn start_cluster() -> [Self; 3] {
        let (epmd, cookie) = (Epmd::start().await, Uuid::now_v7().simple().to_string());
        let [mut first, mut second, mut third] =
            std::array::from_fn(|_| Self::set_up(Arc::clone(&epmd), &cookie));
        for node in [&second, &third] {
            node.configure_cluster_of(&first);
        }
        first.boot().await;
        tokio::join!(second.boot(), third.boot());
        [first, second, third]
    }

    /// Boots an empty node that joins the cluster of this one. Existing quorum queues get a member
    /// on it only by [`RabbitNode::grow_queues_to`].
    pub async fn start_joined(&self) -> Self {
        let cookie = fs::read_to_string(self.scratch.path().join(COOKIE));
        let cookie = cookie.expect("a node that has booted has a cookie");
        let mut node = Self::set_up(Arc::clone(&self.epmd), &cookie);
        node.configure_cluster_of(self);
        node.boot().await;
        node
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
        node.scratch.write("enabled_plugins", "[].\n");
        // Without this file, /etc/rabbitmq/rabbitmq-env.conf would be read.
        node.scratch.write("rabbitmq-env.conf", "");
        if !cookie.is_empty() {
            let path = node.scratch.write(COOKIE, cookie);
            let secret = fs::set_permissions(path, Permissions::from_mode(0o400));
            secret.expect("a scratch file's mode can be changed");
        }
        node
    }

    /// Makes the node join the cluster of `other` when it boots for the first time.
    fn configure_cluster_of(&self, other: &Self) {
        self.configure(&format!(
            "cluster_formation.peer_discovery_backend = classic_config\n\
             cluster_formation.classic_config.nodes.1 = {}\n\
             cluster_formation.classic_config.nodes.2 = {}\n",
            other.name, self.name
        ));
    }

    /// Appends lines to its configuration, which it reads when it boots.
    fn configure(&self, lines: &str) {
        let path = self.scratch.path().join("rabbitmq.conf");
        let existing = fs::read_to_string(path).unwrap_or_default();
        self.scratch.write("rabbitmq.conf", &(existing + lines));
    }

    /// Its AMQP URI, as guest on the default vhost.
    pub fn amqp_uri(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.amqp_port)
    }

    /// The URI of its TLS listener by the name `host`, as guest on the default vhost.
    pub fn amqps_uri(&self, host: &str) -> String {
        format!("amqps://guest:guest@{host}:{}/%2f", self.tls_port)
    }

    /// Its AMQP port, for a proxy.
    pub fn amqp_port(&self) -> u16 {
        self.amqp_port
    }

    /// Whether it was booted, and not stopped or killed since.
    pub fn is_up(&self) -> bool {
        self.server.is_some()
    }

    /// Whether the leader of a quorum queue is on this node.
    pub async fn leads(&self, queue: &str) -> bool {
        let leaders = ["list_queues", "--no-table-headers", "name", "leader"];
        let leaders = self.rabbitmqctl(&leaders).await;
        leaders.lines().any(|line| line.split_whitespace().eq([queue, &self.name]))
    }

    /// Starts the node on the same files and ports, and waits until it accepts AMQP connections.
    pub async fn boot(&mut self) {
        assert!(self.server.is_none(), "the node runs already");
        let mut command = self.command("rabbitmq-server");
        self.scratch.log_to(&mut command);
        // Makes the script replace itself with the server, so that signals reach the server.
        command.env("RUNNING_UNDER_SYSTEMD", "true");
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

    /// Kills the node with SIGKILL, and waits until its port is closed. Does nothing if the node is
    /// down.
    ///
    /// First waits until RabbitMQ has saved the names of newly declared quorum queues, which takes
    /// up to a second. A node that is killed earlier loses these queues with all their messages.
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

    /// Stops the node gracefully, as an operator would.
    pub async fn stop(&mut self) {
        let server = self.server.as_mut().expect("only a running node can be stopped");
        server.signal(Signal::TERM);
        eventually("the RabbitMQ node stops", STOP_DEADLINE, async || server.try_wait()).await;
        self.server = None;
        ports::wait_until_closed(self.amqp_port).await;
    }

    /// Stops the node gracefully and boots it again.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.boot().await;
    }

    /// Adds a member of every quorum queue on `node`, which belongs to the same cluster.
    pub async fn grow_queues_to(&self, node: &Self) {
        self.rabbitmq_queues(&["grow", &node.name, "all"]).await;
    }

    /// Removes `node` from the cluster of this one for good, as an operator would: first the
    /// members of the quorum queues on it, and then the node.
    pub async fn remove_from_cluster(&self, node: &mut Self) {
        self.rabbitmq_queues(&["shrink", &node.name]).await;
        node.stop().await;
        self.rabbitmqctl(&["forget_cluster_node", &node.name]).await;
    }

    /// Closes the AMQP port, or opens it again. Open connections are not affected.
    pub async fn set_accepting(&self, is_accepting: bool) {
        let command = if is_accepting { "resume_listeners" } else { "suspend_listeners" };
        self.rabbitmqctl(&[command]).await;
    }

    /// Cuts the connections between this node and `others`, and rejects new ones until
    /// [`RabbitNode::reconnect_to`]. The AMQP ports of all nodes stay open.
    pub async fn disconnect_from(&self, others: &[Self]) {
        // A node rejects a connection if the two cookies for it differ.
        self.eval_for_each(others, "erlang:set_cookie(Node, cut), erlang:disconnect_node(Node)")
            .await;
    }

    /// Ends [`RabbitNode::disconnect_from`], and waits until the nodes are connected again.
    pub async fn reconnect_to(&self, others: &[Self]) {
        self.eval_for_each(others, "erlang:set_cookie(Node, erlang:get_cookie())").await;
        eventually("the RabbitMQ nodes are connected", BOOT_DEADLINE, async || {
            let connected = self.eval_for_each(others, "lists:member(Node, nodes())").await;
            (!connected.contains("false")).then_some(())
        })
        .await;
    }

    /// Evaluates an Erlang expression on this node for each other `Node`, and returns the list of
    /// results.
    async fn eval_for_each(&self, others: &[Self], expression: &str) -> String {
        let names: Vec<String> = others.iter().map(|node| format!("'{}'", node.name)).collect();
        let list = format!("[begin {expression} end || Node <- [{}]].", names.join(", "));
        self.rabbitmqctl(&["eval", &list]).await
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
    pub async fn delete_queue(&self, name: &str) {
        let (_connection, channel) = self.channel().await;
        let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
        deleted.expect("a queue can be deleted");
    }

    /// Waits until a queue exists and all its messages are delivered, and deletes it. Returns the
    /// times before and after the deletion: messages that arrived in between may be lost with the
    /// queue.
    pub async fn delete_queue_once_empty(&self, name: &str) -> (SystemTime, SystemTime) {
        eventually("all messages are delivered", DRAIN_DEADLINE, async || {
            let (_connection, channel) = self.channel().await;
            let from = SystemTime::now();
            if amqp::ready_messages(&channel, name).await.ok()? > 0 {
                return None;
            }
            let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
            deleted.expect("a queue can be deleted");
            Some((from, SystemTime::now()))
        })
        .await
    }

    /// Runs `rabbitmqctl` on the node, which takes a second or two, and returns its output.
    pub async fn rabbitmqctl(&self, arguments: &[&str]) -> String {
        self.run_tool("rabbitmqctl", arguments).await
    }

    async fn rabbitmq_queues(&self, arguments: &[&str]) -> String {
        self.run_tool("rabbitmq-queues", arguments).await
    }

    async fn run_tool(&self, tool: &str, arguments: &[&str]) -> String {
        let mut command = self.command(tool);
        command.arg("--quiet").args(arguments);
        programs::run(command).await
    }

    /// Runs a script that calls `rabbitmqctl`, as in the node's container, and returns its output
    /// including errors.
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
}

/// RabbitMQ's own scripts, which run as any user. Debian's scripts in /usr/sbin insist on the user
/// rabbitmq.
fn scripts() -> PathBuf {
    programs::servers_root().join("usr/lib/rabbitmq/bin")
}

/// The version of RabbitMQ, such as `3.10.8`.
pub(crate) fn version() -> String {
    let mut command = Command::new(programs::find("rabbitmqctl", &[scripts()]));
    // rabbitmqctl may create a cookie in its home directory.
    command.arg("version").env("HOME", std::env::temp_dir());
    programs::output(&mut command)
}

/// Whether Ra, the Raft implementation of quorum queues, has saved the file by which it finds the
/// logs of the queues.
///
/// Ra saves the file only after half a second without a change (Ra 2.2, `auto_save` in
/// `ra_directory`). If the node is killed earlier, a new queue comes back without its messages and
/// never gets a leader, so that every call to it hangs. Our tests do not cover this defect of
/// RabbitMQ. In the header of a dets file, the third word is 0 while a change is not saved.
fn has_ra_saved(names: &Path) -> bool {
    let content = fs::read(names).expect("a node that has booted has this file");
    content.get(8..12).is_some_and(|word| word != [0; 4])
}
