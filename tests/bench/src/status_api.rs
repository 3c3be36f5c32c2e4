//! The pace of the status API.

use std::ops::Range;
use std::time::Duration;

use testkit::{Connections, PlainStatusApi};

/// The latency of answers.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// The range of the uniformly distributed latency.
    pub(crate) latency: Range<Duration>,
    /// If more lookups than this are in flight, the latency grows with the square of their number.
    pub(crate) knee: Option<u32>,
}

impl Pace {
    pub(crate) const INSTANT: Self = Self { latency: Duration::ZERO..Duration::ZERO, knee: None };

    /// Starts a status API of this pace. Every object is online, so that each lookup leads to a
    /// write.
    pub(crate) fn start(self) -> PlainStatusApi {
        PlainStatusApi::start(Connections::StayOpen, move |in_flight| {
            if self.latency.is_empty() {
                return None;
            }
            let load = self.knee.map_or(1.0, |knee| f64::from(in_flight) / f64::from(knee));
            Some(rand::random_range(self.latency.clone()).mul_f64(load.max(1.0).powi(2)))
        })
    }
}
