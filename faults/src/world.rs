//! A whole system for one case: servers, services and partner.

use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use broker::{DeadLetter, DeadLetterAction, Publisher};
use pipeline::System;
use testbed::{
    PostgresCluster, Process, Proxy, RabbitNode, Scratch, WITH_READ_ONLY_ROOT, WITH_SMALL_DISK,
    eventually, free_port, postgres_environment,
};
use tester::ledger::Entry;

use crate::audit::{Audit, Recovery, broker_config, due_at, process_dead_letters};
use crate::figures::{Allowed, Verdict};
use crate::load::{Load, Rate};
use crate::probe::Prober;
use crate::rows;
use crate::status_api::StatusApi;

/// `QUEUE_NAME`.
pub(crate) const QUEUE: &str = "objects";
/// Seconds of load before the fault.
const LOAD_BEFORE_FAULT_SECONDS: usize = 4;
/// Time for which the load continues after the last recovery.
const LOAD_AFTER_RECOVERY: Duration = Duration::from_secs(3);
/// Time limit for the start and for a recovery of the world.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
/// Time after the restart of a killed producer in which callbacks may still be cut off.
const CUT_OFF_MARGIN: Duration = Duration::from_millis(100);

/// The configuration of a world. Variables are set in addition to those that each service always
/// gets.
#[expect(clippy::struct_excessive_bools, reason = "each one is an independent option")]
pub(crate) struct Setup {
    /// The rate of the load.
    pub(crate) rate: Rate,
    /// Whether the services reach broker and database through [`World::to_broker`] and
    /// [`World::to_database`], which can be silenced or cut.
    pub(crate) has_proxies: bool,
    /// Makes the broker a cluster of three nodes: [`World::broker`], which has the first leaders of
    /// all queues, and [`World::other_nodes`]. The value is the index of the node to which the
    /// services connect.
    pub(crate) cluster: Option<usize>,
    /// Maximum number of connections of the load; `None` for as many as it needs.
    pub(crate) connections: Option<u32>,
    /// Whether the producer's spool is on a disk of 48 MiB, which disappears with the producer.
    pub(crate) small_spool_disk: bool,
    /// Whether the services can write only to the producer's spool.
    pub(crate) read_only_root: bool,
    /// Whether the table is on a small disk; see [`PostgresCluster::fill_small_disk`].
    pub(crate) small_database_disk: bool,
    /// The number of consumers.
    pub(crate) consumers: usize,
    /// The wrapper with which the producer is started; see [`Process::spawn_wrapped`].
    pub(crate) producer_wrapper: &'static [&'static str],
    /// Variables of the producer.
    pub(crate) producer: Vec<(&'static str, &'static str)>,
    /// Variables of each consumer.
    pub(crate) consumer: Vec<(&'static str, &'static str)>,
    /// Variables of the routine.
    pub(crate) routine: Vec<(&'static str, &'static str)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            rate: Rate::USUAL,
            has_proxies: false,
            cluster: None,
            connections: None,
            small_spool_disk: false,
            read_only_root: false,
            small_database_disk: false,
            consumers: 1,
            producer_wrapper: &[],
            producer: Vec::new(),
            consumer: Vec::new(),
            routine: Vec::new(),
        }
    }
}

/// Servers, services and load of one case, which all end with it.
///
/// The processes in `producer`, `consumers` and `routine` must still run at the end of the case. A
/// case that ends one of them must replace or remove it.
pub(crate) struct World {
    pub(crate) broker: RabbitNode,
    /// Empty without [`Setup::cluster`].
    pub(crate) other_nodes: Vec<RabbitNode>,
    pub(crate) database: PostgresCluster,
    pub(crate) status_api: StatusApi,
    /// Used only with [`Setup::has_proxies`].
    pub(crate) to_broker: Proxy,
    /// Used only with [`Setup::has_proxies`].
    pub(crate) to_database: Proxy,
    pub(crate) producer: Option<Process>,
    pub(crate) consumers: Vec<Process>,
    pub(crate) routine: Option<Process>,
    /// `None` in cases that do not start one.
    pub(crate) viewer: Option<Process>,
    setup: Setup,
    system: System,
    producer_address: SocketAddr,
    load: Option<Load>,
    prober: Prober,
    recoveries: Vec<Recovery>,
    /// Start and end of each time in which no producer ran, because the case had killed it.
    producer_downtimes: Vec<(SystemTime, Option<SystemTime>)>,
    /// Times before and after each deletion of the queue.
    queue_deletions: Vec<(SystemTime, SystemTime)>,
    scratch: Scratch,
}

