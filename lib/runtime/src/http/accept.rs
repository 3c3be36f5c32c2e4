//! Accepts connections and assigns each a slot.

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

use super::idle::IdleConnections;
use super::linger::linger;

/// How long to wait after a failed `accept`; an immediate retry would loop without a pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection must have waited for a request before a new connection may replace it.
/// This protects clients that have just connected and are about to send their request.
const EVICT_AFTER: Duration = Duration::from_millis(200);
/// How long a new connection waits for a slot when it cannot replace another one.
const SLOT_TIMEOUT: Duration = Duration::from_millis(100);
/// Maximum number of refused clients that read their 503 at the same time. Further refused clients
/// are disconnected without a response.
const REFUSALS_MAX: usize = 32;
/// How long a refused client may take to read its 503.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// The shortest time between two warnings about the same limit.
const WARN_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of response bytes that wait in the kernel. Without this limit, a client that does
/// not read could fill megabytes of kernel memory, and the server could measure the reading rate of
/// a client only in steps of megabytes.
const UNSENT_BYTES: u32 = 32 << 10;

static REFUSAL: LazyLock<String> = LazyLock::new(|| {
    let body = concat!(
        r#"{"type":"about:blank","title":"Service Unavailable","status":503,"#,
        r#""detail":"too many connections: send the request again"}"#
    );
    let length = body.len();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\n\
         content-type: application/problem+json\r\n\
         retry-after: 1\r\n\
         connection: close\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
});

pub(super) struct Acceptor {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    idle: Arc<IdleConnections>,
    refusals: Arc<Semaphore>,
    /// An open file that is closed when the process runs out of file descriptors, so that its
    /// descriptor can be used to answer one client.
    reserve: Option<File>,
    slot_warnings: WarningLimit,
    accept_warnings: WarningLimit,
}

/// Limits how often a warning is logged. Contains the time of the last one.
#[derive(Default)]
struct WarningLimit(Option<Instant>);

impl WarningLimit {
    fn permits(&mut self) -> bool {
        let is_due = self.0.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if is_due {
            self.0 = Some(Instant::now());
        }
        is_due
    }
}

impl Acceptor {
    pub(super) fn new(
        listener: TcpListener,
        slots: Arc<Semaphore>,
        idle: Arc<IdleConnections>,
    ) -> Self {
        Self {
            listener,
            slots,
            idle,
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            reserve: reserve(),
            slot_warnings: WarningLimit::default(),
            accept_warnings: WarningLimit::default(),
        }
    }

    /// Accepts the next connection and assigns it a slot. Returns `None` if that failed or the
    /// connection was refused. If this future is dropped, a connection without a slot is closed.
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

    /// Acquires a slot, if necessary by closing the connection that has waited longest for a
    /// request.
    async fn slot(&mut self) -> Option<OwnedSemaphorePermit> {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            return Some(slot);
        }
        if self.slot_warnings.permits() {
            tracing::warn!(
                "the connection limit is reached; closing the connections that have waited \
                longest for a request, or refusing new ones if none waits"
            );
        }
        if let Some(since) = self.idle.oldest() {
            let slot = Arc::clone(&self.slots).acquire_owned();
            tokio::select! {
                slot = slot => return slot.ok(),
                () = sleep_until(since + EVICT_AFTER) => self.idle.evict_oldest(EVICT_AFTER),
            }
        }
        timeout(SLOT_TIMEOUT, Arc::clone(&self.slots).acquire_owned()).await.ok()?.ok()
    }

    fn refuse(&self, socket: TcpStream) {
        let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() else { return };
        tokio::spawn(async move {
            let _ = timeout(REFUSAL_TIMEOUT, send_refusal(&socket)).await;
            drop(permit);
        });
    }

    /// Pauses after a failed `accept`. If no file descriptor is left, closes the reserved file and
    /// answers one client with 503.
    async fn recover(&mut self, error: &io::Error) {
        if self.accept_warnings.permits() {
            tracing::warn!(%error, "cannot accept a connection");
        }
        let out_of_descriptors = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
        if error.raw_os_error().is_some_and(|code| out_of_descriptors.contains(&code))
            && self.reserve.take().is_some()
            && let Ok(Ok((socket, _))) = timeout(ACCEPT_PAUSE, self.listener.accept()).await
        {
            let _ = timeout(ACCEPT_PAUSE, send_refusal(&socket)).await;
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
    // Without this, small responses wait for the client's delayed ack.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    if let Err(error) = SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_BYTES) {
        tracing::debug!(%error, "cannot set TCP_NOTSENT_LOWAT");
    }
}

async fn send_refusal(socket: &TcpStream) {
    // The kernel's buffer is empty, so one write takes the complete response.
    if socket.writable().await.is_ok() && socket.try_write(REFUSAL.as_bytes()).is_ok() {
        linger(socket).await;
    }
}
