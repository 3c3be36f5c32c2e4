//! Tests the limit with simulated APIs. The API's load at the start of a lookup determines how long
//! the lookup takes, on a simulated clock.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a simulation's counts and seconds are small and not negative"
)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const MAX: usize = 2_000;
/// The latencies without load, in seconds.
const LATENCY: std::ops::Range<f64> = 0.3..4.3;
const MEAN_LATENCY: f64 = 2.3;
const TIMEOUT_SECONDS: f64 = 5.0;

/// A simulated API with its lookups in flight.
struct Simulation {
    /// The number of concurrent lookups above which the API becomes slower.
    knee: f64,
    /// Above the knee, the latency grows with this power of the load.
    power: i32,
    /// The factor by which every lookup is slower, regardless of the load.
    slowness: f64,
    /// Whether it rejects the lookups above the knee without the usual latency.
    rejects_excess: bool,
    random: StdRng,
    now: f64,
    next_number: u64,
    /// For each lookup: its end in microseconds, its number, its duration, whether it is answered.
    in_flight: BinaryHeap<Reverse<(u64, u64, u64, bool)>>,
    /// A number of concurrent lookups that replaces the adaptive limit.
    fixed_limit: Option<usize>,
}

impl Simulation {
    fn new(knee: f64, power: i32) -> Self {
        Self {
            knee,
            power,
            slowness: 1.0,
            rejects_excess: false,
            random: StdRng::seed_from_u64(7),
            now: 0.0,
            next_number: 0,
            in_flight: BinaryHeap::new(),
            fixed_limit: None,
        }
    }

    /// Runs lookups for `seconds`, and returns the answers per second.
    fn run(&mut self, seconds: f64, limit: &mut AdaptiveLimit) -> f64 {
        let (until, mut answers) = (self.now + seconds, 0_u32);
        while self.now < until {
            while self.in_flight.len() < self.fixed_limit.unwrap_or_else(|| limit.limit()) {
                self.start_lookup();
                limit.record_start(self.in_flight.len());
            }
            let Some(Reverse((end, number, took, is_answer))) = self.in_flight.pop() else { break };
            self.now = end as f64 / 1e6;
            answers += u32::from(is_answer);
            let sample = if is_answer {
                Sample::Answer(Duration::from_micros(took))
            } else {
                Sample::Failure
            };
            limit.record_end(number, sample, self.next_number);
        }
        f64::from(answers) / seconds
    }

    fn start_lookup(&mut self) {
        let load = (self.in_flight.len() + 1) as f64 / self.knee;
        let slowdown = self.slowness * load.max(1.0).powi(self.power);
        let seconds = self.random.random_range(LATENCY) * slowdown;
        let (seconds, is_answer) = if self.rejects_excess && load > 1.0 {
            (0.1, false)
        } else {
            (seconds.min(TIMEOUT_SECONDS), seconds < TIMEOUT_SECONDS)
        };
        let took = (seconds * 1e6) as u64;
        let end = (self.now * 1e6) as u64 + took;
        self.in_flight.push(Reverse((end, self.next_number, took, is_answer)));
        self.next_number += 1;
    }
}

/// The highest rate that a fixed limit reaches.
fn best_fixed_rate(api: impl Fn() -> Simulation) -> f64 {
    let limits = (0..).map(|step| (20.0 * 1.1_f64.powi(step)) as usize);
    limits
        .take_while(|limit| *limit <= MAX)
        .map(|limit| {
            let mut api = Simulation { fixed_limit: Some(limit), ..api() };
            let mut unused = AdaptiveLimit::new(MAX);
            api.run(60.0, &mut unused);
            api.run(120.0, &mut unused)
        })
        .fold(0.0, f64::max)
}

#[test]
fn limit_keeps_nine_tenths_of_the_best_fixed_rate() {
    for knee in [50.0, 200.0, 700.0] {
        for power in [1, 2] {
            let (mut api, mut limit) = (Simulation::new(knee, power), AdaptiveLimit::new(MAX));
            api.run(120.0, &mut limit);
            let rate = api.run(600.0, &mut limit);
            let best = best_fixed_rate(|| Simulation::new(knee, power));
            assert!(rate >= 0.9 * best, "{rate} of {best}/s: knee {knee}, power {power}");
        }
    }
}

#[test]
fn limit_stays_close_to_what_a_rejecting_api_accepts() {
    let mut api = Simulation { rejects_excess: true, ..Simulation::new(300.0, 0) };
    let mut limit = AdaptiveLimit::new(MAX);
    api.run(120.0, &mut limit);
    let rate = api.run(600.0, &mut limit);
    assert!(rate > 0.75 * 300.0 / MEAN_LATENCY, "{rate}/s");
    assert!(limit.limit() < 400, "{}", limit.limit());
}

#[test]
fn limit_reaches_the_maximum_of_a_strong_api_in_a_minute() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), AdaptiveLimit::new(MAX));
    api.run(60.0, &mut limit);
    let later_limits = (0..600).map(|_| {
        api.run(1.0, &mut limit);
        limit.limit()
    });
    assert!(later_limits.min() > Some(MAX * 9 / 10));
}

#[test]
fn latency_that_is_not_caused_by_load_does_not_lower_the_rate() {
    let (mut api, mut limit) = (Simulation::new(500.0, 2), AdaptiveLimit::new(MAX));
    for slowness in [0.25, 1.0, 0.25] {
        api.slowness = slowness;
        api.run(300.0, &mut limit);
        let rate = api.run(600.0, &mut limit);
        let best = 500.0 / (MEAN_LATENCY * slowness);
        assert!(rate > 0.9 * best, "{rate} of {best}/s");
    }
}

#[test]
fn limit_follows_a_knee_that_moves() {
    let (mut api, mut limit) = (Simulation::new(500.0, 2), AdaptiveLimit::new(MAX));
    for knee in [500.0, 100.0, 1_000.0] {
        api.knee = knee;
        api.run(300.0, &mut limit);
        let rate = api.run(600.0, &mut limit);
        assert!(rate > 0.9 * knee / MEAN_LATENCY, "{rate}/s, knee {knee}");
    }
}

#[test]
fn limit_recovers_after_an_api_that_answered_nothing() {
    let (mut api, mut limit) = (Simulation::new(500.0, 1), AdaptiveLimit::new(MAX));
    api.slowness = 100.0;
    api.run(60.0, &mut limit);
    assert!(limit.limit() < 50, "{}", limit.limit());
    api.slowness = 1.0;
    api.run(600.0, &mut limit);
    let rate = api.run(600.0, &mut limit);
    assert!(rate > 0.9 * 500.0 / MEAN_LATENCY, "{rate}/s");
}

// Field case 5.6.
#[test]
fn a_limit_of_one_doubles_within_minutes() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), AdaptiveLimit::new(MAX));
    (limit.limit, limit.has_fallen, limit.baseline_latency) = (1.0, true, Some(MEAN_LATENCY));
    limit.begin_round(0);
    api.run(180.0, &mut limit);
    assert!(limit.limit >= 2.0, "{}", limit.limit);
    api.run(1_200.0, &mut limit);
    assert!(limit.limit >= 10.0, "{}", limit.limit);
}

#[test]
fn a_limit_that_is_not_reached_does_not_change() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), AdaptiveLimit::new(MAX));
    // Fewer lookups than the limit allows.
    api.fixed_limit = Some(10);
    api.run(300.0, &mut limit);
    assert_eq!(limit.limit(), INITIAL_LIMIT as usize);
}