impl World {
    /// Starts servers and services, and waits until they are ready.
    pub(crate) async fn start(setup: Setup) -> Self {
        let mut world = Self::start_servers(setup).await;
        world.start_services();
        world.wait_until_ready().await;
        world
    }

    /// Starts only the servers: broker, database and status API.
    pub(crate) async fn start_servers(setup: Setup) -> Self {
        let database = async {
            if setup.small_database_disk {
                return PostgresCluster::start_on_a_small_disk().await;
            }
            PostgresCluster::start().await
        };
        let nodes = async {
            if setup.cluster.is_none() {
                return (RabbitNode::start().await, Vec::new());
            }
            let [broker, second, third] = RabbitNode::start_cluster().await;
            declare_queues(&broker.amqp_uri()).await;
            (broker, vec![second, third])
        };
        let ((broker, other_nodes), database) = tokio::join!(nodes, database);
        let node = std::iter::once(&broker).chain(&other_nodes).nth(setup.cluster.unwrap_or(0));
        let node = node.expect("there should be such a node");
        rows::prepare(database.pool()).await;
        let status_api = StatusApi::start();
        let to_broker = Proxy::start(format!("127.0.0.1:{}", node.amqp_port())).await;
        let to_database = Proxy::start(format!("127.0.0.1:{}", database.port())).await;
        let (amqp_uri, database_url) = if setup.has_proxies {
            let (broker, database) = (to_broker.addr(), to_database.addr());
            (
                format!("amqp://guest:guest@{broker}/%2f"),
                format!("postgres://postgres@{database}/postgres"),
            )
        } else {
            (node.amqp_uri(), database.url().to_owned())
        };
        let system = System {
            amqp_uri,
            queue: QUEUE.to_owned(),
            database: postgres_environment(&database_url),
            status_api: status_api.endpoint(),
        };
        Self {
            broker,
            other_nodes,
            database,
            status_api,
            to_broker,
            to_database,
            producer: None,
            consumers: Vec::new(),
            routine: None,
            viewer: None,
            setup,
            system,
            producer_address: SocketAddr::from(([127, 0, 0, 1], free_port())),
            load: None,
            prober: Prober::default(),
            recoveries: Vec::new(),
            producer_downtimes: Vec::new(),
            queue_deletions: Vec::new(),
            scratch: Scratch::new("faults"),
        }
    }

    /// Starts a producer, the consumers and a routine.
    pub(crate) fn start_services(&mut self) {
        self.producer = Some(self.spawn_producer());
        self.consumers = (0..self.setup.consumers).map(|_| self.spawn_consumer()).collect();
        self.routine = Some(self.spawn_routine());
    }

    /// Waits until all services are ready.
    pub(crate) async fn wait_until_ready(&self) {
        for service in self.services() {
            service.ready().await;
        }
    }

    /// Starts a producer at the address to which the load is posted, with the spool of the last
    /// one.
    pub(crate) fn spawn_producer(&self) -> Process {
        self.spawn_producer_at(self.producer_address, &self.spool())
    }

    /// Starts a producer with this address and this spool.
    pub(crate) fn spawn_producer_at(&self, address: SocketAddr, spool: &Path) -> Process {
        let (spool, address) = (spool.display().to_string(), address.to_string());
        let mut variables =
            vec![("PRODUCER_ADDR", address.as_str()), ("SPOOL_DIR", spool.as_str())];
        variables.extend(&self.setup.producer);
        if self.setup.small_spool_disk {
            fs::create_dir_all(self.spool()).expect("a scratch directory should be writable");
            return self.system.spawn_wrapped(&WITH_SMALL_DISK, "producer", &variables);
        }
        if !self.setup.producer_wrapper.is_empty() {
            let wrapper = self.setup.producer_wrapper;
            return self.system.spawn_wrapped(wrapper, "producer", &variables);
        }
        self.spawn("producer", &variables)
    }

    /// The producer's `SPOOL_DIR`.
    pub(crate) fn spool(&self) -> PathBuf {
        self.scratch.path().join("spool")
    }

    /// Starts a consumer with a limit that is high enough for all lookups of the load.
    pub(crate) fn spawn_consumer(&self) -> Process {
        let mut variables = vec![("MAX_CONSUMERS", "300")];
        variables.extend(&self.setup.consumer);
        self.spawn("consumer", &variables)
    }

