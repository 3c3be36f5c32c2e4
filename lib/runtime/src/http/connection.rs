//! One connection: its state and its time limits.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::Limits;
use super::idle::{EntryId, IdleConnections};
use super::linger::linger;

/// The slowest rate at which a client may read responses, in bytes per second, averaged over
/// [`Limits::header_timeout`].
const MIN_READ_RATE: f64 = 1024.0;
/// How long the server continues to process a request after its client has closed its sending side.
/// Such a client may still be waiting for the response or may be gone; the server cannot
/// distinguish the two.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(5);
/// The timer of a connection that has no deadline fires after this time.
const NO_DEADLINE: Duration = Duration::from_hours(1);

/// The state of one connection, which the stream below hyper and the service above hyper both
/// update.
pub(super) struct Connection {
    socket: TcpStream,
    limits: Limits,
    state: Mutex<State>,
    idle: Arc<IdleConnections>,
    /// Notified when a new connection needs the slot of this one.
    evicted: Arc<Notify>,
}

struct State {
    phase: Phase,
    /// The entry in [`IdleConnections`] while the connection waits for a request.
    idle_entry: Option<EntryId>,
    /// The time from which the client has accepted no bytes; `None` while it accepts them.
    blocked_since: Option<Instant>,
    /// How much longer the client may go without accepting bytes. Each accepted byte adds time, up
    /// to [`Limits::header_timeout`]. So a client may read slowly but steadily for any time, but
    /// cannot keep the connection open by reading a byte now and then.
    blocked_budget: Duration,
}

