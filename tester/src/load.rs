//! The load generator: callbacks at a rate, or as fast as they are answered.
//!
//! At a rate it is an open loop. Callback `k` is due at `k / rate` whatever became of those before,
//! and its latency counts from then, also if every connection was waiting and it went out late.
//! Counting from the sending would leave out just the time in which the endpoint was at its worst
//! ("coordinated omission").

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use authenticity::Authenticity;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use rand::RngExt as _;
use service::CancellationToken;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::callback::{self, Sender};
use crate::config::{self, Callbacks};
use crate::ledger::{Entry, Ledger};
use crate::report::{Report, Tally};

/// How long to send if neither a duration nor a total is given.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);
/// How long after the end a callback that was due before it may still go out. Less than what a busy
/// machine may be late would leave the last ones unsent by chance.
const END_GRACE: Duration = Duration::from_millis(100);
/// A callback that is due after this time, or later, is never due.
const FAR_AWAY: Duration = Duration::from_hours(10 * 365 * 24);
/// How long the pacer may go without looking whether it should stop.
const PACER_STEP: Duration = Duration::from_millis(100);
/// How often the progress bar moves.
const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Sends callbacks until the duration or the total is reached, or until `shutdown`; those under way
/// then still get the time they may take.
///
/// # Errors
/// When the HTTP client or a histogram cannot be made, the ledger cannot be written, or a worker
/// panicked.
pub async fn run(
    config: &config::Load,
    callbacks: &Callbacks,
    authenticity: &Authenticity,
    shutdown: CancellationToken,
) -> anyhow::Result<Report> {
    let sender = Sender::new(callbacks, authenticity.callback_secret.clone())
        .context("cannot build the HTTP client")?;
    // The pacer has a thread to itself, and must not outlive this function however it ends.
    let stop = shutdown.child_token();
    let _stop_at_the_end = stop.clone().drop_guard();
    let start = Instant::now();
    let ledger = match &config.ledger {
        Some(path) => Some(
            Ledger::create(path, start)
                .with_context(|| format!("cannot create the ledger {}", path.display()))?,
        ),
        None => None,
    };
    let run = Arc::new(Run {
        workers: config.connections,
        plan: Plan::new(config, start),
        ids: Ids::new(config, callbacks),
        sender,
        ledger,
        due: Semaphore::new(0),
        next: AtomicU64::new(0),
        sent: AtomicU64::new(0),
        stop,
    });
    let pacing = Arc::clone(&run);
    tokio::task::spawn_blocking(move || pacing.pace());
    let mut workers = JoinSet::new();
    for _ in 0..run.workers {
        workers.spawn(Arc::clone(&run).work());
    }
    let bar = progress_bar();
    let mut redraw = tokio::time::interval(REDRAW_INTERVAL);
    redraw.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut tally = Tally::new()?;
    let mut stop_asked_at = None;
    loop {
        tokio::select! {
            // In this order, so that a stop is seen before the end that it brings about.
            biased;
            () = shutdown.cancelled(), if stop_asked_at.is_none() => {
                stop_asked_at = Some(Instant::now());
            }
            worker = workers.join_next() => match worker {
                Some(worker) => tally.add(&worker.context("a worker died")??)?,
                None => break,
            },
            _ = redraw.tick() => run.draw(&bar),
        }
    }
    bar.finish_and_clear();
    let unsent = run.plan.due_by(stop_asked_at).saturating_sub(tally.sent());
    Ok(tally.report(run.plan.start.elapsed(), config.ids, unsent))
}

/// What the workers share.
struct Run {
    workers: usize,
    plan: Plan,
    ids: Ids,
    sender: Sender,
    ledger: Option<Ledger>,
    /// One permit for each callback that is due and that no worker has taken yet.
    due: Semaphore,
    /// The next callback's number.
    next: AtomicU64,
    sent: AtomicU64,
    stop: CancellationToken,
}

