//! One connection: what it is doing, and for how long it may.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::Limits;
use super::idle::{Ticket, Waiting};
use super::linger::linger;

/// A client must read responses at least at this rate, in bytes per second, averaged over
/// [`Limits::header_timeout`].
const LEAST_RATE: f64 = 1024.0;
/// How long a request is still worked on after its client has closed its sending side. The client may
/// want the response, or may be gone: the two cannot be told apart.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(5);
/// When nothing limits a connection, its timer fires this much later.
const FAR: Duration = Duration::from_hours(1);

/// The state of one connection, shared by the parts that see what it does: the stream below hyper, and
/// the service above it.
pub(super) struct Connection {
    socket: TcpStream,
    limits: Limits,
    state: Mutex<State>,
    waiting: Arc<Waiting>,
    /// Notified when another connection needs the slot.
    evicted: Arc<Notify>,
}

struct State {
    phase: Phase,
    /// The entry among those that wait for a request, while it has one.
    ticket: Option<Ticket>,
    /// Since when the client accepts no more bytes.
    blocked_since: Option<Instant>,
    /// For how long the client may accept no more bytes. Each byte that it accepts adds to it, up to
    /// [`Limits::header_timeout`]: so a client that reads slowly but steadily can read for any time, and
    /// one that reads a byte now and then cannot.
    patience: Duration,
}

#[derive(Clone, Copy)]
enum Phase {
    /// No byte of the next request has arrived.
    Waiting { since: Instant },
    /// Some of a request's head has arrived.
    Head { since: Instant },
    /// From a request's head to the end of its response.
    Exchange { half_closed_since: Option<Instant> },
}

/// Why a connection is closed from our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Idle,
    SlowHead,
    SlowReader,
    ClientGone,
    Evicted,
}

impl Connection {
    pub(super) fn new(socket: TcpStream, limits: Limits, waiting: Arc<Waiting>) -> Arc<Self> {
        let (now, evicted) = (Instant::now(), Arc::new(Notify::new()));
        let state = State {
            phase: Phase::Waiting { since: now },
            ticket: Some(waiting.enter(now, &evicted)),
            blocked_since: None,
            patience: limits.header_timeout,
        };
        Arc::new(Self { socket, limits, state: Mutex::new(state), waiting, evicted })
    }

    /// A request's head is complete. The exchange lasts until what this gives is dropped.
    pub(super) fn begin_exchange(self: Arc<Self>) -> Exchange {
        {
            let mut state = self.lock();
            state.phase = Phase::Exchange { half_closed_since: None };
            self.stop_waiting(&mut state);
        }
        Exchange(self)
    }

    fn end_exchange(&self) {
        let (mut state, now) = (self.lock(), Instant::now());
        state.phase = Phase::Waiting { since: now };
        state.ticket = Some(self.waiting.enter(now, &self.evicted));
    }

    fn stop_waiting(&self, state: &mut State) {
        if let Some(ticket) = state.ticket.take() {
            self.waiting.leave(&ticket);
        }
    }

    fn has_read(&self, count: usize) {
        let mut state = self.lock();
        if count > 0 && matches!(state.phase, Phase::Waiting { .. }) {
            state.phase = Phase::Head { since: Instant::now() };
        }
    }

    /// The client accepts no more bytes for now.
    fn is_blocked(&self) {
        self.lock().blocked_since.get_or_insert_with(Instant::now);
    }

    fn has_written(&self, count: usize) {
        let mut state = self.lock();
        let blocked = state.blocked_since.take().map(|since| since.elapsed()).unwrap_or_default();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let earned = Duration::from_secs_f64(f64::from(count) / LEAST_RATE);
        let patience = state.patience.saturating_sub(blocked).saturating_add(earned);
        state.patience = patience.min(self.limits.header_timeout);
        // A response that is still being sent is no idle time.
        if let Phase::Waiting { since } = &mut state.phase
            && !blocked.is_zero()
        {
            *since = Instant::now();
        }
    }

    /// When the connection is to be closed, as things are now, and why.
    fn deadline(&self) -> Option<(Instant, Cut)> {
        let Limits { header_timeout, idle_timeout, .. } = self.limits;
        let state = self.lock();
        let of_phase = match state.phase {
            Phase::Waiting { since } => {
                Some((since + idle_timeout.unwrap_or(header_timeout), Cut::Idle))
            }
            Phase::Head { since } => Some((since + header_timeout, Cut::SlowHead)),
            Phase::Exchange { half_closed_since } => {
                half_closed_since.map(|since| (since + HALF_CLOSED_TIMEOUT, Cut::ClientGone))
            }
        };
        let of_reader = state.blocked_since.map(|since| (since + state.patience, Cut::SlowReader));
        of_phase.into_iter().chain(of_reader).min_by_key(|(at, _)| *at)
    }

