//! The latest changes, for subscribers that were away for a moment.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use events::Kind;

use super::Sighted;

const MESSAGES_MAX: usize = 16_384;
const BYTES_MAX: usize = 32 << 20;

/// A change as all subscribers that follow everything get it: encoded once.
pub(crate) struct Message {
    /// Its number among all changes of this viewer.
    pub(crate) sequence: u64,
    pub(crate) kind: Kind,
    pub(crate) objects: Vec<Sighted>,
    /// The whole event.
    pub(crate) encoded: Bytes,
}

/// The subscriber is further behind than the ring reaches.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooFarBehind;

#[derive(Default)]
pub(super) struct Ring {
    messages: VecDeque<Arc<Message>>,
    bytes: usize,
    /// The number of the latest.
    last: u64,
}

impl Ring {
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Adds the next change, which `encode` writes with its number.
    pub(super) fn push(
        &mut self,
        kind: Kind,
        objects: Vec<Sighted>,
        encode: impl FnOnce(u64, &[Sighted]) -> Bytes,
    ) {
        self.last += 1;
        let encoded = encode(self.last, &objects);
        let message = Message { sequence: self.last, kind, objects, encoded };
        self.bytes += message.size();
        self.messages.push_back(Arc::new(message));
        while self.messages.len() > MESSAGES_MAX || self.bytes > BYTES_MAX {
            let Some(first) = self.messages.pop_front() else { break };
            self.bytes -= first.size();
        }
    }

    /// The change after the one with this number; none if there is none yet.
    pub(super) fn after(&self, sequence: u64) -> Result<Option<Arc<Message>>, TooFarBehind> {
        let behind = self.last.checked_sub(sequence).ok_or(TooFarBehind)?;
        let behind = usize::try_from(behind).map_err(|_| TooFarBehind)?;
        let place = self.messages.len().checked_sub(behind).ok_or(TooFarBehind)?;
        Ok(self.messages.get(place).cloned())
    }
}

impl Message {
    fn size(&self) -> usize {
        self.encoded.len() + self.objects.len() * size_of::<Sighted>() + size_of::<Self>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(ring: &mut Ring, bytes: usize) {
        ring.push(Kind::Seen, Vec::new(), |_, _| Bytes::from(vec![0; bytes]));
    }

    fn next(ring: &Ring, after: u64) -> Result<Option<u64>, TooFarBehind> {
        Ok(ring.after(after)?.map(|message| message.sequence))
    }

    #[test]
    fn each_change_after_a_number_is_found_once() {
        let mut ring = Ring::default();
        assert_eq!(next(&ring, 0), Ok(None));
        for _ in 0..5 {
            push(&mut ring, 10);
        }
        assert_eq!([0, 3, 5].map(|after| next(&ring, after).unwrap()), [Some(1), Some(4), None]);
        assert_eq!(next(&ring, 6), Err(TooFarBehind), "a number that was never given");
    }

    #[test]
    fn the_ring_is_bounded_by_count_and_by_bytes() {
        let mut ring = Ring::default();
        for _ in 0..20_000 {
            push(&mut ring, 10);
        }
        assert_eq!(next(&ring, 20_000 - MESSAGES_MAX as u64 - 1), Err(TooFarBehind));
        assert!(next(&ring, 20_000 - MESSAGES_MAX as u64).is_ok());
        for _ in 0..100 {
            push(&mut ring, BYTES_MAX / 10);
        }
        assert!(ring.bytes <= BYTES_MAX && ring.messages.len() < 11);
    }
}
