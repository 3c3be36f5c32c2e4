//! Noticing that a message is missing.

use std::collections::HashMap;

use uuid::Uuid;

/// Each start of a process is a source more; beyond these, all are forgotten.
const SOURCES_MAX: usize = 1_000;

/// The number of the last message of each source.
#[derive(Default)]
pub(crate) struct Sources(HashMap<Uuid, u64>);

impl Sources {
    /// Notes a message, and says whether none of its source is missing before it.
    ///
    /// Of a source that was not heard of, all but the first of its messages have been missed: maybe
    /// before there was anybody to hear them, but that cannot be told from here.
    pub(crate) fn follows(&mut self, source: Uuid, sequence: u64) -> bool {
        if self.0.len() >= SOURCES_MAX && !self.0.contains_key(&source) {
            self.0.clear();
        }
        let before = self.0.insert(source, sequence).unwrap_or(0);
        sequence == before.wrapping_add(1)
    }

    pub(crate) fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_missing_is_noticed_once_and_for_each_source() {
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut sources = Sources::default();
        assert!(sources.follows(one, 1) && sources.follows(other, 1));
        assert!(sources.follows(one, 2));
        assert!(!sources.follows(one, 4));
        assert!(sources.follows(one, 5) && sources.follows(other, 2));
    }

    #[test]
    fn a_source_that_begins_in_the_middle_has_told_what_nobody_heard() {
        let mut sources = Sources::default();
        assert!(!sources.follows(Uuid::from_u128(1), 3));
        assert!(sources.follows(Uuid::from_u128(1), 4));
    }

    #[test]
    fn there_are_never_more_than_a_bounded_number_of_them() {
        let mut sources = Sources::default();
        for source in 0..5_000 {
            assert!(sources.follows(Uuid::from_u128(source), 1));
            assert!(sources.0.len() <= SOURCES_MAX);
        }
    }
}
