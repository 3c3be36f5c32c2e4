//! A whole system for one case: servers, services and partner.

use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use messaging::queue::{DeadLetter, DeadLetterAction, Publisher};
use runtime::Supervisor;
use tester::ledger::Entry;
use testkit::{
    Answer, HaProxy, PATIENCE, PostgresCluster, Process, Proxy, RabbitNode, Scratch, StatusApi,
    System, WITH_READ_ONLY_ROOT, all_ready, free_port, postgres_environment, wait_for, wait_until,
};

use crate::audit::{Audit, Recovery, broker_config, due_at, process_dead_letters};
use crate::figures::{Allowed, Verdict};
use crate::load::{Load, is_2xx};
use crate::probe::Prober;
use crate::rows;
use crate::setup::{Brokers, DatabaseSetup, Setup};

/// `QUEUE_NAME`.
pub(crate) const QUEUE: &str = "objects";
/// The metric that counts the messages in the producer's spool.
pub(crate) const SPOOLED: &str = "lastseen_spool_messages";
/// The metric that counts the messages that the producer has spooled since its start.
const SPOOLED_TOTAL: &str = "lastseen_spooled_total";
/// Seconds of load before the fault.
const LOAD_BEFORE_FAULT_SECONDS: usize = 4;
/// Time for which the load continues after the last recovery.
const LOAD_AFTER_RECOVERY: Duration = Duration::from_secs(3);
/// Time after the restart of a killed producer in which callbacks may still be cut off.
const CUT_OFF_MARGIN: Duration = Duration::from_millis(100);

/// Servers, services and load of one case, which all end with it.
///
/// The processes in `producers`, `consumers` and `routine` must still run at the end of the case. A
/// case that ends one of them must replace or remove it.
pub(crate) struct World {
    pub(crate) broker: RabbitNode,
    /// Empty with [`Brokers::Single`].
    pub(crate) other_nodes: Vec<RabbitNode>,
    pub(crate) database: PostgresCluster,
    /// Present only with [`DatabaseSetup::WithStandby`].
    pub(crate) standby: Option<PostgresCluster>,
    pub(crate) status_api: StatusApi,
    /// Used only with [`Setup::has_proxies`].
    pub(crate) to_broker: Proxy,
    /// Used only with [`Setup::has_proxies`].
    pub(crate) to_database: Proxy,
    pub(crate) producers: Vec<Process>,
    pub(crate) consumers: Vec<Process>,
    pub(crate) routine: Option<Process>,
    /// `None` in cases that do not start one.
    pub(crate) viewer: Option<Process>,
    pub(crate) setup: Setup,
    /// The messages that producers had spooled which [`World::update_producer`] has replaced.
    spooled_before_update: f64,
    system: System,
    /// The address of each producer.
    producer_addresses: Vec<SocketAddr>,
    /// The load balancer in front of several producers, and its address.
    balancer: Option<(HaProxy, SocketAddr)>,
    load: Option<Load>,
    pub(crate) prober: Prober,
    pub(crate) recoveries: Vec<Recovery>,
    /// Start and end of each period in which no producer ran, because the case had killed it.
    pub(crate) producer_downtimes: Vec<(SystemTime, Option<SystemTime>)>,
    /// Times before and after each deletion of the queue. Callbacks in flight meanwhile do not
    /// count as accepted.
    pub(crate) queue_deletions: Vec<(SystemTime, SystemTime)>,
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

    /// Like [`World::start`], under load.
    pub(crate) async fn under_load(setup: Setup) -> Self {
        let mut world = Self::start(setup).await;
        world.start_load().await;
        world
    }

