//! What is measured.

mod adaptive;
mod callbacks;
mod cleanup;
mod lookups;
mod overload;
mod traces;
mod viewer;
mod writes;

use std::fmt;
use std::path::Path;

use clap::ValueEnum;

use crate::servers::World;
use crate::table::Row;

/// One part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// The producer: callbacks of 1 and of 200 ids
    Callbacks,
    /// The producer, with up to three times the callbacks that it can pass on
    Overload,
    /// The consumer, with a status API that answers at once
    Lookups,
    /// The consumer, with a status API that takes 0.3 to 4.3 s
    Slow,
    /// The consumer, with many messages about few objects
    Coalescing,
    /// The consumer, with a status API that slows down beyond a knee
    Adaptive,
    /// The consumer's batch writer, alone
    Writes,
    /// Producer and consumer, with a million messages that wait
    Backlog,
    /// The routine, with a million stale rows
    Cleanup,
    /// The viewer, with 1,000 and with 10,000 subscribers
    Viewer,
    /// The producer without traces, with few, and with all
    Traces,
}

impl Part {
    pub(crate) fn all() -> Vec<Self> {
        Self::value_variants().to_vec()
    }

    /// Measures it, and draws what the overload gives into the file at `curve`.
    ///
    /// # Errors
    /// When something breaks off.
    pub(crate) async fn measure(
        self,
        world: &World,
        curve: Option<&Path>,
    ) -> anyhow::Result<Vec<Row>> {
        let mut rows = match self {
            Self::Callbacks => callbacks::measure(world).await?,
            Self::Overload => overload::measure(world, curve).await?,
            Self::Lookups => lookups::measure_instant(world).await?,
            Self::Slow => lookups::measure_slow(world).await?,
            Self::Coalescing => lookups::measure_coalescing(world).await?,
            Self::Adaptive => adaptive::measure(world).await?,
            Self::Writes => writes::measure(world).await?,
            Self::Backlog => lookups::measure_backlog(world).await?,
            Self::Cleanup => cleanup::measure(world).await?,
            Self::Viewer => viewer::measure(world).await?,
            Self::Traces => traces::measure(world).await?,
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
