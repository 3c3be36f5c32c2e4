//! The load generator sends callbacks at a rate, or as fast as they are answered.
//!
//! With a rate, the load generator is an open loop. Callback `k` is due at `k / rate` regardless of
//! earlier callbacks. Its latency counts from that time, even if it was sent late because all
//! connections were busy. Latency counted from sending would leave out the time in which the
//! endpoint was slowest ("coordinated omission").

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use rand::RngExt as _;
use runtime::CancellationToken;
use runtime::authenticity::Authenticity;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::callback::{self, Sender};
use crate::config::{self, Callbacks};
use crate::ledger::{Entry, Ledger};
use crate::report::{Report, Tally, approximate};

/// The duration of a run if neither a duration nor a total is given.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);
/// For this time after the end of a run, callbacks that were due before the end may still be sent,
/// because a busy machine may send the last ones somewhat late.
const END_GRACE: Duration = Duration::from_millis(100);
/// Stands for a due time that the clock cannot represent. No run lasts that long.
const FAR_FUTURE: Duration = Duration::from_hours(10 * 365 * 24);
/// The pacer ([`Run::pace`]) checks at least this often whether it must stop.
const PACER_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// The interval at which the progress bar is redrawn.
const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Sends callbacks until the duration or the total is reached, or until `shutdown`. Callbacks in
/// flight then still wait for their responses.
///
/// # Errors
/// When the HTTP client or a histogram cannot be created, the ledger cannot be written, or a worker
/// panics.
pub async fn run(
    config: &config::Load,
    callbacks: &Callbacks,
    authenticity: &Authenticity,
    shutdown: CancellationToken,
) -> anyhow::Result<Report> {
    let sender = Sender::new(callbacks, authenticity.callback_secret.clone())
        .context("cannot build the HTTP client")?;
    // The pacer runs on its own thread, which must stop however this function ends.
    let stop = shutdown.child_token();
    let _stop_on_return = stop.clone().drop_guard();
    let start = Instant::now();
    let ledger = config.ledger.as_ref().map(|path| {
        let ledger = Ledger::create(path, start);
        ledger.with_context(|| format!("cannot create the ledger {}", path.display()))
    });
    let run = Arc::new(Run {
        workers: config.connections,
        plan: Plan::new(config, start),
        ids: Ids::new(config, callbacks),
        sender,
        ledger: ledger.transpose()?,
        due: Semaphore::new(0),
        next: AtomicU64::new(0),
        sent: AtomicU64::new(0),
        stop,
    });
    let pacer = Arc::clone(&run);
    tokio::task::spawn_blocking(move || pacer.pace());
    let mut workers = JoinSet::new();
    for _ in 0..run.workers {
        workers.spawn(Arc::clone(&run).work());
    }
    let bar = progress_bar();
    let mut redraw = tokio::time::interval(REDRAW_INTERVAL);
    redraw.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut tally = Tally::new()?;
    let mut shutdown_at = None;
    loop {
        tokio::select! {
            // In this order, because the workers end soon after a shutdown, and the loop must
            // record the shutdown first.
            biased;
            () = shutdown.cancelled(), if shutdown_at.is_none() => {
                shutdown_at = Some(Instant::now());
            }
            worker = workers.join_next() => match worker {
                Some(worker) => tally.add(&worker.context("a worker panicked")??)?,
                None => break,
            },
            _ = redraw.tick() => run.draw(&bar),
        }
    }
    bar.finish_and_clear();
    let unsent = run.plan.due_by(shutdown_at).saturating_sub(tally.sent);
    Ok(tally.report(run.plan.start.elapsed(), config.ids, unsent))
}

/// The state that all workers share.
struct Run {
    workers: usize,
    plan: Plan,
    ids: Ids,
    sender: Sender,
    ledger: Option<Ledger>,
    /// One permit for each callback that is due and not taken by a worker yet.
    due: Semaphore,
    /// The number of the next callback.
    next: AtomicU64,
    sent: AtomicU64,
    stop: CancellationToken,
}

impl Run {
    /// Sends one callback after another, so that each worker needs only one connection.
    async fn work(self: Arc<Self>) -> anyhow::Result<Tally> {
        let mut tally = Tally::new()?;
        while let Some((number, latency_start)) = self.next_due().await {
            let ids = self.ids.of_callback(number);
            let body = callback::body(ids.iter().copied());
            self.sent.fetch_add(1, Ordering::Relaxed);
            let sent_at = Instant::now();
            let outcome = self.sender.send(body).await;
            let latency = latency_start.elapsed();
            tally.record(&outcome, latency)?;
            if let Some(ledger) = &self.ledger {
                let entry = Entry::new(ledger, latency_start, sent_at, latency, &outcome, ids);
                ledger.write(&entry).context("cannot write the ledger")?;
            }
        }
        Ok(tally)
    }

    /// Waits until a callback is due. Returns its number and the moment from which its latency
    /// counts, or `None` at the end.
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
        if self.plan.send_until.is_some_and(|until| now >= until) {
            return None;
        }
        Some((number, self.plan.due(number).unwrap_or(now)))
    }

    /// Adds a permit whenever a callback is due.
    ///
    /// Blocks a thread, because the runtime's timer has a resolution of a millisecond: with the
    /// timer, callbacks would be sent in bunches, and each latency would be up to a millisecond too
    /// high.
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
                std::thread::park_timeout(wait.min(PACER_CHECK_INTERVAL));
            }
            self.due.add_permits(1);
        }
        // All callbacks are due: wake each worker, so that it ends when none is left.
        self.due.add_permits(self.workers);
    }

    fn draw(&self, bar: &ProgressBar) {
        let sent = self.sent.load(Ordering::Relaxed);
        let percent = self.plan.percent(sent, Instant::now());
        bar.set_position(percent);
        bar.set_message(format!("{} sent", HumanCount(sent)));
    }
}

