//! The figures that a case measures, and the check for breaches.

use std::time::Duration;

/// The figures of one case, which form a row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// Callbacks with a 2xx response within a second of their due time.
    pub(crate) accepted: usize,
    /// Callbacks with another response in that time.
    pub(crate) not_2xx: usize,
    /// Callbacks without a complete response in that time.
    pub(crate) unanswered: usize,
    /// Callbacks whose connection was refused or broke while the case had killed the producer, so
    /// that no process could respond.
    pub(crate) cut_off: usize,
    /// Ids of accepted callbacks that were neither settled nor became dead letters.
    pub(crate) lost: usize,
    /// Ids that were looked up again after the status API had said online or offline.
    pub(crate) looked_up_twice: usize,
    pub(crate) dead_letters: usize,
    /// The longest recovery; `None` if the system did not recover.
    pub(crate) recovery: Option<Duration>,
    /// The longest time from the end of a fault until all ids accepted before it were settled.
    pub(crate) caught_up: Duration,
}

/// The result of a case, which has failed if there are breaches.
pub(crate) struct Verdict {
    pub(crate) figures: Figures,
    /// The reasons why the case failed.
    pub(crate) breaches: Vec<String>,
}

impl Verdict {
    /// Adds `breach` unless `holds`. Checks a condition that belongs to this case alone.
    pub(crate) fn require(&mut self, holds: bool, breach: impl Into<String>) {
        if !holds {
            self.breaches.push(breach.into());
        }
    }
}

/// The effects that the fault of a case excuses. A lost id, a callback without a response, and a
/// service that ends on its own are never excused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    /// Responses other than 2xx, because no durable store is left.
    pub(crate) not_2xx: bool,
    /// Repeated lookups of an id, because the process that handled its message has ended, or
    /// because the producer had spooled the message before the broker confirmed it. A late confirm
    /// is also possible without a fault, on a busy machine.
    pub(crate) looked_up_twice: bool,
    pub(crate) dead_letters: bool,
    pub(crate) recovery: Duration,
}

impl Allowed {
    /// Excuses nothing: every callback is answered 2xx, every id is looked up once, and recovery
    /// takes at most 10 s.
    pub(crate) const NOTHING: Self = Self {
        not_2xx: false,
        looked_up_twice: false,
        dead_letters: false,
        recovery: Duration::from_secs(10),
    };
    /// Excuses only repeated lookups.
    pub(crate) const REPEATED_LOOKUPS: Self = Self { looked_up_twice: true, ..Self::NOTHING };
}

impl Figures {
    /// The figures that are not allowed, in words.
    pub(crate) fn breaches(&self, allowed: Allowed) -> Vec<String> {
        let counts = [
            (self.lost, false, "accepted ids are lost"),
            (self.unanswered, false, "callbacks had no response within a second"),
            (self.not_2xx, allowed.not_2xx, "callbacks were not answered 2xx"),
            (self.looked_up_twice, allowed.looked_up_twice, "ids were looked up twice"),
            (self.dead_letters, allowed.dead_letters, "messages are dead letters"),
        ];
        let breaches = counts.iter().filter(|(count, excused, _)| *count > 0 && !excused);
        let mut breaches: Vec<String> =
            breaches.map(|(count, _, what)| format!("{count} {what}")).collect();
        match self.recovery {
            None => breaches.push("the system did not recover".to_owned()),
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
                "2 callbacks had no response within a second",
                "the system did not recover"
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
