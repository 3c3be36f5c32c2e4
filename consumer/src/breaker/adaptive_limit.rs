//! A limit on lookups that finds by itself how many the API bears.
//!
//! It is the gradient of latency that decides, as in TCP Vegas: what an answer costs now, beside what it
//! costs while the API is at ease. A limit that makes answers dearer falls, one that does not rises.
//!
//! It looks at rounds of lookups: all that begin until there are as many as the limit, each to its end. A
//! round that closed before the slow ones are in would find every API faster than it is.
//!
//! Decision: docs/decisions/0033-how-does-the-adaptive-limit-work.md

use std::time::Duration;

use super::gauge;

/// Where it begins, unless fewer may run.
const FIRST: f64 = 50.0;
/// A round has this many lookups, or as many as the limit if that is more: of fewer, chance would decide.
const ROUND: u64 = 200;
/// While the limit is small, a round has fewer lookups, or it would take minutes: this many for each that
/// may run, but at least [`ROUND_LEAST`].
const ROUND_PER_LOOKUP: u64 = 20;
const ROUND_LEAST: u64 = 20;
/// What an answer may cost, compared with one at ease, before the limit falls. With less, chance would make
/// it fall, which at 0.3 to 4.3 s is 3.5% of a round of 200; with more, little would be left of an API whose
/// latency grows with the square of its load or worse. A smaller round may cost more by chance.
const BEARABLE_EXCESS: f64 = 0.09;
/// Each so many rounds, one runs with this part of the limit and tells what an answer costs at ease. It
/// costs 1.5% of the rate. The least that was ever seen would not do: it is the luckiest round's, and
/// becomes less and less, until the API never seems to be at ease again.
const EASE_EVERY: u32 = 20;
const EASE_PART: f64 = 0.7;
/// How much of the way it goes to what such a round finds.
const EASE_STEP: f64 = 0.5;
/// A round that is so much cheaper is no chance: the API has become faster.
const FASTER: f64 = 0.85;
/// The most that the limit rises and falls after a round, and how it rises until it fell once.
const RISE: f64 = 1.1;
/// A small limit rises by this much, or it would take eight rounds from 1 to 2.
const RISE_LEAST: f64 = 0.5;
const FIRST_RISE: f64 = 2.0;
const FALL: f64 = 0.7;
/// When the limit has fallen to this part of what it was and answers cost as much as before, or nearly,
/// then it is not our load that makes them so.
const IN_VAIN: f64 = 0.5;
const NEARLY: f64 = 0.9;

pub(super) struct Adaptive {
    limit: f64,
    max: f64,
    round: Round,
    /// What an answer costs, in seconds, when the API is at ease.
    at_ease: Option<f64>,
    /// The rounds since that was found out, from when the limit fell first.
    rounds: u32,
    has_fallen: bool,
    /// The limit and the cost of an answer when it began to fall.
    fell_from: Option<(f64, f64)>,
}

/// Lookups that are judged together.
#[derive(Default)]
struct Round {
    /// The number of the first, and how many there are.
    first: u64,
    size: u64,
    /// How many of them have come to an end.
    ended: u64,
    answered: f64,
    failed: f64,
    /// Of the answers together.
    seconds: f64,
    /// Whether there were once as many in flight as may be.
    was_full: bool,
}

impl Adaptive {
    pub(super) fn new(max: usize) -> Self {
        let max = gauge(max);
        let mut adaptive = Self {
            limit: FIRST.min(max),
            max,
            round: Round::default(),
            at_ease: None,
            rounds: 0,
            has_fallen: false,
            fell_from: None,
        };
        adaptive.begin_round(0);
        adaptive
    }

    /// Changes the most that is allowed; a limit above it falls to it.
    pub(super) fn set_max(&mut self, max: usize, next: u64) {
        self.max = gauge(max);
        if self.limit > self.max {
            self.limit = self.max;
            self.begin_round(next);
        }
    }

