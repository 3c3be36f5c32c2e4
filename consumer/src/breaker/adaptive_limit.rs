//! A limit on lookups in flight that finds how many the API sustains.
//!
//! The gradient of latency decides, as in TCP Vegas: the current latency compared with the baseline
//! latency. A limit that makes answers slower falls; one that does not rises.
//!
//! The limit is judged in rounds. A round is a number of lookups in a row, and it ends when all of
//! them have ended. If it ended before its slowest lookups, every API would appear faster than it
//! is.
//!
//! Decision: docs/decisions/0033-how-does-the-adaptive-limit-work.md

use std::time::Duration;

use super::gauge;

/// The limit at the start, unless `MAX_CONSUMERS` is lower.
const INITIAL_LIMIT: f64 = 50.0;
/// The number of lookups in a round, or the limit if that is higher: with fewer lookups, chance
/// would decide.
const ROUND_SIZE: u64 = 200;
/// While the limit is low, a round has this many lookups for each lookup in flight, but at least
/// [`ROUND_SIZE_MIN`]. Otherwise, a round would take minutes.
const ROUND_SIZE_PER_LIMIT: u64 = 20;
const ROUND_SIZE_MIN: u64 = 20;
/// How far the latency may exceed the baseline latency before the limit falls. With a lower value,
/// chance would make the limit fall: at 0.3 to 4.3 s, chance is 3.5% of a round of 200. With a
/// higher value, an API whose latency grows at least with the square of its load would lose much of
/// its throughput. A smaller round may exceed the baseline by more.
const TOLERATED_EXCESS: f64 = 0.09;
/// Every `BASELINE_EVERY` rounds, one round runs at `BASELINE_SHARE` of the limit to measure the
/// baseline latency again. This costs 1.5% of the rate. The lowest latency ever seen would not do:
/// it is the one of the luckiest round, and it only falls, until the API seems to be overloaded
/// always.
const BASELINE_EVERY: u32 = 20;
const BASELINE_SHARE: f64 = 0.7;
/// How much of the difference to a new measurement the baseline latency adopts.
const BASELINE_WEIGHT: f64 = 0.5;
/// A latency below this part of the baseline is no chance: the API has become faster.
const FASTER: f64 = 0.85;
/// The largest factors by which the limit changes after a round.
const RISE_MAX: f64 = 1.1;
const FALL_MAX: f64 = 0.7;
/// A rise by `RISE_MAX` is at least this much. Otherwise, it would take eight rounds from 1 to 2.
const RISE_MIN: f64 = 0.5;
/// The factor by which the limit rises until it has fallen once.
const INITIAL_RISE: f64 = 2.0;
/// If the limit has fallen to this part without effect, the load is not the cause of the latency,
/// and the current latency becomes the baseline.
const FUTILE_FALL: f64 = 0.5;
/// A fall has no effect if the latency is still above this part of the one before the fall.
const UNCHANGED: f64 = 0.9;

pub(super) struct AdaptiveLimit {
    limit: f64,
    max: f64,
    round: Round,
    /// In seconds.
    baseline_latency: Option<f64>,
    /// The rounds since the last baseline round; not counted before the limit has fallen once.
    rounds_since_baseline: u32,
    has_fallen: bool,
    /// The limit and the latency when the limit began to fall, while it falls.
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
    /// The latencies of all answers together.
    seconds: f64,
    /// Whether the limit was reached during the round.
    was_full: bool,
}

impl AdaptiveLimit {
    pub(super) fn new(max: usize) -> Self {
        let max = gauge(max);
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

    /// Changes the maximum. A limit above it falls to it.
    pub(super) fn set_max(&mut self, max: usize, next_number: u64) {
        self.max = gauge(max);
        if self.limit > self.max {
            self.limit = self.max;
            self.begin_round(next_number);
        }
    }

    /// The limit that applies to this round, from 1 to the highest maximum so far.
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

    /// Notes that a lookup has started. `in_flight` includes it.
    pub(super) fn note_start(&mut self, in_flight: usize) {
        self.round.was_full |= in_flight >= self.limit();
    }

    /// Notes that lookup `number` has ended. If this ends the round, the next one begins with
    /// lookup `next_number`. Returns whether the limit may have changed.
    pub(super) fn note_end(&mut self, number: u64, sample: Sample, next_number: u64) -> bool {
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
        // The influence of chance grows with the inverse square root of the size.
        let tolerated = 1.0 + TOLERATED_EXCESS * ratio(ROUND_SIZE, size).sqrt().max(1.0);
        // If the limit was not reached, it did not affect the latency.
        if !was_full {
            return;
        }
        if answered == 0.0 {
            self.limit = (self.limit * FALL_MAX).max(1.0);
            return;
        }
        // A failure takes a lookup and gives no answer, so it adds to the latency of the answers.
        let latency = seconds / answered * ((answered + failed) / answered);
        let mut baseline = *self.baseline_latency.get_or_insert(latency);
        if self.is_baseline_round() {
            self.baseline_latency = Some(baseline + (latency - baseline) * BASELINE_WEIGHT);
            self.rounds_since_baseline = 0;
            return;
        }
        if latency < baseline * FASTER {
            baseline = latency;
        } else if !self.has_fallen && latency < baseline * tolerated {
            // The baseline is still that of one round, or of a few.
            baseline += (latency - baseline) * BASELINE_WEIGHT;
        }
        if let Some((limit, latency_before)) = self.fell_from
            && self.limit <= limit * FUTILE_FALL
        {
            if latency > latency_before * UNCHANGED {
                baseline = latency;
            }
            self.fell_from = None;
        }
        self.baseline_latency = Some(baseline);
        let gradient = tolerated * baseline / latency;
        if gradient < 1.0 {
            if !self.has_fallen {
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
    /// With a failure that may be the API's.
    Failure,
    /// With a failure that is the object's, or the lookup never started.
    Ignored,
}

#[cfg(test)]
mod tests;
