//! What a case measured, and what of it is a breach.

use std::time::Duration;

/// The figures of one row.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// Callbacks answered 2xx within a second of when they were due.
    pub(crate) accepted: usize,
    /// Callbacks answered otherwise, in that time.
    pub(crate) not_2xx: usize,
    /// Callbacks without a complete answer in that time.
    pub(crate) unanswered: usize,
    /// Callbacks that were cut off, or found nobody to connect to, while the case had the producer
    /// killed: there was nobody who could have answered.
    pub(crate) cut_off: usize,
    /// Ids of accepted callbacks of which nothing is known in the end.
    pub(crate) lost: usize,
    /// Ids for which the status API was asked again although it had said what it knew.
    pub(crate) looked_up_twice: usize,
    /// Dead letters in the end.
    pub(crate) dead_letters: usize,
    /// The longest recovery; `None` if it did not recover at all.
    pub(crate) recovery: Option<Duration>,
    /// The longest time from the end of a fault until all that was accepted before it was settled.
    pub(crate) caught_up: Duration,
}

/// How a case ended.
pub(crate) struct Verdict {
    pub(crate) figures: Figures,
    /// Why it has failed, if it has. A case may add what it has seen itself.
    pub(crate) breaches: Vec<String>,
}

/// What the fault of a case excuses. A lost id, a callback without an answer, and a service that
/// ends by itself are excused by nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    /// Answers that are not 2xx, because no durable store is left.
    pub(crate) not_2xx: bool,
    /// Ids that are looked up again, because who had them is gone, or because the broker confirmed
    /// them after they had gone to the spool. A busy machine alone can bring about the latter.
    pub(crate) looked_up_twice: bool,
    /// Dead letters.
    pub(crate) dead_letters: bool,
    /// How long the recovery may take.
    pub(crate) recovery: Duration,
}

impl Allowed {
    /// Nothing: all is answered 2xx, looked up once, and works again within 10 s.
    pub(crate) const NOTHING: Self = Self {
        not_2xx: false,
        looked_up_twice: false,
        dead_letters: false,
        recovery: Duration::from_secs(10),
    };
    /// Only that ids are looked up again.
    pub(crate) const REPEATED_LOOKUPS: Self = Self { looked_up_twice: true, ..Self::NOTHING };
}

impl Figures {
    /// What is not allowed, in words.
    pub(crate) fn breaches(&self, allowed: Allowed) -> Vec<String> {
        let counts = [
            (self.lost, false, "accepted ids are lost"),
            (self.unanswered, false, "callbacks had no answer within a second"),
            (self.not_2xx, allowed.not_2xx, "callbacks were not answered 2xx"),
            (self.looked_up_twice, allowed.looked_up_twice, "ids were looked up twice"),
            (self.dead_letters, allowed.dead_letters, "messages are dead letters"),
        ];
        let breaches = counts.iter().filter(|(count, excused, _)| *count > 0 && !excused);
        let mut breaches: Vec<String> =
            breaches.map(|(count, _, what)| format!("{count} {what}")).collect();
        match self.recovery {
            None => breaches.push("it did not recover".to_owned()),
            Some(took) if took > allowed.recovery => {
                breaches
                    .push(format!("recovery took {took:.1?}, more than {:?}", allowed.recovery));
            }
            Some(_) => {}
        }
        breaches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: Figures = Figures {
        accepted: 1_000,
        not_2xx: 0,
        unanswered: 0,
        cut_off: 3,
        lost: 0,
        looked_up_twice: 0,
        dead_letters: 0,
        recovery: Some(Duration::from_secs(10)),
        caught_up: Duration::from_mins(1),
    };

    #[test]
    fn nonzero_figure_is_a_breach_unless_allowed() {
        assert!(FINE.breaches(Allowed::NOTHING).is_empty());
        let bad = Figures {
            not_2xx: 1,
            unanswered: 2,
            lost: 3,
            looked_up_twice: 4,
            dead_letters: 5,
            recovery: None,
            ..FINE
        };
        assert_eq!(bad.breaches(Allowed::NOTHING).len(), 6);
        let all = Allowed {
            not_2xx: true,
            looked_up_twice: true,
            dead_letters: true,
            ..Allowed::NOTHING
        };
        let breaches = bad.breaches(all);
        assert_eq!(
            breaches,
            [
                "3 accepted ids are lost",
                "2 callbacks had no answer within a second",
                "it did not recover"
            ]
        );
    }

    #[test]
    fn slow_recovery_is_a_breach_unless_allowed() {
        let slow = Figures { recovery: Some(Duration::from_millis(10_100)), ..FINE };
        assert_eq!(slow.breaches(Allowed::NOTHING), ["recovery took 10.1s, more than 10s"]);
        let longer = Allowed { recovery: Duration::from_secs(20), ..Allowed::NOTHING };
        assert!(slow.breaches(longer).is_empty());
    }
}
