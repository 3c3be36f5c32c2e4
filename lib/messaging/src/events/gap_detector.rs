//! Detects missing messages by their sequence numbers.

use std::collections::HashMap;

use uuid::Uuid;

/// The detector forgets all sources when it would exceed this number. Each start of a process adds
/// a source.
const SOURCES_MAX: usize = 1_000;

/// The number of the last message from each source.
#[derive(Default)]
pub(crate) struct GapDetector(HashMap<Uuid, u64>);

impl GapDetector {
    /// Records a message. Returns false if messages of its source are missing before it.
    ///
    /// If the first message from a source does not have number 1, earlier messages count as
    /// missing. They may have been published before the subscription began, but the detector cannot
    /// know that.
    pub(crate) fn record(&mut self, source: Uuid, sequence: u64) -> bool {
        if self.0.len() >= SOURCES_MAX && !self.0.contains_key(&source) {
            self.0.clear();
        }
        let previous = self.0.insert(source, sequence).unwrap_or(0);
        sequence == previous.wrapping_add(1)
    }

    pub(crate) fn forget(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_number_is_detected_once_for_each_source() {
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut gaps = GapDetector::default();
        assert!(gaps.record(one, 1) && gaps.record(other, 1));
        assert!(gaps.record(one, 2));
        assert!(!gaps.record(one, 4));
        assert!(gaps.record(one, 5) && gaps.record(other, 2));
    }

    #[test]
    fn source_that_begins_after_1_has_a_gap() {
        let mut gaps = GapDetector::default();
        assert!(!gaps.record(Uuid::from_u128(1), 3));
        assert!(gaps.record(Uuid::from_u128(1), 4));
    }

    #[test]
    fn number_of_sources_is_bounded() {
        let mut gaps = GapDetector::default();
        for source in 0..5_000 {
            assert!(gaps.record(Uuid::from_u128(source), 1));
            assert!(gaps.0.len() <= SOURCES_MAX);
        }
    }
}