    /// hyper, which may not read during an exchange, does not see that the client is gone.
    fn poll_is_gone(&self, context: &mut Context<'_>) -> bool {
        let is_open =
            |state: &State| matches!(state.phase, Phase::Exchange { half_closed_since: None });
        if !is_open(&self.lock()) {
            return false;
        }
        let mut byte = [MaybeUninit::uninit()];
        match self.socket.poll_peek(context, &mut ReadBuf::uninit(&mut byte)) {
            Poll::Ready(Ok(0)) => {
                let half_closed_since = Some(Instant::now());
                self.lock().phase = Phase::Exchange { half_closed_since };
                false
            }
            Poll::Ready(Err(_)) => true,
            Poll::Ready(Ok(_)) | Poll::Pending => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request and its response are under way.
pub(super) struct Exchange(Arc<Connection>);

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.end_exchange();
    }
}

/// Drives `serving`, which is hyper on the connection's [`Wire`], until it ends or a limit is reached.
pub(super) async fn drive<E: std::fmt::Display>(
    connection: &Connection,
    serving: impl Future<Output = Result<(), E>>,
) {
    let cut = {
        let serving = pin!(serving);
        unless_cut(connection, serving).await
    };
    connection.stop_waiting(&mut connection.lock());
    match cut {
        None => linger(&connection.socket).await,
        // What the kernel still holds for a client that does not read is of no use.
        Some(Cut::SlowReader) => {
            let _ = SockRef::from(&connection.socket).set_linger(Some(Duration::ZERO));
        }
        Some(_) => {}
    }
}

/// Gives the reason if a limit ended the connection.
async fn unless_cut<E: std::fmt::Display>(
    connection: &Connection,
    mut serving: Pin<&mut impl Future<Output = Result<(), E>>>,
) -> Option<Cut> {
    let mut armed = Instant::now() + FAR;
    let mut timer = pin!(sleep_until(armed));
    let mut evicted = pin!(connection.evicted.notified());
    poll_fn(|context| {
        // hyper first, because what it reads and writes moves the deadline.
        if let Poll::Ready(ended) = serving.as_mut().poll(context) {
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended early");
            }
            return Poll::Ready(None);
        }
        if connection.poll_is_gone(context) {
            return Poll::Ready(Some(Cut::ClientGone));
        }
        while evicted.as_mut().poll(context).is_ready() {
            // A request may have arrived just then.
            if !matches!(connection.lock().phase, Phase::Exchange { .. }) {
                return Poll::Ready(Some(Cut::Evicted));
            }
            evicted.set(connection.evicted.notified());
        }
        loop {
            let deadline = connection.deadline();
            let at = deadline.map_or_else(|| Instant::now() + FAR, |(at, _)| at);
            // A timer that is too early is left as it is, so that most requests set none.
            if at < armed {
                armed = at;
                timer.as_mut().reset(armed);
            }
            ready!(timer.as_mut().poll(context));
            if let Some((at, cut)) = deadline
                && at <= Instant::now()
            {
                tracing::debug!(reason = ?cut, "connection closed");
                return Poll::Ready(Some(cut));
            }
            armed = at;
            timer.as_mut().reset(armed);
        }
    })
    .await
}

/// The stream below hyper.
pub(super) struct Wire(Arc<Connection>);

impl Wire {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self(connection)
    }

    fn poll_write_with(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.0.socket.poll_write_ready(context)?.is_pending() {
                self.0.is_blocked();
                return Poll::Pending;
            }
            match write(&self.0.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    self.0.has_written(*written.as_ref().unwrap_or(&0));
                    return Poll::Ready(written);
                }
            }
        }
    }
}

impl AsyncRead for Wire {
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
                    self.0.has_read(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Wire {
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
    async fn a_byte_now_and_then_does_not_restore_a_readers_patience() {
        let header_timeout = Duration::from_secs(10);
        let limits = Limits { header_timeout, ..Limits::default() };
        let connection = connection(limits).await;
        let left = || {
            let (at, cut) = connection.deadline().unwrap();
            assert_eq!(cut, Cut::SlowReader);
            at.saturating_duration_since(Instant::now())
        };
        for _ in 0..3 {
            connection.is_blocked();
            sleep(Duration::from_millis(100)).await;
            connection.has_written(1);
        }
        connection.is_blocked();
        assert!(left() + Duration::from_millis(280) < header_timeout, "{:?}", left());
        // As much as all of it is worth.
        connection.has_written(1 << 20);
        connection.is_blocked();
        assert!(left() + Duration::from_millis(250) > header_timeout, "{:?}", left());
    }
}
