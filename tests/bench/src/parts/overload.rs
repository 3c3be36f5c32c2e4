//! The producer under more load than the broker confirms.

use std::path::Path;
use std::time::Duration;

use testkit::producer_address;

use super::callbacks::{LONG_TIMEOUT, NO_STATUS_API, callbacks_at, load_row};
use crate::callbacks::Load;
use crate::curve::{self, Point};
use crate::servers::Servers;
use crate::table::{Goal, Row};
use crate::usage::Meter;

const IDS: u16 = 200;
/// Offered load, relative to the rate that the broker confirms.
const SHARES: [f64; 5] = [0.5, 0.9, 1.5, 2.0, 3.0];
const SHARES_WITHOUT_SPOOL: [f64; 3] = [0.9, 1.5, 3.0];

/// Offers up to three times the rate that the broker confirms: with a spool, which takes the rest,
/// and with one that cannot be opened, so that the rest is refused. Draws the result into the file
/// at `curve`.
pub(crate) async fn measure(servers: &Servers, curve: Option<&Path>) -> anyhow::Result<Vec<Row>> {
    let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
    let capacity = callbacks_at(&deployment, IDS, 16, &LONG_TIMEOUT).await?.ours;
    let (mut rows, mut points) = (Vec::new(), Vec::new());
    let with = SHARES.map(|share| (share, true));
    let without = SHARES_WITHOUT_SPOOL.map(|share| (share, false));
    for (share, has_spool) in with.into_iter().chain(without) {
        let (row, point) = offered(servers, capacity, share, has_spool).await?;
        rows.push(row);
        points.push(point);
    }
    if let Some(path) = curve {
        curve::draw(path, &points)?;
    }
    Ok(rows)
}

async fn offered(
    servers: &Servers,
    capacity: f64,
    share: f64,
    has_spool: bool,
) -> anyhow::Result<(Row, Point)> {
    let deployment = servers.deployment(NO_STATUS_API.to_owned()).await;
    // No directory can be created at this path.
    let spool = if has_spool { vec![] } else { vec![("SPOOL_DIR", "/dev/null/spool")] };
    let producer = deployment.system.start("producer", &spool).await;
    let offered = capacity * share;
    let load = Load {
        producer: producer_address(&producer).await,
        connections: 1_000,
        ids: IDS,
        rate: Some(offered / f64::from(IDS)),
        warm_up: Duration::from_secs(1),
        duration: Duration::from_secs(4),
    };
    let meter = Meter::start(&producer);
    let result = load.run().await?;
    let refused = result.refused_per_second;
    let refused_share = refused / (result.accepted_per_second + refused);
    let what = format!(
        "{share} of what the broker takes offered{}",
        if has_spool { "" } else { ", no spool" }
    );
    let mut row = load_row(what, load, &result, &meter);
    row.limit = Some(offered);
    row.goals = vec![Goal::P99MsAtMost(1_000.0)];
    row.note = Some(format!("{:.0}% answered 503", 100.0 * refused_share));
    let p99_ms = result.latency_ms(0.99);
    let point = Point { has_spool, offered: share, accepted: row.ours / capacity, p99_ms };
    Ok((row, point))
}
