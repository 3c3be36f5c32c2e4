//! What the producer does with more than it can take.

use std::path::Path;
use std::time::Duration;

use super::callbacks::{PATIENT, address, callbacks_at};
use crate::callbacks::Load;
use crate::curve::{self, Point};
use crate::servers::World;
use crate::table::{Goal, Row};
use crate::usage::Meter;

const IDS: u16 = 200;
const NO_STATUS_API: &str = "http://127.0.0.1:1";
/// What is offered, beside what the broker confirms.
const SHARES: [f64; 5] = [0.5, 0.9, 1.5, 2.0, 3.0];
const SHARES_WITHOUT_SPOOL: [f64; 3] = [0.9, 1.5, 3.0];

/// Offers up to three times what the broker confirms: with a spool, which takes the rest, and with one that
/// cannot be opened, when the rest has to be refused. Draws that into the file at `curve`.
pub(crate) async fn measure(world: &World, curve: Option<&Path>) -> anyhow::Result<Vec<Row>> {
    let place = world.place(NO_STATUS_API.to_owned()).await;
    let capacity = callbacks_at(&place, IDS, 16, &PATIENT).await?.ours;
    let (mut rows, mut points) = (Vec::new(), Vec::new());
    let with = SHARES.map(|share| (share, true));
    let without = SHARES_WITHOUT_SPOOL.map(|share| (share, false));
    for (share, has_spool) in with.into_iter().chain(without) {
        let (row, point) = offered(world, capacity, share, has_spool).await?;
        rows.push(row);
        points.push(point);
    }
    if let Some(path) = curve {
        curve::draw(path, &points)?;
    }
    Ok(rows)
}

async fn offered(
    world: &World,
    capacity: f64,
    share: f64,
    has_spool: bool,
) -> anyhow::Result<(Row, Point)> {
    let place = world.place(NO_STATUS_API.to_owned()).await;
    // No directory can be made there.
    let spool = if has_spool { vec![] } else { vec![("SPOOL_DIR", "/dev/null/spool")] };
    let producer = place.spawn("producer", &spool).await;
    let offered = capacity * share;
    let load = Load {
        producer: address(&producer).await?,
        connections: 1_000,
        ids: IDS,
        rate: Some(offered / f64::from(IDS)),
        warm_up: Duration::from_secs(1),
        duration: Duration::from_secs(4),
    };
    let meter = Meter::start(&producer);
    let answers = load.run().await?;
    let accepted = answers.accepted_per_second * f64::from(IDS);
    let refused = answers.refused_per_second * f64::from(IDS);
    let refused_share = refused / (accepted + refused);
    let what = format!(
        "{share} of what the broker takes offered{}",
        if has_spool { "" } else { ", no spool" }
    );
    let mut row = Row::new(what, "ids/s", accepted);
    row.limit = Some(offered);
    row.p50_ms = Some(answers.latency_ms(0.5));
    row.p99_ms = Some(answers.latency_ms(0.99));
    row.cost = Some(meter.cost_of(accepted * (load.warm_up + load.duration).as_secs_f64()));
    row.goals = vec![Goal::P99MsAtMost(1_000.0)];
    row.note = Some(format!("{:.0}% answered 503", 100.0 * refused_share));
    let p99_ms = answers.latency_ms(0.99);
    let point = Point { has_spool, offered: share, accepted: accepted / capacity, p99_ms };
    Ok((row, point))
}