struct Plan {
    start: Instant,
    rate: Option<f64>,
    /// The number of callbacks to send; always known if there is a rate.
    count: Option<u64>,
    end: Option<Instant>,
    /// From this moment on no callback is sent, even if it was due.
    send_until: Option<Instant>,
}

impl Plan {
    fn new(config: &config::Load, start: Instant) -> Self {
        let duration = match (config.duration, config.total) {
            (None, None) => Some(DEFAULT_DURATION),
            (duration, _) => duration,
        };
        let count_in_duration = match (config.rate, duration) {
            (Some(rate), Some(duration)) => Some(round(duration.as_secs_f64() * rate).max(1)),
            _ => None,
        };
        let count = match (config.total, count_in_duration) {
            (Some(total), Some(count_in_duration)) => Some(total.min(count_in_duration)),
            (total, count_in_duration) => total.or(count_in_duration),
        };
        // An end that the clock cannot represent counts as no end.
        let end = duration.and_then(|duration| start.checked_add(duration));
        let send_until = match config.rate {
            Some(_) => end.and_then(|end| end.checked_add(END_GRACE)),
            None => end,
        };
        Self { start, rate: config.rate, count, end, send_until }
    }

    /// When callback `number` is due; `None` if there is no rate.
    fn due(&self, number: u64) -> Option<Instant> {
        let rate = self.rate?;
        let wait = Duration::try_from_secs_f64(approximate(number) / rate).ok();
        // A time that the clock cannot represent is far in the future.
        Some(wait.and_then(|wait| self.start.checked_add(wait)).unwrap_or(self.start + FAR_FUTURE))
    }

    /// The number of callbacks that were due by the shutdown, or else by the end of the run.
    fn due_by(&self, shutdown_at: Option<Instant>) -> u64 {
        let (Some(rate), Some(count)) = (self.rate, self.count) else { return 0 };
        match shutdown_at {
            // The first callback is due at the start, so `n + 1` are due after `n` intervals.
            Some(at) => {
                let intervals = round(((at - self.start).as_secs_f64() * rate).floor());
                count.min(intervals.saturating_add(1))
            }
            None => count,
        }
    }

    fn percent(&self, sent: u64, now: Instant) -> u64 {
        let share_sent = self.count.map_or(0.0, |count| approximate(sent) / approximate(count));
        let share_elapsed = self
            .end
            .map_or(0.0, |end| (now - self.start).as_secs_f64() / (end - self.start).as_secs_f64());
        round(share_sent.max(share_elapsed) * 100.0).min(100)
    }
}

/// Chooses the ids of a callback.
enum Ids {
    /// Random ids from `min` to `max`, which may repeat.
    Random { count: u32, min: i64, max: i64 },
    /// Ids that count up from `first`, so that each id is in one callback only.
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

    fn of_callback(&self, number: u64) -> Vec<i64> {
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

/// A progress bar on standard error, hidden if standard error is not a terminal.
fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {percent:>3}%  {elapsed}  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(100).with_style(style)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the number is rounded and never negative; one above 2^64 becomes the maximum"
)]
fn round(number: f64) -> u64 {
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
    fn callbacks_are_due_at_equal_intervals() {
        let plan = plan(Some(4.0), Some(2), None);
        let due: Vec<_> = (0..3).map(|number| plan.due(number).unwrap() - plan.start).collect();
        assert_eq!(due, [0, 250, 500].map(Duration::from_millis));
    }

    #[test]
    fn run_ends_at_its_duration_or_total_whichever_is_first() {
        assert_eq!(plan(Some(4.0), Some(2), None).count, Some(8));
        assert_eq!(plan(Some(4.0), Some(2), Some(5)).count, Some(5));
        assert_eq!(plan(Some(4.0), Some(2), Some(9)).count, Some(8));
        // Without duration and total, a run lasts ten seconds.
        assert_eq!(plan(Some(4.0), None, None).count, Some(40));
        let fast = plan(None, None, None);
        assert_eq!((fast.count, fast.end), (None, Some(fast.start + DEFAULT_DURATION)));
        // The default duration does not end a run with a total.
        let total = plan(Some(0.5), None, Some(100));
        assert_eq!((total.count, total.end), (Some(100), None));
        // Even a rate that is too slow for one callback in the duration sends one.
        assert_eq!(plan(Some(0.1), Some(1), None).count, Some(1));
    }

    #[test]
    fn callbacks_due_at_shutdown_exclude_the_next_one() {
        let plan = plan(Some(4.0), Some(2), None);
        let after = |millis| plan.due_by(Some(plan.start + Duration::from_millis(millis)));
        assert_eq!([after(0), after(249), after(250), after(9_000)], [1, 1, 2, 8]);
        assert_eq!(plan.due_by(None), 8);
    }

    // Field case 3.7.
    #[test]
    fn lowest_rate_does_not_overflow_the_clock() {
        let plan = plan(Some(f64::MIN_POSITIVE), None, Some(2));
        assert_eq!(plan.due(1), Some(plan.start + FAR_FUTURE));
    }
}