    /// From 1 to the most that was allowed.
    pub(super) fn limit(&self) -> usize {
        let limit = if self.is_at_ease() { self.limit * EASE_PART } else { self.limit };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is between 1 and 50,000"
        )]
        let limit = limit.max(1.0) as usize;
        limit
    }

    /// Whether this round is to tell what an answer costs at ease. While the limit falls none is: the API
    /// is not.
    fn is_at_ease(&self) -> bool {
        self.rounds >= EASE_EVERY && self.fell_from.is_none()
    }

    /// The lookups from `next` on make the next round. What the others come to is of no interest: they
    /// began under another limit, or when the API was away.
    pub(super) fn begin_round(&mut self, next: u64) {
        let limit = self.limit() as u64;
        let size = limit.saturating_mul(ROUND_PER_LOOKUP).clamp(ROUND_LEAST, ROUND).max(limit);
        self.round = Round { first: next, size, ..Round::default() };
    }

    /// A lookup begins, and with it there are so many.
    pub(super) fn begins(&mut self, in_flight: usize) {
        self.round.was_full |= in_flight >= self.limit();
    }

    /// Lookup `number` has come to that. `next` is the number of the next one. Returns whether the limit
    /// may have changed.
    pub(super) fn ended(&mut self, number: u64, came_to: CameTo, next: u64) -> bool {
        let round = &mut self.round;
        if !(round.first..round.first + round.size).contains(&number) {
            return false;
        }
        round.ended += 1;
        match came_to {
            CameTo::Answer(after) => {
                round.answered += 1.0;
                round.seconds += after.as_secs_f64();
            }
            CameTo::Failure => round.failed += 1.0,
            CameTo::Nothing => {}
        }
        if round.ended < round.size {
            return false;
        }
        self.judge();
        self.begin_round(next);
        true
    }

    fn judge(&mut self) {
        let Round { answered, failed, seconds, was_full, size, .. } = self.round;
        // Chance is as the square root of how few there were.
        let bearable = 1.0 + BEARABLE_EXCESS * (share(ROUND, size)).sqrt().max(1.0);
        // With lookups to spare, the limit had no part in it.
        if !was_full {
            return;
        }
        if answered == 0.0 {
            self.limit = (self.limit * FALL).max(1.0);
            return;
        }
        // A failure is a lookup for nothing, so the others have to pay for it.
        let cost = seconds / answered * ((answered + failed) / answered);
        let mut at_ease = *self.at_ease.get_or_insert(cost);
        if self.is_at_ease() {
            self.at_ease = Some(at_ease + (cost - at_ease) * EASE_STEP);
            self.rounds = 0;
            return;
        }
        if cost < at_ease * FASTER {
            at_ease = cost;
        } else if !self.has_fallen && cost < at_ease * bearable {
            // It was of one round, and then of few.
            at_ease += (cost - at_ease) * EASE_STEP;
        }
        if let Some((limit, before)) = self.fell_from
            && self.limit <= limit * IN_VAIN
        {
            if cost > before * NEARLY {
                at_ease = cost;
            }
            self.fell_from = None;
        }
        self.at_ease = Some(at_ease);
        let bears = bearable * at_ease / cost;
        if bears < 1.0 {
            if !self.has_fallen {
                self.rounds = EASE_EVERY - 2;
            }
            self.has_fallen = true;
            self.fell_from.get_or_insert((self.limit, cost));
        } else {
            self.fell_from = None;
        }
        self.rounds += u32::from(self.has_fallen);
        let factor = if self.has_fallen { bears.clamp(FALL, RISE) } else { FIRST_RISE };
        let least = if factor >= RISE { self.limit + RISE_LEAST } else { 0.0 };
        self.limit = (self.limit * factor).max(least).clamp(1.0, self.max);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a round has at most 50,000 lookups")]
fn share(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// What a lookup came to, as far as the limit is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) enum CameTo {
    /// After so long.
    Answer(Duration),
    /// Which may be the API's.
    Failure,
    /// It failed by its object, or never began.
    Nothing,
}

#[cfg(test)]
mod tests;
