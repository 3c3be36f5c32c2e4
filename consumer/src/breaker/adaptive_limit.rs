//! A limit on lookups in flight that finds how many the API sustains.
//!
//! As in TCP Vegas, the gradient decides: the baseline latency divided by the current latency. The
//! limit falls when it makes answers slower, and otherwise rises.
//!
//! The limit is judged in rounds. A round is a number of lookups in a row, and it ends when all of
//! them have ended. If it ended before its slowest lookups, every API would appear faster than it
//! is.
//!
//! Decision: docs/decisions/0033-how-does-the-adaptive-limit-work.md

use std::time::Duration;

use super::as_float;

/// The limit at the start, unless `MAX_CONSUMERS` is lower.
const INITIAL_LIMIT: f64 = 50.0;
/// The number of lookups in a round, or the limit if the limit is higher. With fewer lookups,
/// random variation would dominate the result.
const ROUND_SIZE: u64 = 200;
/// While the limit is low, a round has only this many times the limit, but at least
/// [`ROUND_SIZE_MIN`]. With [`ROUND_SIZE`] lookups, it would take minutes.
const ROUND_SIZE_PER_LIMIT: u64 = 20;
const ROUND_SIZE_MIN: u64 = 20;
/// The share by which the latency may exceed the baseline latency before the limit falls. With a
/// lower value, random variation would make the limit fall: at latencies of 0.3 to 4.3 s, the
/// standard error of a round of 200 is 3.5%. With a higher value, an API whose latency grows at
/// least with the square of its load would lose much of its throughput. A smaller round may exceed
/// the baseline by more.
const TOLERATED_EXCESS: f64 = 0.09;
/// Every `BASELINE_EVERY` rounds, one round runs at `BASELINE_SHARE` of the limit to measure the
/// baseline latency again. This costs 1.5% of the rate. The lowest latency ever measured is no
/// substitute: it comes from the luckiest round and never rises, so that in the end the API would
/// always seem overloaded.
const BASELINE_EVERY: u32 = 20;
const BASELINE_SHARE: f64 = 0.7;
/// The baseline latency moves by this share of its difference to a new measurement.
const BASELINE_WEIGHT: f64 = 0.5;
/// A latency below this share of the baseline is not random variation: the API has become faster.
const FASTER_BELOW: f64 = 0.85;
/// The largest factors by which the limit changes after a round.
const RISE_MAX: f64 = 1.1;
const FALL_MAX: f64 = 0.7;
/// A rise by `RISE_MAX` adds at least this much. Otherwise, a rise from 1 to 2 would take eight
/// rounds.
const RISE_MIN: f64 = 0.5;
/// The factor by which the limit rises until it has fallen once.
const INITIAL_RISE: f64 = 2.0;
/// If a fall of the limit to this share has had no effect, the load is not the cause of the
/// latency, and the current latency becomes the baseline.
const FUTILE_FALL: f64 = 0.5;
/// A fall has had no effect if the latency is still above this share of the latency before the
/// fall.
const UNCHANGED_ABOVE: f64 = 0.9;

pub(super) struct AdaptiveLimit {
    limit: f64,
    max: f64,
    round: Round,
    /// In seconds.
    baseline_latency: Option<f64>,
    /// The rounds since the last baseline round; not counted before the limit has fallen once.
    rounds_since_baseline: u32,
    has_fallen: bool,
    /// While the limit falls: the limit and the latency when it began to fall.
    fell_from: Option<(f64, f64)>,
}

/// Lookups that are judged together.
#[derive(Default)]
struct Round {
    /// The number of the first lookup.
    first: u64,
    size: u64,
    ended: u64,
    answered: f64,
    failed: f64,
    /// The sum of the latencies of all answers.
    seconds: f64,
    /// Whether the limit was reached during the round.
    was_full: bool,
}

impl AdaptiveLimit {
    pub(super) fn new(max: usize) -> Self {
        let max = as_float(max);
        let mut adaptive = Self {
            limit: INITIAL_LIMIT.min(max),
            max,
            round: Round::default(),
            baseline_latency: None,
            rounds_since_baseline: 0,
            has_fallen: false,
            fell_from: None,
        };
        adaptive.begin_round(0);
        adaptive
    }

    /// Changes the maximum. A limit above the new maximum falls to the maximum.
    pub(super) fn set_max(&mut self, max: usize, next_number: u64) {
        self.max = as_float(max);
        if self.limit > self.max {
            self.limit = self.max;
            self.begin_round(next_number);
        }
    }

