//! The limit against APIs that are computed and not waited for: each lookup takes what the API's load at
//! its beginning makes it take.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a simulation's counts and seconds are small, and never below zero"
)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const MAX: usize = 2_000;
/// In seconds, at ease.
const LATENCY: std::ops::Range<f64> = 0.3..4.3;
const TIMEOUT_SECONDS: f64 = 5.0;

/// An API in the midst of its work.
struct Simulation {
    /// How many lookups it takes at once without becoming slower, and the power by which it becomes slower
    /// beyond.
    knee: f64,
    power: i32,
    /// How much longer everything takes, whatever the load.
    slowness: f64,
    /// Whether it refuses what is more than it takes, at once.
    refuses: bool,
    chance: StdRng,
    now: f64,
    next: u64,
    /// When each ends, in microseconds, its number, and how long it took; an answer or not.
    running: BinaryHeap<Reverse<(u64, u64, u64, bool)>>,
}

impl Simulation {
    fn new(knee: f64, power: i32) -> Self {
        Self {
            knee,
            power,
            slowness: 1.0,
            refuses: false,
            chance: StdRng::seed_from_u64(7),
            now: 0.0,
            next: 0,
            running: BinaryHeap::new(),
        }
    }

    /// Lets lookups run for so many seconds, and gives how many were answered in a second.
    fn run(&mut self, seconds: f64, limit: &mut impl Limit) -> f64 {
        let (until, mut answers) = (self.now + seconds, 0_u32);
        while self.now < until {
            while self.running.len() < limit.now() {
                self.begin();
                limit.begins(self.running.len());
            }
            let Some(Reverse((end, number, took, is_answer))) = self.running.pop() else { break };
            self.now = end as f64 / 1e6;
            answers += u32::from(is_answer);
            let came_to = if is_answer {
                CameTo::Answer(Duration::from_micros(took))
            } else {
                CameTo::Failure
            };
            limit.ended(number, came_to, self.next);
        }
        f64::from(answers) / seconds
    }

    fn begin(&mut self) {
        let load = (self.running.len() + 1) as f64 / self.knee;
        let slower = self.slowness * load.max(1.0).powi(self.power);
        let seconds = self.chance.random_range(LATENCY) * slower;
        let (seconds, is_answer) = if self.refuses && load > 1.0 {
            (0.1, false)
        } else {
            (seconds.min(TIMEOUT_SECONDS), seconds < TIMEOUT_SECONDS)
        };
        let took = (seconds * 1e6) as u64;
        let end = (self.now * 1e6) as u64 + took;
        self.running.push(Reverse((end, self.next, took, is_answer)));
        self.next += 1;
    }
}

trait Limit {
    fn now(&self) -> usize;
    fn begins(&mut self, in_flight: usize);
    fn ended(&mut self, number: u64, came_to: CameTo, next: u64);
}

impl Limit for Adaptive {
    fn now(&self) -> usize {
        self.limit()
    }

    fn begins(&mut self, in_flight: usize) {
        Self::begins(self, in_flight);
    }

    fn ended(&mut self, number: u64, came_to: CameTo, next: u64) {
        Self::ended(self, number, came_to, next);
    }
}

/// One that stays as it is.
impl Limit for usize {
    fn now(&self) -> usize {
        *self
    }

    fn begins(&mut self, _: usize) {}

    fn ended(&mut self, _: u64, _: CameTo, _: u64) {}
}

/// What the best of many fixed limits gets.
fn best(api: impl Fn() -> Simulation) -> f64 {
    let limits = (0..).map(|step| (20.0 * 1.1_f64.powi(step)) as usize);
    limits
        .take_while(|limit| *limit <= MAX)
        .map(|mut limit| {
            let mut api = api();
            api.run(60.0, &mut limit);
            api.run(120.0, &mut limit)
        })
        .fold(0.0, f64::max)
}

