//! The time by which a request must be answered.

use std::time::Duration;

use tokio::time::Instant;

/// One deadline for all waits of a request, set on its arrival. Separate timeouts could add up to
/// more than the second that the client waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    budget: Duration,
}

impl Deadline {
    pub(crate) fn new(arrived: Instant, budget: Duration) -> Self {
        Self { at: arrived + budget, budget }
    }

    pub(crate) fn at(self) -> Instant {
        self.at
    }

    pub(crate) fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// The deadline after the body has arrived. A client that needs longer than the budget to send
    /// its body does not give up after a second, so the budget starts again.
    #[must_use]
    pub(crate) fn after_body(self) -> Self {
        let now = Instant::now();
        if now < self.at { self } else { Self::new(now, self.budget) }
    }

    /// The middle of the remaining time: the end of a wait that must leave time for another wait.
    pub(crate) fn halfway(self) -> Instant {
        Instant::now() + self.remaining() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(800);

    #[test]
    fn waits_share_the_budget() {
        let deadline = Deadline::new(Instant::now() - BUDGET * 3 / 4, BUDGET);
        assert!(deadline.remaining() <= BUDGET / 4);
        assert!(deadline.halfway() <= Instant::now() + BUDGET / 8);
        assert_eq!(deadline.after_body().at(), deadline.at());
    }

    #[test]
    fn budget_restarts_after_a_body_that_took_longer() {
        let now = Instant::now();
        let deadline = Deadline::new(now - BUDGET * 2, BUDGET);
        assert_eq!(deadline.remaining(), Duration::ZERO);
        assert!(deadline.after_body().at() >= now + BUDGET);
    }
}
