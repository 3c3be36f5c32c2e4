//! One whole system for one case: its servers, its services, its partner.

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
/// For how many seconds the load runs before the fault.
const LOAD_BEFORE_FAULT_SECONDS: usize = 4;
/// How long it goes on after the last recovery.
const LOAD_AFTER_RECOVERY: Duration = Duration::from_secs(3);
/// How long a case waits for its world to work, or to work again, before it gives up.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
/// For how long after the death of one of several producers callbacks may still run into it.
const CUT_OFF_MARGIN: Duration = Duration::from_millis(100);

/// What is particular about a world. Variables come on top of those that each service gets anyway.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each says whether the world has one peculiarity"
)]
pub(crate) struct Setup {
    /// How many callbacks there are.
    pub(crate) rate: Rate,
    /// Whether the services reach broker and database through [`World::to_broker`] and
    /// [`World::to_database`], which can go silent or be cut.
    pub(crate) has_proxies: bool,
    /// Whether the broker is a cluster of three nodes: [`World::broker`], on which all queues have their first
    /// leaders, and [`World::other_nodes`]; and to which of these three the services connect.
    pub(crate) cluster: Option<usize>,
    /// How many connections the load may use; as many as it needs if it is not said.
    pub(crate) connections: Option<u32>,
    /// Whether the producer's spool is on a disk of 48 MiB, which goes with the producer.
    pub(crate) small_spool_disk: bool,
    /// Whether nothing is writable for the services but the producer's spool.
    pub(crate) read_only_root: bool,
    /// Whether the table is on a small disk: [`PostgresCluster::fill_small_disk`].
    pub(crate) small_database_disk: bool,
    /// How many consumers there are.
    pub(crate) consumers: usize,
    /// The command through which the producer is started, which ends in executing it.
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

/// Servers, services and load of one case. All of it ends with it.
///
/// Who is in `producer`, `consumers` and `routine` at the end of the case must still run: a case
/// that ends one puts another into its place, or takes it out.
pub(crate) struct World {
    pub(crate) broker: RabbitNode,
    /// Empty unless [`Setup::cluster`] asks for a cluster.
    pub(crate) other_nodes: Vec<RabbitNode>,
    pub(crate) database: PostgresCluster,
    pub(crate) status_api: StatusApi,
    /// In between only if [`Setup::has_proxies`] says so.
    pub(crate) to_broker: Proxy,
    /// In between only if [`Setup::has_proxies`] says so.
    pub(crate) to_database: Proxy,
    pub(crate) producer: Option<Process>,
    pub(crate) consumers: Vec<Process>,
    pub(crate) routine: Option<Process>,
    /// Only in cases that start one.
    pub(crate) viewer: Option<Process>,
    setup: Setup,
    system: System,
    producer_address: SocketAddr,
    load: Option<Load>,
    prober: Prober,
    recoveries: Vec<Recovery>,
    /// From when to when nobody took callbacks, because the case had killed who did.
    producer_downtimes: Vec<(SystemTime, Option<SystemTime>)>,
    /// From when to when the broker was deleting the queue.
    queue_deletions: Vec<(SystemTime, SystemTime)>,
    scratch: Scratch,
}

impl World {
    /// Everything up and ready.
    pub(crate) async fn start(setup: Setup) -> Self {
        let mut world = Self::servers(setup).await;
        world.start_services();
        world.wait_until_ready().await;
        world
    }

    /// The servers only: broker, database, status API.
    pub(crate) async fn servers(setup: Setup) -> Self {
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

    /// A producer where the load goes to. Each one finds the spool that the one before it left.
    pub(crate) fn spawn_producer(&self) -> Process {
        self.spawn_producer_at(self.producer_address, &self.spool())
    }

    /// A producer that listens there, with its spool there.
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
            let through = self.setup.producer_wrapper;
            return self.system.spawn_wrapped(through, "producer", &variables);
        }
        self.spawn("producer", &variables)
    }

    /// The producer's `SPOOL_DIR`.
    pub(crate) fn spool(&self) -> PathBuf {
        self.scratch.path().join("spool")
    }

    /// A consumer with room for all lookups that the load leads to.
    pub(crate) fn spawn_consumer(&self) -> Process {
        let mut variables = vec![("MAX_CONSUMERS", "300")];
        variables.extend(&self.setup.consumer);
        self.spawn("consumer", &variables)
    }

    /// A routine that deletes nothing which a case could want to see, unless told so.
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

    /// A viewer of the table.
    pub(crate) fn spawn_viewer(&self) -> Process {
        self.system.spawn("viewer", &[])
    }

    /// The producer.
    pub(crate) fn producer(&self) -> &Process {
        self.producer.as_ref().expect("there should be a producer")
    }

    /// How many messages wait in the producer's spool.
    pub(crate) async fn spooled(&self) -> f64 {
        self.producer().metric("lastseen_spool_messages").await
    }

    /// Waits until at least so many messages are in the producer's spool.
    pub(crate) async fn wait_for_spooled(&self, least: f64) {
        let what = format!("{least} messages are in the spool");
        eventually(&what, PATIENCE, async || (self.spooled().await >= least).then_some(())).await;
    }

    /// Waits until the producer has begun to relay what is in its spool.
    pub(crate) async fn wait_for_first_relay(&self) {
        eventually("the producer relays", PATIENCE, async || {
            let relayed = self.producer().metric("lastseen_relayed_total").await;
            (relayed >= 1.0).then_some(())
        })
        .await;
    }

