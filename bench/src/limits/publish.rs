//! Publishing with confirms.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Confirmation};

use super::amqp;
use crate::servers::per_second;

/// How much is written at once.
const CHUNK_BYTES: usize = 256 << 10;
/// How many publishes of lapin's are polled together.
const TOGETHER: usize = 1_000;

/// Publishes a message about each of `ids` to `queue`, and gives how many were confirmed in a second: frames that were encoded before, in large chunks over one socket. Nothing
/// faster can be said to a broker.
pub(crate) async fn publish(
    uri: &str,
    queue: &str,
    ids: impl Iterator<Item = i64>,
) -> anyhow::Result<f64> {
    let (mut frames, mut count) = (Vec::new(), 0);
    for id in ids {
        amqp::publish(&mut frames, queue, body(id).as_bytes());
        count += 1;
    }
    let uri = uri.to_owned();
    tokio::task::spawn_blocking(move || publish_over_a_socket(&uri, frames, count)).await?
}

fn publish_over_a_socket(uri: &str, frames: Vec<u8>, count: u64) -> anyhow::Result<f64> {
    let (mut socket, mut confirms) = amqp::open(uri)?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            frames
                .chunks(CHUNK_BYTES)
                .try_for_each(|chunk| socket.write_all(chunk))
                .map(|()| socket)
        });
        let mut confirmed = vec![false; usize::try_from(count)? + 1];
        let (mut lowest, mut missing) = (1, count);
        while missing > 0 {
            let ack = confirms.next()?;
            let tag = usize::try_from(ack.tag)?;
            let tags = if ack.multiple { lowest..=tag } else { tag..=tag };
            for confirmed in &mut confirmed[tags] {
                missing -= u64::from(!std::mem::replace(confirmed, true));
            }
            if ack.multiple {
                lowest = lowest.max(tag + 1);
            }
        }
        let took = started.elapsed();
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(per_second(count, took))
    })
}

/// The same with at most `window` messages that are not confirmed: what the broker does for as many
/// callers, each of whom waits for its answer.
pub(crate) async fn publish_in_a_window(
    uri: &str,
    queue: &str,
    count: u64,
    window: u64,
) -> anyhow::Result<f64> {
    let (uri, queue) = (uri.to_owned(), queue.to_owned());
    let publish = move || {
        let (mut socket, mut confirms) = amqp::open(&uri)?;
        let (mut published, mut confirmed, mut frames) = (0, 0, Vec::new());
        let mut single = BTreeSet::new();
        let started = Instant::now();
        while confirmed < count {
            frames.clear();
            while published < count && published - confirmed - (single.len() as u64) < window {
                published += 1;
                amqp::publish(&mut frames, &queue, body(published.cast_signed()).as_bytes());
            }
            socket.write_all(&frames)?;
            loop {
                let ack = confirms.next()?;
                if ack.multiple {
                    confirmed = confirmed.max(ack.tag);
                    single.retain(|tag| *tag > confirmed);
                } else {
                    single.insert(ack.tag);
                }
                while single.remove(&(confirmed + 1)) {
                    confirmed += 1;
                }
                if confirms.is_drained() {
                    break;
                }
            }
        }
        Ok(per_second(count, started.elapsed()))
    };
    tokio::task::spawn_blocking(publish).await?
}

/// The same by lapin's plainest loop: publishes are polled together, a thousand at a time.
pub(crate) async fn publish_by_lapin(uri: &str, queue: &str, count: u64) -> anyhow::Result<f64> {
    let connection = testbed::connect(uri).await.map_err(anyhow::Error::msg)?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let properties = BasicProperties::default().with_delivery_mode(2);
    let publish = async |id: i64| {
        let (options, properties) = (BasicPublishOptions::default(), properties.clone());
        let body = body(id);
        let published =
            channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties);
        let confirmation = published.await?.await?;
        anyhow::ensure!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
        Ok(())
    };
    let started = Instant::now();
    let mut ids = 1..=i64::try_from(count)?;
    let mut under_way: FuturesUnordered<_> = ids.by_ref().take(TOGETHER).map(publish).collect();
    while let Some(published) = under_way.next().await {
        published?;
        under_way.extend(ids.next().map(publish));
    }
    Ok(per_second(count, started.elapsed()))
}

fn body(id: i64) -> String {
    format!(r#"{{"id":{id}}}"#)
}
