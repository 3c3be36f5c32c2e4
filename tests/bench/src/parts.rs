//! The parts of the bench.

mod adaptive;
mod callbacks;
mod cleanup;
mod groups;
mod history;
mod lookups;
mod overload;
mod restart;
mod shards;
mod traces;
mod viewer;
mod writes;

use std::fmt;
use std::path::Path;

use clap::ValueEnum;

use crate::servers::Servers;
use crate::table::Row;

/// One part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// The producer: callbacks of 1 and of 200 ids
    Callbacks,
    /// The producer, with up to three times the callbacks that the broker confirms
    Overload,
    /// The consumer, with a status API that answers at once
    Lookups,
    /// The consumer, with a status API that takes 0.3 to 4.3 s
    Slow,
    /// The consumer, with many messages about few objects
    Coalescing,
    /// Producer and consumers, with messages distributed over shards
    Shards,
    /// The lookups of several consumers, with messages distributed over shards
    Fleet,
    /// The consumer, with a status API that slows down beyond a knee
    Adaptive,
    /// The consumer's batch writer, alone
    Writes,
    /// Producer and consumer, with a million messages in the queue
    Backlog,
    /// The routine, with a million stale rows
    Cleanup,
    /// Upserts and deletions with and without the history, and reading it
    History,
    /// The viewer, with 1,000 and with 10,000 subscribers
    Viewer,
    /// The producer without traces, with few, and with all
    Traces,
    /// The start of the viewer with a million objects, with and without a snapshot
    Restart,
    /// Groups with a million objects: the start of the viewer, and events at 1,000 subscribers
    Groups,
}

impl Part {
    /// Measures the part. [`Self::Overload`] also draws its curve into the file at `curve`.
    pub(crate) async fn measure(
        self,
        servers: &Servers,
        curve: Option<&Path>,
    ) -> anyhow::Result<Vec<Row>> {
        let mut rows = match self {
            Self::Callbacks => callbacks::measure(servers).await?,
            Self::Overload => overload::measure(servers, curve).await?,
            Self::Lookups => lookups::measure_instant(servers).await?,
            Self::Slow => lookups::measure_slow(servers).await?,
            Self::Coalescing => lookups::measure_coalescing(servers).await?,
            Self::Shards => shards::measure_throughputs(servers).await?,
            Self::Fleet => shards::measure_fleets(servers).await?,
            Self::Adaptive => adaptive::measure(servers).await?,
            Self::Writes => writes::measure(servers).await?,
            Self::Backlog => lookups::measure_backlog(servers).await?,
            Self::Cleanup => cleanup::measure(servers).await?,
            Self::History => history::measure(servers).await?,
            Self::Viewer => viewer::measure(servers).await?,
            Self::Restart => restart::measure(servers).await?,
            Self::Groups => groups::measure(servers).await?,
            Self::Traces => traces::measure(servers).await?,
        };
        for row in &mut rows {
            row.part = self.to_string();
        }
        Ok(rows)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        out.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}