    /// Starts only the servers: broker, database and status API.
    pub(crate) async fn start_servers(setup: Setup) -> Self {
        let database = async {
            if setup.database == DatabaseSetup::OnSmallDisk {
                return PostgresCluster::start_on_a_small_disk().await;
            }
            PostgresCluster::start().await
        };
        let nodes = async {
            if matches!(setup.brokers, Brokers::Single) {
                return (RabbitNode::start().await, Vec::new());
            }
            let [broker, second, third] = RabbitNode::start_cluster().await;
            declare_queues(&broker.amqp_uri()).await;
            (broker, vec![second, third])
        };
        let ((broker, other_nodes), database) = tokio::join!(nodes, database);
        rows::prepare(database.pool()).await;
        let standby = if setup.database == DatabaseSetup::WithStandby {
            Some(database.start_standby().await)
        } else {
            None
        };
        let status_api = StatusApi::start(|id, _| correct_answer(id));
        let to_broker = Proxy::start(format!("127.0.0.1:{}", broker.amqp_port())).await;
        let to_database = Proxy::start(format!("127.0.0.1:{}", database.port())).await;
        let (amqp_uri, database_url) = if setup.has_proxies {
            let (broker, database) = (to_broker.addr(), to_database.addr());
            (
                format!("amqp://guest:guest@{broker}/%2f"),
                format!("postgres://postgres@{database}/postgres"),
            )
        } else {
            (setup.brokers.amqp_uri(&broker, &other_nodes), database.url().to_owned())
        };
        let mut postgres = postgres_environment(&database_url);
        if let Some(standby) = &standby {
            postgres = with_second_server(postgres, standby);
        }
        let system = System::at(&amqp_uri, QUEUE, postgres, &status_api.endpoint());
        let producer_addresses: Vec<SocketAddr> =
            (0..=setup.more_producers).map(|_| free_address()).collect();
        let balancer = if setup.more_producers > 0 {
            let address = free_address();
            Some((HaProxy::start(address, &producer_addresses).await, address))
        } else {
            None
        };
        Self {
            broker,
            other_nodes,
            database,
            standby,
            status_api,
            to_broker,
            to_database,
            producers: Vec::new(),
            consumers: Vec::new(),
            routine: None,
            viewer: None,
            setup,
            spooled_before_update: 0.0,
            system,
            producer_addresses,
            balancer,
            load: None,
            prober: Prober::default(),
            recoveries: Vec::new(),
            producer_downtimes: Vec::new(),
            queue_deletions: Vec::new(),
            scratch: Scratch::new("faults"),
        }
    }

    /// Starts the producers, the consumers and a routine.
    pub(crate) fn start_services(&mut self) {
        self.producers = (0..=self.setup.more_producers).map(|n| self.spawn_producer(n)).collect();
        self.consumers = (0..=self.setup.more_consumers).map(|_| self.spawn_consumer()).collect();
        self.routine = Some(self.spawn_routine());
    }

    pub(crate) async fn wait_until_ready(&self) {
        all_ready(self.services()).await;
        if let Some((balancer, _)) = &self.balancer {
            balancer.wait_for_healthy(self.producers.len()).await;
        }
    }

    /// Starts the producer with this index, with the address and the spool of the previous one.
    fn spawn_producer(&self, index: usize) -> Process {
        let address = self.producer_addresses[index].to_string();
        let spool = self.spool_of(index).display().to_string();
        let mut variables =
            vec![("PRODUCER_ADDR", address.as_str()), ("SPOOL_DIR", spool.as_str())];
        variables.extend(&self.setup.producer);
        self.spawn("producer", &variables)
    }

    /// The first producer's `SPOOL_DIR`.
    pub(crate) fn spool(&self) -> PathBuf {
        self.spool_of(0)
    }

    fn spool_of(&self, producer: usize) -> PathBuf {
        self.scratch.path().join(format!("spool{producer}"))
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
        let wrapper: &[&str] = match service {
            _ if self.setup.read_only_root => &WITH_READ_ONLY_ROOT,
            "producer" => self.setup.producer_wrapper,
            _ => &[],
        };
        if !wrapper.is_empty() {
            // The wrapper may mount a disk at the spool's directory.
            fs::create_dir_all(self.spool()).expect("a scratch directory should be writable");
        }
        self.system.spawn_wrapped(wrapper, service, variables)
    }

    pub(crate) fn spawn_viewer(&self) -> Process {
        self.system.spawn("viewer", &[])
    }

