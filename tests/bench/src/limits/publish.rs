//! Plain publishing with confirms.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Confirmation};

use super::amqp;
use crate::servers::per_second;

/// Size of one write.
const CHUNK_BYTES: usize = 256 << 10;
/// The number of lapin's publishes that are polled together.
const POLLED_TOGETHER: usize = 1_000;

/// Publishes a message for each of `ids` to `queue`, and returns the number of confirms per second.
/// It writes encoded frames in large chunks to one socket. No client can publish faster.
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
        let writer = scope.spawn(move || {
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
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(per_second(count, took))
    })
}

/// Like [`publish`], but with at most `window` unconfirmed messages, as if that many callers each
/// waited for their confirm.
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
        // The tags above `confirmed` that the broker has confirmed one by one.
        let mut confirmed_ahead = BTreeSet::new();
        let started = Instant::now();
        while confirmed < count {
            frames.clear();
            while published < count
                && published - confirmed - (confirmed_ahead.len() as u64) < window
            {
                published += 1;
                amqp::publish(&mut frames, &queue, body(published.cast_signed()).as_bytes());
            }
            socket.write_all(&frames)?;
            loop {
                let ack = confirms.next()?;
                if ack.multiple {
                    confirmed = confirmed.max(ack.tag);
                    confirmed_ahead.retain(|tag| *tag > confirmed);
                } else {
                    confirmed_ahead.insert(ack.tag);
                }
                while confirmed_ahead.remove(&(confirmed + 1)) {
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

/// Like [`publish`], with lapin in the plainest loop: a thousand publishes are polled together.
pub(crate) async fn publish_by_lapin(uri: &str, queue: &str, count: u64) -> anyhow::Result<f64> {
    let connection = testkit::connect(uri).await.map_err(anyhow::Error::msg)?;
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
    let mut in_flight: FuturesUnordered<_> =
        ids.by_ref().take(POLLED_TOGETHER).map(publish).collect();
    while let Some(published) = in_flight.next().await {
        published?;
        in_flight.extend(ids.next().map(publish));
    }
    Ok(per_second(count, started.elapsed()))
}

fn body(id: i64) -> String {
    format!(r#"{{"id":{id}}}"#)
}