#[test]
fn nine_tenths_of_the_best_are_kept_with_apis_that_slow_down_beyond_a_knee() {
    for knee in [50.0, 200.0, 700.0] {
        for power in [1, 2] {
            let (mut api, mut limit) = (Simulation::new(knee, power), Adaptive::new(MAX));
            api.run(120.0, &mut limit);
            let ours = api.run(600.0, &mut limit);
            let best = best(|| Simulation::new(knee, power));
            assert!(ours >= 0.9 * best, "{ours} of {best}/s: knee {knee}, power {power}");
        }
    }
}

#[test]
fn an_api_that_refuses_what_is_too_much_is_asked_for_little_more_than_it_takes() {
    let mut api = Simulation { refuses: true, ..Simulation::new(300.0, 0) };
    let mut limit = Adaptive::new(MAX);
    api.run(120.0, &mut limit);
    let rate = api.run(600.0, &mut limit);
    assert!(rate > 0.75 * 300.0 / 2.3, "{rate}/s");
    assert!(limit.limit() < 400, "{}", limit.limit());
}

#[test]
fn an_api_that_bears_all_that_may_be_asked_is_asked_that_within_a_minute() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), Adaptive::new(MAX));
    api.run(60.0, &mut limit);
    let least = (0..600).map(|_| {
        api.run(1.0, &mut limit);
        limit.limit()
    });
    assert!(least.min() > Some(MAX * 9 / 10));
}

#[test]
fn an_api_that_becomes_slower_for_another_reason_is_asked_as_before() {
    let (mut api, mut limit) = (Simulation::new(500.0, 2), Adaptive::new(MAX));
    for slowness in [0.25, 1.0, 0.25] {
        api.slowness = slowness;
        api.run(300.0, &mut limit);
        let rate = api.run(600.0, &mut limit);
        let best = 500.0 / (2.3 * slowness);
        assert!(rate > 0.9 * best, "{rate} of {best}/s");
    }
}

#[test]
fn a_knee_that_moves_is_followed() {
    let (mut api, mut limit) = (Simulation::new(500.0, 2), Adaptive::new(MAX));
    for knee in [500.0, 100.0, 1_000.0] {
        api.knee = knee;
        api.run(300.0, &mut limit);
        let rate = api.run(600.0, &mut limit);
        assert!(rate > 0.9 * knee / 2.3, "{rate}/s, knee {knee}");
    }
}

#[test]
fn an_api_that_has_answered_nothing_yet_is_asked_more_once_it_does() {
    let (mut api, mut limit) = (Simulation::new(500.0, 1), Adaptive::new(MAX));
    api.slowness = 100.0;
    api.run(60.0, &mut limit);
    assert!(limit.limit() < 50, "{}", limit.limit());
    api.slowness = 1.0;
    api.run(600.0, &mut limit);
    let rate = api.run(600.0, &mut limit);
    assert!(rate > 0.9 * 500.0 / 2.3, "{rate}/s");
}

// Field case 5.6.
#[test]
fn a_limit_of_one_doubles_within_minutes() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), Adaptive::new(MAX));
    (limit.limit, limit.has_fallen, limit.at_ease) = (1.0, true, Some(2.3));
    limit.begin_round(0);
    api.run(180.0, &mut limit);
    assert!(limit.limit >= 2.0, "{}", limit.limit);
    api.run(1_200.0, &mut limit);
    assert!(limit.limit >= 10.0, "{}", limit.limit);
}

#[test]
fn a_limit_that_is_not_reached_stays() {
    let (mut api, mut limit) = (Simulation::new(1e9, 1), Adaptive::new(MAX));
    let mut few = FewOf(&mut limit, 10);
    api.run(300.0, &mut few);
    assert_eq!(limit.limit(), FIRST as usize);
}

/// Fewer lookups than may run: there is no more to look up.
struct FewOf<'a>(&'a mut Adaptive, usize);

impl Limit for FewOf<'_> {
    fn now(&self) -> usize {
        self.1
    }

    fn begins(&mut self, in_flight: usize) {
        self.0.begins(in_flight);
    }

    fn ended(&mut self, number: u64, came_to: CameTo, next: u64) {
        self.0.ended(number, came_to, next);
    }
}