    /// The limit that applies to this round, from 1 to the maximum.
    pub(super) fn limit(&self) -> usize {
        let limit = if self.is_baseline_round() { self.limit * BASELINE_SHARE } else { self.limit };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is between 1 and 50,000"
        )]
        let limit = limit.max(1.0) as usize;
        limit
    }

    /// Whether this round measures the baseline latency. No round does while the limit falls,
    /// because the API is overloaded then.
    fn is_baseline_round(&self) -> bool {
        self.rounds_since_baseline >= BASELINE_EVERY && self.fell_from.is_none()
    }

    /// Begins a round with lookup `next_number`. Earlier lookups are ignored: they started under
    /// another limit, or when the API was away.
    pub(super) fn begin_round(&mut self, next_number: u64) {
        let limit = self.limit() as u64;
        let size =
            limit.saturating_mul(ROUND_SIZE_PER_LIMIT).clamp(ROUND_SIZE_MIN, ROUND_SIZE).max(limit);
        self.round = Round { first: next_number, size, ..Round::default() };
    }

    /// Records that a lookup has started. `in_flight` includes this lookup.
    pub(super) fn record_start(&mut self, in_flight: usize) {
        self.round.was_full |= in_flight >= self.limit();
    }

    /// Records that lookup `number` has ended. If this ends the round, the next round begins with
    /// lookup `next_number`. Returns whether the limit may have changed.
    pub(super) fn record_end(&mut self, number: u64, sample: Sample, next_number: u64) -> bool {
        let round = &mut self.round;
        if !(round.first..round.first + round.size).contains(&number) {
            return false;
        }
        round.ended += 1;
        match sample {
            Sample::Answer(latency) => {
                round.answered += 1.0;
                round.seconds += latency.as_secs_f64();
            }
            Sample::Failure => round.failed += 1.0,
            Sample::Ignored => {}
        }
        if round.ended < round.size {
            return false;
        }
        self.judge_round();
        self.begin_round(next_number);
        true
    }

    fn judge_round(&mut self) {
        let Round { answered, failed, seconds, was_full, size, .. } = self.round;
        // Random variation grows with the inverse square root of the size.
        let tolerated = 1.0 + TOLERATED_EXCESS * ratio(ROUND_SIZE, size).sqrt().max(1.0);
        // If the limit was not reached, it did not affect the latency.
        if !was_full {
            return;
        }
        if answered == 0.0 {
            self.limit = (self.limit * FALL_MAX).max(1.0);
            return;
        }
        // A failed lookup occupies the API without giving an answer, so it adds to the latency of
        // the answers.
        let latency = seconds / answered * ((answered + failed) / answered);
        let mut baseline = *self.baseline_latency.get_or_insert(latency);
        if self.is_baseline_round() {
            self.baseline_latency = Some(baseline + (latency - baseline) * BASELINE_WEIGHT);
            self.rounds_since_baseline = 0;
            return;
        }
        if latency < baseline * FASTER_BELOW {
            baseline = latency;
        } else if !self.has_fallen && latency < baseline * tolerated {
            // The baseline is still based on few rounds, so include this one.
            baseline += (latency - baseline) * BASELINE_WEIGHT;
        }
        if let Some((limit, latency_before)) = self.fell_from
            && self.limit <= limit * FUTILE_FALL
        {
            if latency > latency_before * UNCHANGED_ABOVE {
                baseline = latency;
            }
            self.fell_from = None;
        }
        self.baseline_latency = Some(baseline);
        let gradient = tolerated * baseline / latency;
        if gradient < 1.0 {
            if !self.has_fallen {
                // Measure the baseline again soon after the first fall.
                self.rounds_since_baseline = BASELINE_EVERY - 2;
            }
            self.has_fallen = true;
            self.fell_from.get_or_insert((self.limit, latency));
        } else {
            self.fell_from = None;
        }
        self.rounds_since_baseline += u32::from(self.has_fallen);
        let factor =
            if self.has_fallen { gradient.clamp(FALL_MAX, RISE_MAX) } else { INITIAL_RISE };
        let least = if factor >= RISE_MAX { self.limit + RISE_MIN } else { 0.0 };
        self.limit = (self.limit * factor).max(least).clamp(1.0, self.max);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a round has at most 50,000 lookups")]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// How a lookup ended, as far as it concerns the limit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sample {
    /// With an answer after this time.
    Answer(Duration),
    /// With a failure that may be the fault of the API.
    Failure,
    /// With a failure that is the fault of the object, or without an outcome.
    Ignored,
}

#[cfg(test)]
mod tests;