impl Run {
    /// Takes the next callback and sends it, again and again: one at a time, so that it needs no
    /// more than one connection.
    async fn work(self: Arc<Self>) -> anyhow::Result<Tally> {
        let mut tally = Tally::new()?;
        while let Some((number, counts_from)) = self.next_due().await {
            let ids = self.ids.of(number);
            let body = callback::body(ids.iter().copied());
            self.sent.fetch_add(1, Ordering::Relaxed);
            let sent_at = Instant::now();
            let outcome = self.sender.send(body).await;
            let latency = counts_from.elapsed();
            tally.record(&outcome, latency)?;
            if let Some(ledger) = &self.ledger {
                let entry = Entry::new(ledger, counts_from, sent_at, latency, &outcome, ids);
                ledger.write(&entry).context("cannot write the ledger")?;
            }
        }
        Ok(tally)
    }

    /// The number of the callback to send now, and the moment from which its latency counts, or
    /// `None` at the end.
    async fn next_due(&self) -> Option<(u64, Instant)> {
        if self.plan.rate.is_some() {
            tokio::select! {
                permit = self.due.acquire() => permit.ok()?.forget(),
                () = self.stop.cancelled() => {}
            }
        }
        if self.stop.is_cancelled() {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if self.plan.count.is_some_and(|count| number >= count) {
            return None;
        }
        let now = Instant::now();
        if self.plan.last_sending.is_some_and(|last| now >= last) {
            return None;
        }
        Some((number, self.plan.due(number).unwrap_or(now)))
    }

    /// Gives out a permit whenever a callback is due.
    ///
    /// It blocks a thread, because the runtime's timer counts in milliseconds: callbacks would go out
    /// in bunches, and each would seem to have taken a millisecond longer than it has.
    fn pace(&self) {
        let Some(count) = self.plan.count else { return };
        for number in 0..count {
            let Some(due) = self.plan.due(number) else { return };
            loop {
                if self.stop.is_cancelled() {
                    return;
                }
                let wait = due.saturating_duration_since(Instant::now());
                if wait.is_zero() {
                    break;
                }
                std::thread::park_timeout(wait.min(PACER_STEP));
            }
            self.due.add_permits(1);
        }
        // All are out: now each worker may find that there is no further one.
        self.due.add_permits(self.workers);
    }

    fn draw(&self, bar: &ProgressBar) {
        let sent = self.sent.load(Ordering::Relaxed);
        let percent = self.plan.percent(sent, Instant::now());
        bar.set_position(percent);
        bar.set_message(format!("{} sent", HumanCount(sent)));
    }
}

/// When callbacks are due and when it ends.
struct Plan {
    start: Instant,
    rate: Option<f64>,
    /// How many callbacks there are; with a rate there always is such a number.
    count: Option<u64>,
    end: Option<Instant>,
    /// Nothing goes out from here on, although it may have been due.
    last_sending: Option<Instant>,
}

impl Plan {
    fn new(config: &config::Load, start: Instant) -> Self {
        let duration = match (config.duration, config.total) {
            (None, None) => Some(DEFAULT_DURATION),
            (duration, _) => duration,
        };
        let fitting = match (config.rate, duration) {
            (Some(rate), Some(duration)) => Some(whole(duration.as_secs_f64() * rate).max(1)),
            _ => None,
        };
        let count = match (config.total, fitting) {
            (Some(total), Some(fitting)) => Some(total.min(fitting)),
            (total, fitting) => total.or(fitting),
        };
        // An end that no clock can hold is none.
        let end = duration.and_then(|duration| start.checked_add(duration));
        let last_sending = match config.rate {
            Some(_) => end.and_then(|end| end.checked_add(END_GRACE)),
            None => end,
        };
        Self { start, rate: config.rate, count, end, last_sending }
    }

    /// When callback `number` is due; `None` if there is no rate.
    fn due(&self, number: u64) -> Option<Instant> {
        let rate = self.rate?;
        let wait = Duration::try_from_secs_f64(approximate(number) / rate).ok();
        // What no clock can hold is not due within anybody's lifetime.
        Some(wait.and_then(|wait| self.start.checked_add(wait)).unwrap_or(self.start + FAR_AWAY))
    }

    /// How many callbacks were due when it was told to stop, or until its own end.
    fn due_by(&self, stopped_at: Option<Instant>) -> u64 {
        let (Some(rate), Some(count)) = (self.rate, self.count) else { return 0 };
        match stopped_at {
            // The first is due at once, hence one more than the intervals that have passed.
            Some(at) => {
                let intervals = whole(((at - self.start).as_secs_f64() * rate).floor());
                count.min(intervals.saturating_add(1))
            }
            None => count,
        }
    }