    /// Waits until the producer has relayed all that it has spooled since its start. By its counters, for the
    /// gauge is up to a second old.
    pub(crate) async fn wait_until_all_relayed(&self) {
        eventually("all is relayed", PATIENCE, async || {
            let relayed = self.producer().metric("lastseen_relayed_total").await;
            let spooled = self.producer().metric("lastseen_spooled_total").await;
            (relayed >= spooled).then_some(())
        })
        .await;
    }

    /// Where the producer listens.
    pub(crate) fn producer_address(&self) -> SocketAddr {
        self.producer_address
    }

    /// Where callbacks are posted to.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}/callback", self.producer_address)
    }

    /// Starts the load, and lets it run for the usual while.
    pub(crate) async fn start_load(&mut self) {
        let path = self.scratch.path().join("ledger.jsonl");
        let load = self.load.insert(Load::start(
            &self.endpoint(),
            self.setup.rate,
            self.setup.connections,
            path,
        ));
        let enough = self.setup.rate.callbacks as usize * LOAD_BEFORE_FAULT_SECONDS;
        eventually("the load is under way", PATIENCE, async || {
            (load.accepted() >= enough).then_some(())
        })
        .await;
    }

    /// Lets things be as they are for so long.
    pub(crate) async fn run_for(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Kills the producer. Until [`World::restart_producer`], a callback that is cut off or finds
    /// nobody to connect to does not count as unanswered.
    pub(crate) async fn kill_producer(&mut self) {
        let producer = self.producer.take().expect("there should be a producer to kill");
        self.producer_downtimes.push((SystemTime::now(), None));
        producer.kill();
        producer.wait().await;
    }

    /// Starts another producer on the spool of the last, and waits until it takes callbacks.
    pub(crate) async fn restart_producer(&mut self) {
        let producer = self.producer.insert(self.spawn_producer());
        producer.wait_for_log("accepting callbacks").await;
        if let Some((_, until @ None)) = self.producer_downtimes.last_mut() {
            *until = Some(SystemTime::now() + CUT_OFF_MARGIN);
        }
    }

    /// Sends all dead letters back to the queue, and says which they were.
    pub(crate) async fn redrive_dead_letters(&self) -> Vec<DeadLetter> {
        process_dead_letters(&self.broker_uri(), DeadLetterAction::Redrive).await
    }

    /// Deletes the queue, as only an operator can. What is on its way into it at that moment is lost by
    /// the operator's will: RabbitMQ confirms it although the queue is gone, so that nobody can know.
    /// What was answered before, or comes in after, is still not to be lost.
    pub(crate) async fn delete_queue(&mut self) {
        self.queue_deletions.push(self.broker.delete_queue_once_empty(QUEUE).await);
    }

    /// What has come of the callbacks of the load that were due in that time.
    pub(crate) fn entries_due(&mut self, during: Range<SystemTime>) -> Vec<Entry> {
        let entries = self.load.as_mut().map(Load::entries).unwrap_or_default();
        entries.iter().filter(|entry| during.contains(&due_at(entry))).cloned().collect()
    }

    /// Kills the database, and boots an empty one in its place. What was committed in the old one by
    /// then, to the last row that survived the kill, is gone with it and not lost by us.
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

    /// How many callbacks there are.
    pub(crate) fn rate(&self) -> Rate {
        self.setup.rate
    }

    /// The first id that the load has not come to; those after it will follow, one after the other.
    pub(crate) fn next_id(&mut self) -> i64 {
        let last = self.load.iter_mut().flat_map(Load::entries).flat_map(|entry| &entry.ids);
        last.max().map_or(1, |last| last + 1)
    }

    /// The fault is over. Posts probes until one of them has been accepted, and objects are looked up and
    /// committed again, and takes the time.
    pub(crate) async fn wait_for_recovery(&mut self) {
        self.measure_recovery(Some(SystemTime::now())).await;
    }

    /// The same, but what is committed must be a probe: after this fault, what was being looked up when it
    /// came may be committed although nothing else is.
    pub(crate) async fn wait_for_probe_recovery(&mut self) {
        self.measure_recovery(None).await;
    }

    async fn measure_recovery(&mut self, committed_after: Option<SystemTime>) {
        let (ended_at, over) = (SystemTime::now(), Instant::now());
        let endpoint = self.endpoint();
        let probing =
            self.prober.probe_until_committed(&endpoint, self.database.pool(), committed_after);
        let took = tokio::time::timeout(PATIENCE, probing).await;
        let took = took.ok().map(|()| over.elapsed());
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
        // A disk that is slow for a moment delays the broker's confirms, whatever the case does.
        let excused =
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
        let mut verdict = audit.close(excused).await;
        let twice = u32::try_from(verdict.figures.looked_up_twice).unwrap_or(u32::MAX);
        if !allowed.looked_up_twice && f64::from(twice) > spooled {
            verdict
                .breaches
                .push(format!("{twice} ids were looked up twice, {spooled} were spooled"));
        }
        let ended = self.services().filter(|service| !service.is_running()).count();
        if ended > 0 {
            verdict.breaches.push(format!("{ended} services ended by themselves"));
        }
        verdict
    }

    /// The URI of a node that is up.
    fn broker_uri(&self) -> String {
        let mut nodes = std::iter::once(&self.broker).chain(&self.other_nodes);
        let node = nodes.find(|node| node.is_up()).unwrap_or(&self.broker);
        node.amqp_uri()
    }

    /// All services, as the end of the case wants them to run.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Process> {
        self.producer.iter().chain(&self.consumers).chain(&self.routine).chain(&self.viewer)
    }
}

/// Declares all queues by the node at `uri`, which makes it their leader.
async fn declare_queues(uri: &str) {
    let publisher = Publisher::start(&broker_config(uri), "faults: first leader");
    let publisher = publisher.expect("a publisher opens no file");
    publisher.wait_until_open().await;
    publisher.close().await;
}