    /// The first producer.
    pub(crate) fn producer(&self) -> &Process {
        self.producers.first().expect("there should be a producer")
    }

    pub(crate) fn routine(&self) -> &Process {
        self.routine.as_ref().expect("there should be a routine")
    }

    /// Waits until at least `minimum` messages are in the producer's spool.
    pub(crate) async fn wait_for_spooled(&self, minimum: f64) {
        self.producer().wait_for_metric(SPOOLED, minimum).await;
    }

    /// Waits until the producer has relayed all messages that it has spooled since its start.
    /// Compares counters, because the gauge of spooled messages is up to a second old.
    pub(crate) async fn wait_until_all_relayed(&self) {
        wait_until("all spooled messages are relayed", async || {
            let relayed = self.producer().metric("lastseen_relayed_total").await;
            let spooled = self.producer().metric(SPOOLED_TOTAL).await;
            relayed >= spooled
        })
        .await;
    }

    /// The URL to which the load is posted.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}/callback", self.callback_address())
    }

    /// The address of the only producer, or of the load balancer.
    pub(crate) fn callback_address(&self) -> SocketAddr {
        self.balancer.as_ref().map_or(self.producer_addresses[0], |(_, address)| *address)
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
        wait_until("the load has started", async || load.accepted() >= enough).await;
    }

    pub(crate) async fn run_for(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Kills the only producer. Until [`World::restart_producer`], a callback whose connection is
    /// refused or breaks does not count as unanswered.
    pub(crate) fn kill_producer(&mut self) {
        let producer = self.producers.remove(0);
        self.producer_downtimes.push((SystemTime::now(), None));
        producer.kill();
    }

    /// Starts another producer on the same spool, and waits until it accepts callbacks.
    pub(crate) async fn restart_producer(&mut self) {
        self.producers.push(self.spawn_producer(0));
        self.producer().wait_for_log("accepting callbacks").await;
        if let Some((_, until @ None)) = self.producer_downtimes.last_mut() {
            *until = Some(SystemTime::now() + CUT_OFF_MARGIN);
        }
    }

    /// Drains one of several producers, and starts another one with its address and spool and the
    /// present variables of [`World::setup`].
    pub(crate) async fn update_producer(&mut self, index: usize) {
        let (balancer, _) = self.balancer.as_ref().expect("there should be several producers");
        self.producers[index].terminate();
        balancer.wait_for_healthy(self.producers.len() - 1).await;
        // The draining producer gets no further callbacks.
        self.spooled_before_update += self.producers[index].metric(SPOOLED_TOTAL).await;
        let ended = self.producers[index].wait().await;
        assert!(ended.success(), "the producer should drain: {ended}");
        self.producers[index] = self.spawn_producer(index);
        balancer.wait_for_healthy(self.producers.len()).await;
    }

    /// Like [`World::update_producer`], for a consumer.
    pub(crate) async fn update_consumer(&mut self, index: usize) {
        self.consumers[index].stop().await;
        self.consumers[index] = self.spawn_consumer();
        self.consumers[index].ready().await;
    }

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

    /// Waits until the status API has answered about all ids of the callbacks that were due in
    /// `during` and were accepted, and returns the longest time that an id of them took since then.
    pub(crate) async fn slowest_lookup(&mut self, during: Range<SystemTime>) -> Duration {
        let entries = self.entries_due(during);
        let accepted = entries.iter().filter(|entry| is_2xx(entry));
        let ids: Vec<(i64, SystemTime)> =
            accepted.flat_map(|entry| entry.ids.iter().map(|id| (*id, due_at(entry)))).collect();
        let times = wait_for("the status API has answered about all ids", async || {
            let decisions = self.status_api.decisions();
            let took = |(id, due): &(i64, SystemTime)| {
                let answered_at = decisions.get(id)?.answered_at?;
                Some(answered_at.duration_since(*due).unwrap_or_default())
            };
            ids.iter().map(took).collect::<Option<Vec<Duration>>>()
        });
        times.await.into_iter().max().expect("there should be callbacks in this time")
    }

    /// Kills the database, and boots an empty one in its place. The rows that were committed in the
    /// former database are recorded as gone, because the services have not lost them.
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

    /// Replaces the answers of the status API, which still take the usual time.
    pub(crate) fn set_answers(&self, answer: impl Fn(i64) -> Answer + Send + Sync + 'static) {
        self.status_api.set_behaviour(move |id, _| answer(id).after(latency(id)));
    }

    pub(crate) fn reset_answers(&self) {
        self.status_api.set_behaviour(|id, _| correct_answer(id));
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

    /// Like [`World::wait_for_recovery`], but the committed object must be that of a probe. Use
    /// this if lookups that began before the end of the fault can still be committed after it.
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

    pub(crate) async fn recover_and_finish(mut self, allowed: Allowed) -> Verdict {
        self.wait_for_recovery().await;
        self.finish(allowed).await
    }

    /// Ends the load a little later, waits until all accepted ids are settled, and runs the audit.
    pub(crate) async fn finish(mut self, allowed: Allowed) -> Verdict {
        self.run_for(LOAD_AFTER_RECOVERY).await;
        let entries = match self.load.take() {
            Some(load) => load.stop().await,
            None => Vec::new(),
        };
        let mut spooled = self.spooled_before_update;
        for producer in &self.producers {
            spooled += producer.metric(SPOOLED_TOTAL).await;
        }
        // Even without a fault, a slow disk can delay publisher confirms, so that the producer also
        // spools these messages.
        let allowed_in_audit =
            Allowed { looked_up_twice: allowed.looked_up_twice || spooled > 0.0, ..allowed };
        let mut verdict = Audit { entries, world: &self }.run(allowed_in_audit).await;
        let twice = u32::try_from(verdict.figures.looked_up_twice).unwrap_or(u32::MAX);
        let breach = format!("{twice} ids were looked up twice, {spooled} were spooled");
        verdict.require(allowed.looked_up_twice || f64::from(twice) <= spooled, breach);
        let ended = self.services().filter(|service| !service.is_running()).count();
        verdict.require(ended == 0, format!("{ended} services ended on their own"));
        verdict
    }

    /// The URI of a node that is up.
    pub(crate) fn broker_uri(&self) -> String {
        self.nodes().find(|node| node.is_up()).unwrap_or(&self.broker).amqp_uri()
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &RabbitNode> {
        std::iter::once(&self.broker).chain(&self.other_nodes)
    }

    pub(crate) fn nodes_mut(&mut self) -> impl Iterator<Item = &mut RabbitNode> {
        std::iter::once(&mut self.broker).chain(&mut self.other_nodes)
    }

    /// All services that must run at the end of the case.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Process> {
        self.producers.iter().chain(&self.consumers).chain(&self.routine).chain(&self.viewer)
    }
}

fn correct_answer(id: i64) -> Answer {
    Answer::even_is_online(id).after(latency(id))
}

/// The latency of the status API: a tenth of the real one's, so that a case can catch up soon.
fn latency(id: i64) -> Duration {
    Duration::from_millis(20 + id.unsigned_abs() % 30)
}

/// Adds the hosts and ports of another server to the variables of the first one.
fn with_second_server(
    mut first: Vec<(&'static str, String)>,
    second: &PostgresCluster,
) -> Vec<(&'static str, String)> {
    let second = second.environment();
    for (name, value) in &mut first {
        let other = second.iter().find(|(other, _)| other == name);
        if let (&mut ("POSTGRES_HOST" | "POSTGRES_PORT"), Some((_, other))) = (name, other) {
            value.push(',');
            value.push_str(other);
        }
    }
    first
}

fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

/// Declares all queues on the node at `uri`, which makes it their leader.
async fn declare_queues(uri: &str) {
    let broker = broker_config(uri).open(&Supervisor::default());
    let broker = broker.expect("RabbitMQ is no file that could fail to open");
    let publisher = Publisher::start(broker, "faults: first leader");
    publisher.wait_until_open().await;
    publisher.close().await;
}