    /// Starts a routine. By default, its TTL is so long that it deletes no row of a case.
    pub(crate) fn spawn_routine(&self) -> Process {
        let mut variables = vec![("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "500ms")];
        variables.extend(&self.setup.routine);
        self.spawn("routine", &variables)
    }

    fn spawn(&self, service: &str, variables: &[(&'static str, &str)]) -> Process {
        if self.setup.read_only_root {
            fs::create_dir_all(self.spool()).expect("a scratch directory should be writable");
            return self.system.spawn_wrapped(&WITH_READ_ONLY_ROOT, service, variables);
        }
        self.system.spawn(service, variables)
    }

    /// Starts a viewer.
    pub(crate) fn spawn_viewer(&self) -> Process {
        self.system.spawn("viewer", &[])
    }

    /// The producer.
    pub(crate) fn producer(&self) -> &Process {
        self.producer.as_ref().expect("there should be a producer")
    }

    /// The number of messages in the producer's spool.
    pub(crate) async fn spooled(&self) -> f64 {
        self.producer().metric("lastseen_spool_messages").await
    }

    /// Waits until at least `minimum` messages are in the producer's spool.
    pub(crate) async fn wait_for_spooled(&self, minimum: f64) {
        let what = format!("{minimum} messages are in the spool");
        eventually(&what, PATIENCE, async || (self.spooled().await >= minimum).then_some(())).await;
    }

    /// Waits until the producer has relayed the first message from its spool.
    pub(crate) async fn wait_for_first_relay(&self) {
        eventually("the producer relays", PATIENCE, async || {
            let relayed = self.producer().metric("lastseen_relayed_total").await;
            (relayed >= 1.0).then_some(())
        })
        .await;
    }

    /// Waits until the producer has relayed all messages that it has spooled since its start. It
    /// compares counters, because the gauge is up to a second old.
    pub(crate) async fn wait_until_all_relayed(&self) {
        eventually("all spooled messages are relayed", PATIENCE, async || {
            let relayed = self.producer().metric("lastseen_relayed_total").await;
            let spooled = self.producer().metric("lastseen_spooled_total").await;
            (relayed >= spooled).then_some(())
        })
        .await;
    }

    /// The address of the producer.
    pub(crate) fn producer_address(&self) -> SocketAddr {
        self.producer_address
    }

    /// The callback URL.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}/callback", self.producer_address)
    }

    /// Starts the load, and lets it run for [`LOAD_BEFORE_FAULT_SECONDS`].
    pub(crate) async fn start_load(&mut self) {
        let path = self.scratch.path().join("ledger.jsonl");
        let load = self.load.insert(Load::start(
            &self.endpoint(),
            self.setup.rate,
            self.setup.connections,
            path,
        ));
        let enough = self.setup.rate.callbacks as usize * LOAD_BEFORE_FAULT_SECONDS;
        eventually("the load has started", PATIENCE, async || {
            (load.accepted() >= enough).then_some(())
        })
        .await;
    }

    /// Lets the system run for `duration`.
    pub(crate) async fn run_for(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Kills the producer. Until [`World::restart_producer`], a callback whose connection is
    /// refused or breaks does not count as unanswered.
    pub(crate) async fn kill_producer(&mut self) {
        let producer = self.producer.take().expect("there should be a producer to kill");
        self.producer_downtimes.push((SystemTime::now(), None));
        producer.kill();
        producer.wait().await;
    }

    /// Starts another producer on the same spool, and waits until it accepts callbacks.
    pub(crate) async fn restart_producer(&mut self) {
        let producer = self.producer.insert(self.spawn_producer());
        producer.wait_for_log("accepting callbacks").await;
        if let Some((_, until @ None)) = self.producer_downtimes.last_mut() {
            *until = Some(SystemTime::now() + CUT_OFF_MARGIN);
        }
    }

    /// Sends all dead letters back to the queue, and returns them.
    pub(crate) async fn redrive_dead_letters(&self) -> Vec<DeadLetter> {
        process_dead_letters(&self.broker_uri(), DeadLetterAction::Redrive).await
    }

    /// Deletes the queue, as an operator could. Messages in flight to the queue at that moment may
    /// be lost, because RabbitMQ confirms them although the queue is gone. Callbacks that were
    /// answered before or arrive later must not be lost.
    pub(crate) async fn delete_queue(&mut self) {
        self.queue_deletions.push(self.broker.delete_queue_once_empty(QUEUE).await);
    }

    /// The ledger entries of the callbacks that were due in `during`.
    pub(crate) fn entries_due(&mut self, during: Range<SystemTime>) -> Vec<Entry> {
        let entries = self.load.as_mut().map(Load::entries).unwrap_or_default();
        entries.iter().filter(|entry| during.contains(&due_at(entry))).cloned().collect()
    }

    /// Kills the database, and boots an empty one in its place. The rows that were committed in the
    /// old one are recorded as gone, because the services have not lost them.
    pub(crate) async fn replace_database(&mut self) {
        self.database.kill().await;
        let mut former = self.database.replace().await;
        former.boot().await;
        let committed = rows::committed(former.pool()).await;
        drop(former);
        self.database.boot().await;
        rows::prepare(self.database.pool()).await;
        rows::record_gone(self.database.pool(), &committed).await;
    }

    /// The rate of the load.
    pub(crate) fn rate(&self) -> Rate {
        self.setup.rate
    }

    /// The first id that the load has not posted yet. Later ids follow in ascending order.
    pub(crate) fn next_id(&mut self) -> i64 {
        let last = self.load.iter_mut().flat_map(Load::entries).flat_map(|entry| &entry.ids);
        last.max().map_or(1, |last| last + 1)
    }

    /// Marks the end of the fault, and measures the time until a probe has been accepted and an
    /// object that was looked up after this call is committed.
    pub(crate) async fn wait_for_recovery(&mut self) {
        self.measure_recovery(Some(SystemTime::now())).await;
    }

    /// Like [`World::wait_for_recovery`], but the committed object must be a probe. It is for
    /// faults after which lookups that began before the end of the fault can still be committed.
    pub(crate) async fn wait_for_probe_recovery(&mut self) {
        self.measure_recovery(None).await;
    }

    async fn measure_recovery(&mut self, committed_after: Option<SystemTime>) {
        let (ended_at, started) = (SystemTime::now(), Instant::now());
        let endpoint = self.endpoint();
        let probing =
            self.prober.probe_until_committed(&endpoint, self.database.pool(), committed_after);
        let took = tokio::time::timeout(PATIENCE, probing).await;
        let took = took.ok().map(|()| started.elapsed());
        self.recoveries.push(Recovery { ended_at, took });
    }

    /// Ends the load a little later, waits until all that was accepted is settled, and holds the
    /// audit against each other.
    pub(crate) async fn finish(mut self, allowed: Allowed) -> Verdict {
        self.run_for(LOAD_AFTER_RECOVERY).await;
        let entries = match self.load.take() {
            Some(load) => load.stop().await,
            None => Vec::new(),
        };
        let spooled = match &self.producer {
            Some(producer) => producer.metric("lastseen_spooled_total").await,
            None => 0.0,
        };
        // A slow disk can delay publisher confirms in any case, so that messages are spooled.
        let allowed_now =
            Allowed { looked_up_twice: allowed.looked_up_twice || spooled > 0.0, ..allowed };
        let broker_uri = self.broker_uri();
        let audit = Audit {
            entries,
            probes: self.prober.accepted(),
            recoveries: &self.recoveries,
            producer_downtimes: &self.producer_downtimes,
            queue_deletions: &self.queue_deletions,
            status_api: &self.status_api,
            table: self.database.pool(),
            broker_uri: &broker_uri,
        };
        let mut verdict = audit.run(allowed_now).await;
        let twice = u32::try_from(verdict.figures.looked_up_twice).unwrap_or(u32::MAX);
        if !allowed.looked_up_twice && f64::from(twice) > spooled {
            verdict
                .breaches
                .push(format!("{twice} ids were looked up twice, {spooled} were spooled"));
        }
        let ended = self.services().filter(|service| !service.is_running()).count();
        if ended > 0 {
            verdict.breaches.push(format!("{ended} services ended on their own"));
        }
        verdict
    }

    /// The URI of a node that is up.
    fn broker_uri(&self) -> String {
        let mut nodes = std::iter::once(&self.broker).chain(&self.other_nodes);
        let node = nodes.find(|node| node.is_up()).unwrap_or(&self.broker);
        node.amqp_uri()
    }

    /// All services that must run at the end of the case.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Process> {
        self.producer.iter().chain(&self.consumers).chain(&self.routine).chain(&self.viewer)
    }
}

/// Declares all queues on the node at `uri`, which makes it their leader.
async fn declare_queues(uri: &str) {
    let publisher = Publisher::start(&broker_config(uri), "faults: first leader");
    let publisher = publisher.expect("a publisher opens no file");
    publisher.wait_until_open().await;
    publisher.close().await;
}
