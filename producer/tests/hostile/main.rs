//! Clients that mean ill, against the producer as a process: each is answered 4xx or cut off, the
//! memory stays flat, and the callbacks of everybody else are answered 200 all the while.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod bodies;
mod shapes;
mod slow;
#[expect(dead_code, reason = "the other binary uses all of it")]
#[path = "../producer/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use service::CancellationToken;
use testbed::{Process, Queue, amqp_uri, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use wire::{DEADLINE, Wire};

/// The id of a siege's first callback; each accepted one is followed by the next id.
const FIRST_ID: i64 = 1_000_000;

/// A producer to which somebody posts one callback after another, whatever else is done to it.
struct Siege {
    address: SocketAddr,
    producer: Arc<Process>,
    queue: Queue,
    memory_before_kib: u64,
    stop: CancellationToken,
    callbacks: JoinHandle<Callbacks>,
}

/// What became of those callbacks.
#[derive(Default)]
struct Callbacks {
    accepted: i64,
    /// Those for which a busy machine had neither a broker nor a disk in time; their messages may still come through.
    refused: i64,
    peak_memory_kib: u64,
}

impl Siege {
    async fn begin(settings: &[(&'static str, &str)]) -> Self {
        let queue = Queue::new();
        let mut environment = vec![
            ("AMQP_URI", amqp_uri()),
            ("QUEUE_NAME", queue.name.clone()),
            ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
            ("PUBLISH_TIMEOUT", "400ms".to_owned()),
        ];
        environment.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let producer = Arc::new(Process::spawn("producer", &environment, &[]));
        producer.ready().await;
        let line = producer.wait_for_log("accepting callbacks").await;
        let address = line.split("address=").nth(1).unwrap().trim().parse().unwrap();
        // The first one warms up what is made once.
        let mut wire = Wire::connect(address).await;
        wire.send_callback(0).await;
        assert_eq!(wire.reply().await.status, 200);
        let stop = CancellationToken::new();
        let memory_before_kib = producer.rss_kib();
        let callbacks = tokio::spawn(post_until(stop.clone(), address, Arc::clone(&producer)));
        Self { address, producer, queue, memory_before_kib, stop, callbacks }
    }

    /// That what was accepted has arrived, and nothing else: the callbacks, and id 1 from `others`; and that the memory
    /// has not grown by more than that.
    async fn withstood(self, others: usize, allowed_mib: u64) {
        assert!(self.producer.is_running());
        // One more, behind everything else.
        let mut wire = Wire::connect(self.address).await;
        wire.send_callback(0).await;
        assert_eq!(wire.reply().await.status, 200);
        self.stop.cancel();
        let Callbacks { accepted, refused, peak_memory_kib } = self.callbacks.await.unwrap();
        assert!(accepted > refused, "{refused} callbacks refused, {accepted} accepted");
        // Some more than once, if a busy machine's broker confirmed them so late that they were spooled as well.
        let mut arrived = BTreeMap::new();
        eventually("the callbacks, and nothing else, are queued", DEADLINE, async || {
            while let Some(message) = self.queue.get(&self.queue.name).await {
                let body: Value = serde_json::from_slice(&message.delivery.data).unwrap();
                *arrived.entry(body["id"].as_i64().unwrap()).or_insert(0_usize) += 1;
            }
            let times = |id| arrived.get(&id).copied().unwrap_or_default();
            let is_known = |id: &i64| [0, 1].contains(id) || *id >= FIRST_ID;
            assert!(arrived.keys().all(is_known), "{arrived:?}");
            let all_accepted = (FIRST_ID..FIRST_ID + accepted).all(|id| times(id) > 0);
            (all_accepted && times(0) >= 2 && times(1) >= others).then_some(())
        })
        .await;
        let growth_kib = peak_memory_kib.saturating_sub(self.memory_before_kib);
        println!("{accepted} callbacks accepted meanwhile; memory grew by {growth_kib} KiB");
        assert!(growth_kib <= allowed_mib << 10, "the memory grew by {growth_kib} KiB");
    }
}

async fn post_until(
    stop: CancellationToken,
    address: SocketAddr,
    producer: Arc<Process>,
) -> Callbacks {
    let mut callbacks = Callbacks::default();
    while !stop.is_cancelled() {
        // Each on a connection of its own: they have to get through to it, too.
        let mut wire = Wire::connect(address).await;
        wire.send_callback(FIRST_ID + callbacks.accepted).await;
        let reply = wire.reply().await;
        match reply.status {
            200 => callbacks.accepted += 1,
            503 => callbacks.refused += 1,
            _ => panic!("{reply:?}"),
        }
        callbacks.peak_memory_kib = callbacks.peak_memory_kib.max(producer.rss_kib());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    callbacks
}

/// Sends these bytes and gives all that came back until the server closed the connection, which it
/// has to do.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
    // The server may have heard enough before all is sent.
    let sending = async { drop(writer.write_all(bytes).await) };
    let mut answer = Vec::new();
    let exchanged = async { tokio::join!(sending, reader.read_to_end(&mut answer)) };
    // A reset is an end as well.
    let ended = timeout(DEADLINE, exchanged).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(ended.is_ok(), "not closed after {:.100}: {answer}", String::from_utf8_lossy(bytes));
    answer
}

/// The status of each answer in what came back.
fn statuses(answer: &str) -> Vec<u16> {
    let heads = answer.split("HTTP/1.1 ").skip(1);
    heads.map(|head| head[..3].parse().unwrap()).collect()
}

/// Lets this process, and what it starts from now on, have that many files open.
fn allow_files(count: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).unwrap();
    }
}
