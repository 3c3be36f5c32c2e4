//! Malicious clients against the producer as a process. Each is answered with an error or
//! disconnected, the memory hardly grows, and other clients' callbacks are still answered 200.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod bodies;
mod shapes;
mod slow;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use runtime::CancellationToken;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use testkit::{Process, Queue, System, Wire, amqp_uri, producer_address, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(30);

/// The id in a siege's first callback. The id is incremented after each accepted callback.
const FIRST_ID: i64 = 1_000_000;

/// A producer under attack, to which a regular client posts one callback after another.
struct Siege {
    address: SocketAddr,
    producer: Arc<Process>,
    queue: Queue,
    memory_before_kib: u64,
    stop: CancellationToken,
    callbacks: JoinHandle<Callbacks>,
}

/// The outcomes of the regular client's callbacks.
#[derive(Default)]
struct Callbacks {
    accepted: i64,
    /// Callbacks that neither broker nor disk of a busy machine stored in time. Their messages may
    /// still arrive.
    unavailable: i64,
    peak_memory_kib: u64,
}

impl Siege {
    async fn begin(settings: &[(&'static str, &str)]) -> Self {
        let queue = Queue::new();
        let system = System::of_producers(&amqp_uri(), &queue);
        let variables = [&[("PUBLISH_TIMEOUT", "400ms")], settings].concat();
        let producer = Arc::new(system.spawn("producer", &variables));
        producer.ready().await;
        let address = producer_address(&producer).await;
        // During the first callback, the producer allocates memory that it never frees. Post one
        // before the memory is measured.
        let mut wire = Wire::connect(address).await;
        assert_eq!(wire.post_callback(0).await.status, 200);
        let stop = CancellationToken::new();
        let memory_before_kib = producer.rss_kib();
        let callbacks = tokio::spawn(post_until(stop.clone(), address, Arc::clone(&producer)));
        Self { address, producer, queue, memory_before_kib, stop, callbacks }
    }

    /// Asserts that only accepted callbacks have arrived: those of the regular client, and `others`
    /// with id 1. Asserts that the memory has grown by at most `allowed_mib`.
    async fn assert_withstood(self, others: usize, allowed_mib: u64) {
        assert!(self.producer.is_running());
        // Post one more callback after all others. Its message is the second with id 0.
        let mut wire = Wire::connect(self.address).await;
        assert_eq!(wire.post_callback(0).await.status, 200);
        self.stop.cancel();
        let Callbacks { accepted, unavailable, peak_memory_kib } = self.callbacks.await.unwrap();
        assert!(
            accepted > unavailable,
            "{unavailable} callbacks answered 503, {accepted} accepted"
        );
        // Some messages arrive more than once, if a busy broker confirmed them so late that the
        // producer spooled them as well.
        let mut arrived = BTreeMap::new();
        wait_until("the callbacks, and nothing else, are queued", async || {
            for message in self.queue.take_all(&self.queue.name).await {
                let body: Value = serde_json::from_slice(&message.delivery.data).unwrap();
                *arrived.entry(body["id"].as_i64().unwrap()).or_insert(0_usize) += 1;
            }
            let times = |id| arrived.get(&id).copied().unwrap_or_default();
            let is_known = |id: &i64| [0, 1].contains(id) || *id >= FIRST_ID;
            assert!(arrived.keys().all(is_known), "{arrived:?}");
            let all_accepted = (FIRST_ID..FIRST_ID + accepted).all(|id| times(id) > 0);
            all_accepted && times(0) >= 2 && times(1) >= others
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
        // Post each callback on its own connection, because connecting must work as well.
        let mut wire = Wire::connect(address).await;
        let reply = wire.post_callback(FIRST_ID + callbacks.accepted).await;
        match reply.status {
            200 => callbacks.accepted += 1,
            503 => callbacks.unavailable += 1,
            _ => panic!("{reply:?}"),
        }
        callbacks.peak_memory_kib = callbacks.peak_memory_kib.max(producer.rss_kib());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    callbacks
}

/// Sends these bytes, and returns the response up to the end of the connection, which the server
/// must close.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
    // The server may close the connection before all bytes are sent.
    let sending = async { drop(writer.write_all(bytes).await) };
    let mut answer = Vec::new();
    let exchanged = async { tokio::join!(sending, reader.read_to_end(&mut answer)) };
    // A reset also counts as an end.
    let ended = timeout(DEADLINE, exchanged).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(ended.is_ok(), "not closed after {:.100}: {answer}", String::from_utf8_lossy(bytes));
    answer
}

/// The status of each response in `answer`.
fn statuses(answer: &str) -> Vec<u16> {
    let heads = answer.split("HTTP/1.1 ").skip(1);
    heads.map(|head| head[..3].parse().unwrap()).collect()
}

/// Allows this process, and the processes that it starts, to have `count` files open.
fn allow_files(count: u64) {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).unwrap();
    }
}
