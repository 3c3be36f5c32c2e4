//! The latest changes, from which subscribers continue after a short interruption.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use messaging::events::Kind;

use crate::groups::EncodedChange;
use crate::object::Object;

const CHANGES_MAX: usize = 16_384;
const BYTES_MAX: usize = 32 << 20;

/// A change, encoded once for all subscribers without a filter.
pub(crate) struct Change {
    /// The number of the change; this viewer numbers its changes from 1.
    pub(crate) sequence: u64,
    pub(crate) content: Content,
    /// The complete server-sent event.
    pub(crate) encoded: Bytes,
}

/// What has changed.
pub(crate) enum Content {
    Objects(Kind, Vec<Object>),
    /// The statuses of groups.
    Groups(Vec<EncodedChange>),
}

/// The ring no longer has the subscriber's next change.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooFarBehind;

#[derive(Default)]
pub(super) struct Ring {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
    /// The number of the latest change.
    last: u64,
}

impl Ring {
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Adds the next change. `encode` gets its number, and returns it with its event.
    pub(super) fn push(&mut self, encode: impl FnOnce(u64) -> (Content, Bytes)) {
        self.last += 1;
        let (content, encoded) = encode(self.last);
        let change = Change { sequence: self.last, content, encoded };
        self.bytes += change.size();
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > CHANGES_MAX || self.bytes > BYTES_MAX {
            let Some(first) = self.changes.pop_front() else { break };
            self.bytes -= first.size();
        }
    }

    /// The change after the one with this number, or `None` if there is none yet.
    pub(super) fn after(&self, sequence: u64) -> Result<Option<Arc<Change>>, TooFarBehind> {
        let behind = self.last.checked_sub(sequence).ok_or(TooFarBehind)?;
        let behind = usize::try_from(behind).map_err(|_| TooFarBehind)?;
        let index = self.changes.len().checked_sub(behind).ok_or(TooFarBehind)?;
        Ok(self.changes.get(index).cloned())
    }
}

impl Change {
    fn size(&self) -> usize {
        let content = match &self.content {
            Content::Objects(_, objects) => objects.len() * size_of::<Object>(),
            // The text of each change is about as long as its part of the event.
            Content::Groups(groups) => {
                self.encoded.len() + groups.len() * size_of::<EncodedChange>()
            }
        };
        self.encoded.len() + content + size_of::<Self>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(ring: &mut Ring, bytes: usize) {
        let content = Content::Objects(Kind::Seen, Vec::new());
        ring.push(|_| (content, Bytes::from(vec![0; bytes])));
    }

    fn next(ring: &Ring, after: u64) -> Result<Option<u64>, TooFarBehind> {
        Ok(ring.after(after)?.map(|change| change.sequence))
    }

    #[test]
    fn each_change_after_a_number_is_found_once() {
        let mut ring = Ring::default();
        assert_eq!(next(&ring, 0), Ok(None));
        for _ in 0..5 {
            push(&mut ring, 10);
        }
        assert_eq!([0, 3, 5].map(|after| next(&ring, after).unwrap()), [Some(1), Some(4), None]);
        assert_eq!(next(&ring, 6), Err(TooFarBehind), "a number from the future");
    }

    #[test]
    fn ring_is_bounded_by_count_and_by_bytes() {
        let mut ring = Ring::default();
        for _ in 0..20_000 {
            push(&mut ring, 10);
        }
        assert_eq!(next(&ring, 20_000 - CHANGES_MAX as u64 - 1), Err(TooFarBehind));
        assert!(next(&ring, 20_000 - CHANGES_MAX as u64).is_ok());
        for _ in 0..100 {
            push(&mut ring, BYTES_MAX / 10);
        }
        assert!(ring.bytes <= BYTES_MAX && ring.changes.len() < 11);
    }
}