    fn percent(&self, sent: u64, now: Instant) -> u64 {
        let of_count = self.count.map_or(0.0, |count| approximate(sent) / approximate(count));
        let of_time = self
            .end
            .map_or(0.0, |end| (now - self.start).as_secs_f64() / (end - self.start).as_secs_f64());
        whole(of_count.max(of_time) * 100.0).min(100)
    }
}

/// Which ids a callback holds.
enum Ids {
    /// Any of the range, repeats allowed.
    Random { count: u32, min: i64, max: i64 },
    /// Counting up, so that each is in one callback only.
    Unique { count: u32, first: i64 },
}

impl Ids {
    fn new(config: &config::Load, callbacks: &Callbacks) -> Self {
        let (count, min) = (config.ids, callbacks.object_id_min);
        if config.unique {
            Self::Unique { count, first: min }
        } else {
            Self::Random { count, min, max: callbacks.object_id_max }
        }
    }

    fn of(&self, number: u64) -> Vec<i64> {
        match *self {
            Self::Random { count, min, max } => {
                let mut random = rand::rng();
                (0..count).map(|_| random.random_range(min..=max)).collect()
            }
            Self::Unique { count, first } => {
                let first = first.wrapping_add_unsigned(number.wrapping_mul(u64::from(count)));
                (0..count).map(|index| first.wrapping_add(i64::from(index))).collect()
            }
        }
    }
}

/// A bar on standard error; it stays hidden if that is no terminal.
fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {percent:>3}%  {elapsed}  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(100).with_style(style)
}

#[expect(clippy::cast_precision_loss, reason = "2^53 callbacks are out of reach")]
fn approximate(number: u64) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is rounded before and never negative; what is above 2^64 becomes the largest"
)]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rate: Option<f64>, duration: Option<u64>, total: Option<u64>) -> Plan {
        let config = config::Load {
            rate,
            duration: duration.map(Duration::from_secs),
            total,
            ids: 1,
            connections: 1,
            unique: false,
            json: false,
            ledger: None,
        };
        Plan::new(&config, Instant::now())
    }

    #[test]
    fn callbacks_are_due_at_equal_distances_from_the_start() {
        let plan = plan(Some(4.0), Some(2), None);
        let due: Vec<_> = (0..3).map(|number| plan.due(number).unwrap() - plan.start).collect();
        assert_eq!(due, [0, 250, 500].map(Duration::from_millis));
    }

    #[test]
    fn it_ends_at_the_duration_or_the_total_whichever_comes_first() {
        assert_eq!(plan(Some(4.0), Some(2), None).count, Some(8));
        assert_eq!(plan(Some(4.0), Some(2), Some(5)).count, Some(5));
        assert_eq!(plan(Some(4.0), Some(2), Some(9)).count, Some(8));
        // Ten seconds, if nothing else is said.
        assert_eq!(plan(Some(4.0), None, None).count, Some(40));
        let fast = plan(None, None, None);
        assert_eq!((fast.count, fast.end), (None, Some(fast.start + DEFAULT_DURATION)));
        // A total is not cut short by a duration that nobody asked for.
        let total = plan(Some(0.5), None, Some(100));
        assert_eq!((total.count, total.end), (Some(100), None));
        // Too slow for even one in the time: one.
        assert_eq!(plan(Some(0.1), Some(1), None).count, Some(1));
    }

    #[test]
    fn what_was_due_when_it_was_stopped_includes_the_first_and_not_the_next() {
        let plan = plan(Some(4.0), Some(2), None);
        let after = |millis| plan.due_by(Some(plan.start + Duration::from_millis(millis)));
        assert_eq!([after(0), after(249), after(250), after(9_000)], [1, 1, 2, 8]);
        assert_eq!(plan.due_by(None), 8);
    }

    // Field case 3.7.
    #[test]
    fn no_rate_however_low_is_too_long_for_the_clock() {
        let plan = plan(Some(f64::MIN_POSITIVE), None, Some(2));
        assert_eq!(plan.due(1), Some(plan.start + FAR_AWAY));
    }
}