#[derive(Clone, Copy)]
enum Phase {
    /// No byte of the next request has arrived.
    Waiting { since: Instant },
    /// Part of a request's head has arrived.
    Head { since: Instant },
    /// From a request's head to the end of its response.
    Exchange { half_closed_since: Option<Instant> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloseReason {
    Idle,
    SlowHead,
    SlowReader,
    ClientGone,
    Evicted,
}

impl Connection {
    pub(super) fn new(socket: TcpStream, limits: Limits, idle: Arc<IdleConnections>) -> Arc<Self> {
        let (now, evicted) = (Instant::now(), Arc::new(Notify::new()));
        let state = State {
            phase: Phase::Waiting { since: now },
            idle_entry: Some(idle.add(now, &evicted)),
            blocked_since: None,
            blocked_budget: limits.header_timeout,
        };
        Arc::new(Self { socket, limits, state: Mutex::new(state), idle, evicted })
    }

    /// Begins an exchange. Must be called when the head of a request is complete. The exchange
    /// lasts until the returned guard is dropped.
    pub(super) fn begin_exchange(self: Arc<Self>) -> Exchange {
        {
            let mut state = self.state.lock();
            state.phase = Phase::Exchange { half_closed_since: None };
            self.stop_waiting(&mut state);
        }
        Exchange(self)
    }

    fn stop_waiting(&self, state: &mut State) {
        if let Some(entry) = state.idle_entry.take() {
            self.idle.remove(entry);
        }
    }

    fn record_read(&self, count: usize) {
        let mut state = self.state.lock();
        if count > 0 && matches!(state.phase, Phase::Waiting { .. }) {
            state.phase = Phase::Head { since: Instant::now() };
        }
    }

    /// Records that the client accepts no bytes at the moment.
    fn record_blocked(&self) {
        self.state.lock().blocked_since.get_or_insert_with(Instant::now);
    }

    fn record_write(&self, count: usize) {
        let mut state = self.state.lock();
        let blocked = state.blocked_since.take().map(|since| since.elapsed()).unwrap_or_default();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let earned = Duration::from_secs_f64(f64::from(count) / MIN_READ_RATE);
        let budget = state.blocked_budget.saturating_sub(blocked).saturating_add(earned);
        state.blocked_budget = budget.min(self.limits.header_timeout);
        // The idle time starts only after the response has been sent.
        if let Phase::Waiting { since } = &mut state.phase
            && !blocked.is_zero()
        {
            *since = Instant::now();
        }
    }

    /// When to close the connection in its current state, and why.
    fn deadline(&self) -> Option<(Instant, CloseReason)> {
        let Limits { header_timeout, idle_timeout, .. } = self.limits;
        let state = self.state.lock();
        let of_phase = match state.phase {
            Phase::Waiting { since } => {
                Some((since + idle_timeout.unwrap_or(header_timeout), CloseReason::Idle))
            }
            Phase::Head { since } => Some((since + header_timeout, CloseReason::SlowHead)),
            Phase::Exchange { half_closed_since } => half_closed_since
                .map(|since| (since + HALF_CLOSED_TIMEOUT, CloseReason::ClientGone)),
        };
        let of_reader = state
            .blocked_since
            .map(|since| (since + state.blocked_budget, CloseReason::SlowReader));
        of_phase.into_iter().chain(of_reader).min_by_key(|(at, _)| *at)
    }

    /// Checks whether the client is gone. hyper does not always read during an exchange, so hyper
    /// alone could miss that.
    fn poll_is_gone(&self, context: &mut Context<'_>) -> bool {
        let is_open =
            |state: &State| matches!(state.phase, Phase::Exchange { half_closed_since: None });
        if !is_open(&self.state.lock()) {
            return false;
        }
        let mut byte = [MaybeUninit::uninit()];
        match self.socket.poll_peek(context, &mut ReadBuf::uninit(&mut byte)) {
            Poll::Ready(Ok(0)) => {
                let half_closed_since = Some(Instant::now());
                self.state.lock().phase = Phase::Exchange { half_closed_since };
                false
            }
            Poll::Ready(Err(_)) => true,
            Poll::Ready(Ok(_)) | Poll::Pending => false,
        }
    }
}

/// A guard that exists while a request is processed and its response is sent.
pub(super) struct Exchange(Arc<Connection>);

impl Drop for Exchange {
    fn drop(&mut self) {
        let (mut state, now) = (self.0.state.lock(), Instant::now());
        state.phase = Phase::Waiting { since: now };
        state.idle_entry = Some(self.0.idle.add(now, &self.0.evicted));
    }
}

/// Runs `serving`, in which hyper serves the [`TrackedStream`], until it ends or a limit is
/// reached. Then closes the connection.
pub(super) async fn drive<E: std::fmt::Display>(
    connection: &Connection,
    serving: impl Future<Output = Result<(), E>>,
) {
    let reason = {
        let serving = pin!(serving);
        serve_until_limit(connection, serving).await
    };
    connection.stop_waiting(&mut connection.state.lock());
    match reason {
        None => linger(&connection.socket).await,
        // Discards the unsent bytes in the kernel, because the client does not read them.
        Some(CloseReason::SlowReader) => {
            let _ = SockRef::from(&connection.socket).set_linger(Some(Duration::ZERO));
        }
        Some(_) => {}
    }
}

/// Returns the reason if a limit was reached, or `None` if hyper ended the connection.
async fn serve_until_limit<E: std::fmt::Display>(
    connection: &Connection,
    mut serving: Pin<&mut impl Future<Output = Result<(), E>>>,
) -> Option<CloseReason> {
    let mut fires_at = Instant::now() + NO_DEADLINE;
    let mut timer = pin!(sleep_until(fires_at));
    let mut evicted = pin!(connection.evicted.notified());
    poll_fn(|context| {
        // hyper is polled first, because its reads and writes change the deadline.
        if let Poll::Ready(result) = serving.as_mut().poll(context) {
            if let Err(error) = result {
                tracing::debug!(%error, "connection ended early");
            }
            return Poll::Ready(None);
        }
        if connection.poll_is_gone(context) {
            return Poll::Ready(Some(CloseReason::ClientGone));
        }
        while evicted.as_mut().poll(context).is_ready() {
            // A request may have arrived since the eviction.
            if !matches!(connection.state.lock().phase, Phase::Exchange { .. }) {
                return Poll::Ready(Some(CloseReason::Evicted));
            }
            evicted.set(connection.evicted.notified());
        }
        loop {
            let deadline = connection.deadline();
            let at = deadline.map_or_else(|| Instant::now() + NO_DEADLINE, |(at, _)| at);
            // When the deadline becomes later, the timer stays as it is: it fires too early and is
            // then set again, which is cheaper than setting it with each request.
            if at < fires_at {
                fires_at = at;
                timer.as_mut().reset(fires_at);
            }
            ready!(timer.as_mut().poll(context));
            if let Some((at, reason)) = deadline
                && at <= Instant::now()
            {
                tracing::debug!(?reason, "connection closed");
                return Poll::Ready(Some(reason));
            }
            fires_at = at;
            timer.as_mut().reset(fires_at);
        }
    })
    .await
}

/// The stream below hyper. It records reads and writes in the [`Connection`].
pub(super) struct TrackedStream(pub(super) Arc<Connection>);

impl TrackedStream {
    fn poll_write_with(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.0.socket.poll_write_ready(context)?.is_pending() {
                self.0.record_blocked();
                return Poll::Pending;
            }
            match write(&self.0.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    self.0.record_write(*written.as_ref().unwrap_or(&0));
                    return Poll::Ready(written);
                }
            }
        }
    }
}

impl AsyncRead for TrackedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.socket.poll_read_ready(context))?;
            match self.0.socket.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    let count = read?;
                    self.0.record_read(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for TrackedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(context, |socket| socket.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(context, |socket| socket.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Does nothing: [`linger`] closes the sending side.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;

    async fn connection(limits: Limits) -> Arc<Connection> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        client.unwrap();
        Connection::new(accepted.unwrap().0, limits, Arc::default())
    }

    // Field case 2.1
    #[tokio::test]
    async fn single_bytes_do_not_restore_the_budget_of_a_slow_reader() {
        let header_timeout = Duration::from_secs(10);
        let limits = Limits { header_timeout, ..Limits::default() };
        let connection = connection(limits).await;
        let left = || {
            let (at, reason) = connection.deadline().unwrap();
            assert_eq!(reason, CloseReason::SlowReader);
            at.saturating_duration_since(Instant::now())
        };
        for _ in 0..3 {
            connection.record_blocked();
            sleep(Duration::from_millis(100)).await;
            connection.record_write(1);
        }
        connection.record_blocked();
        assert!(left() + Duration::from_millis(280) < header_timeout, "{:?}", left());
        // Enough bytes to restore the whole budget.
        connection.record_write(1 << 20);
        connection.record_blocked();
        assert!(left() + Duration::from_millis(250) > header_timeout, "{:?}", left());
    }
}
