//! From the listener to a connection that has a slot.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::idle::Waiting;
use super::linger::linger;

/// How long to wait after a failed `accept`: trying again at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection must have waited for a request before it is closed for the sake of another. A
/// client that is about to use its connection does so earlier.
const EVICT_AFTER: Duration = Duration::from_millis(200);
/// How long a new connection waits for a slot when no other one can be closed for it.
const SLOT_TIMEOUT: Duration = Duration::from_millis(100);
/// How many refused clients may be reading their 503 at once. Further ones are closed without.
const REFUSALS: usize = 32;
/// How long a refused client may take to read it.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two warnings about the same limit.
const WARN_INTERVAL: Duration = Duration::from_secs(5);
/// How much of a response may wait in the kernel before the server waits for the client. Without it, each
/// client that does not read could make the kernel hold megabytes, and the rate at which a client reads
/// would be seen in steps of megabytes.
const UNSENT_BYTES: u32 = 32 << 10;

static REFUSAL: LazyLock<String> = LazyLock::new(|| {
    let body = r#"{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"too many connections: send it again"}"#;
    let length = body.len();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
});

/// Accepts connections, and finds a slot for each.
pub(super) struct Acceptor {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    waiting: Arc<Waiting>,
    refusals: Arc<Semaphore>,
    /// A descriptor to give up when no other one is left, so that a client can be answered even then.
    reserve: Option<File>,
    no_slot: Warned,
    no_accept: Warned,
}

/// When a warning was last logged.
#[derive(Default)]
struct Warned(Option<Instant>);

impl Warned {
    fn is_due(&mut self) -> bool {
        let is_due = self.0.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if is_due {
            self.0 = Some(Instant::now());
        }
        is_due
    }
}

impl Acceptor {
    pub(super) fn new(listener: TcpListener, slots: Arc<Semaphore>, waiting: Arc<Waiting>) -> Self {
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        let (no_slot, no_accept) = (Warned::default(), Warned::default());
        Self { listener, slots, waiting, refusals, reserve: reserve(), no_slot, no_accept }
    }

    /// The next connection, with its slot; `None` if one could not be accepted or was refused.
    /// Cancelled, it may have to drop a connection that has no slot yet.
    pub(super) async fn next(&mut self) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let (socket, peer) = match self.listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                self.recover(&error).await;
                return None;
            }
        };
        prepare(&socket);
        let Some(slot) = self.slot().await else {
            self.refuse(socket);
            return None;
        };
        Some((socket, peer, slot))
    }

    /// A slot, if need be by closing the connection that has waited longest for a request.
    async fn slot(&mut self) -> Option<OwnedSemaphorePermit> {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            return Some(slot);
        }
        if self.no_slot.is_due() {
            tracing::warn!(
                "all connections are taken: closing those that wait longest for a request, refusing new ones if none waits"
            );
        }
        if let Some(since) = self.waiting.oldest() {
            let slot = Arc::clone(&self.slots).acquire_owned();
            tokio::select! {
                slot = slot => return slot.ok(),
                () = sleep_until(since + EVICT_AFTER) => self.waiting.evict(EVICT_AFTER),
            }
        }
        timeout(SLOT_TIMEOUT, Arc::clone(&self.slots).acquire_owned()).await.ok()?.ok()
    }

    fn refuse(&self, socket: TcpStream) {
        let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() else { return };
        tokio::spawn(async move {
            let _ = timeout(REFUSAL_TIMEOUT, answer_refusal(&socket)).await;
            drop(permit);
        });
    }

    /// After a failed `accept`. Out of descriptors, it gives up the reserve for as long as it takes to
    /// answer one client.
    async fn recover(&mut self, error: &io::Error) {
        if self.no_accept.is_due() {
            tracing::warn!(%error, "cannot accept a connection");
        }
        let is_out = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
        if error.raw_os_error().is_some_and(|code| is_out.contains(&code))
            && self.reserve.take().is_some()
            && let Ok(Ok((socket, _))) = timeout(ACCEPT_PAUSE, self.listener.accept()).await
        {
            let _ = timeout(ACCEPT_PAUSE, answer_refusal(&socket)).await;
        } else {
            sleep(ACCEPT_PAUSE).await;
        }
        self.reserve = self.reserve.take().or_else(reserve);
    }
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

fn prepare(socket: &TcpStream) {
    // Without it, small responses wait for the client's delayed ack.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    if let Err(error) = SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_BYTES) {
        tracing::debug!(%error, "cannot set TCP_NOTSENT_LOWAT");
    }
}

async fn answer_refusal(socket: &TcpStream) {
    // Nothing was sent before, so that all of it fits into the kernel's buffer.
    if socket.writable().await.is_ok() && socket.try_write(REFUSAL.as_bytes()).is_ok() {
        linger(socket).await;
    }
}
