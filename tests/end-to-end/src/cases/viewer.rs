//! Slow clients of the viewer.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testkit::{http_get, viewer_address};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::load::Rate;
use crate::rows;
use crate::setup::Setup;
use crate::world::World;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new("slow_event_readers", slow_event_readers).fault("200,000 objects are online, and 1,000 clients read the viewer's `/events` at 10 KB/s for 25 s; a fifth of the callbacks")]
}

const OBJECTS: i64 = 200_000;
const READERS: usize = 1_000;
const BYTES_PER_READ: usize = 5_000;
const READ_INTERVAL: Duration = Duration::from_millis(500);
const READ_FOR: Duration = Duration::from_secs(25);
/// Allowed growth of the viewer's resident memory.
const GROWTH_MAX_KIB: u64 = 64 << 10;
/// Maximum latency of other requests during the case. The page gives up after this time.
const LATENCY_MAX: Duration = Duration::from_secs(5);

// Field case 2.2
async fn slow_event_readers() -> Verdict {
    // The load is small, because the readers also need processor time.
    let rate = Rate { callbacks: Rate::USUAL.callbacks / 5, ..Rate::USUAL };
    let mut world = World::start(Setup { rate, ..Setup::default() }).await;
    rows::insert_foreign(world.database.pool(), OBJECTS).await;
    let viewer = world.viewer.insert(world.spawn_viewer());
    viewer.ready().await;
    let address = viewer_address(viewer).await;
    world.start_load().await;

    let viewer = world.viewer.as_ref().expect("the case has started a viewer");
    let before = viewer.rss_kib();
    let mut readers: JoinSet<bool> = (0..READERS).map(|_| read_slowly(address)).collect();
    let (began, mut peak, mut slowest) = (Instant::now(), before, Duration::ZERO);
    while began.elapsed() < READ_FOR {
        let sent_at = Instant::now();
        let response = http_get(address, "/stats").await;
        slowest = slowest.max(sent_at.elapsed());
        peak = peak.max(viewer.rss_kib());
        if !response.is_ok_and(|response| response.status == 200) {
            slowest = Duration::MAX;
        }
        world.run_for(READ_INTERVAL).await;
    }
    let mut cut_off = 0;
    while let Some(read) = readers.join_next().await {
        cut_off += usize::from(!read.is_ok_and(|is_open| is_open));
    }
    world.wait_for_recovery().await;

    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    let grown = peak - before;
    println!(
        "the viewer grew by {grown} KiB; its slowest answer took {slowest:?}; {cut_off} cut off"
    );
    let breach = format!("the viewer grew by {grown} KiB for {READERS} readers");
    verdict.require(grown <= GROWTH_MAX_KIB, breach);
    let breach = format!("the viewer's slowest answer took {slowest:?}");
    verdict.require(slowest <= LATENCY_MAX, breach);
    verdict.require(cut_off == 0, format!("{cut_off} readers were cut off while they read"));
    verdict
}

/// Reads for [`READ_FOR`]. Returns whether the stream is still open then.
async fn read_slowly(viewer: SocketAddr) -> bool {
    let Ok(mut stream) = connect_with_small_buffer(viewer).await else { return false };
    let request = b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n";
    if stream.write_all(request).await.is_err() {
        return false;
    }
    let began = Instant::now();
    let mut buffer = vec![0; BYTES_PER_READ];
    while began.elapsed() < READ_FOR {
        if !stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {
            return false;
        }
        tokio::time::sleep(READ_INTERVAL).await;
    }
    true
}

/// Connects with a small receive buffer. With the usual one, the kernel would read far ahead of the
/// client. With one smaller than a segment of the loopback, the sender would wait for its persist
/// timer.
async fn connect_with_small_buffer(viewer: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(128 << 10)?;
    socket.connect(viewer).await
}
