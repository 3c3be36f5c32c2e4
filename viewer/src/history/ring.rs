//! The latest changes, from which all subscribers of the feed are served.

use std::collections::VecDeque;
use std::fmt::Write as _;

use bytes::{Bytes, BytesMut};
use store::Change;

use super::{name, text};

/// Maximum number of changes in the ring, about 1 MB.
pub(super) const CHANGES_MAX: usize = 4_096;
/// Maximum number of changes in a block. A slow subscriber holds one block, about 10 KB, in
/// addition to the buffers of its connection.
pub(super) const BLOCK_CHANGES: usize = 64;

#[derive(Default)]
pub(super) struct Ring {
    /// The ring has all changes after this position up to its last one; `None` if it has none.
    start: Option<i64>,
    changes: VecDeque<(i64, Bytes)>,
}

/// Consecutive changes as server-sent events.
#[derive(Default)]
pub(super) struct Block {
    pub(super) events: Bytes,
    /// The position of the last change; `None` if the block is empty.
    pub(super) last: Option<i64>,
}

impl Ring {
    pub(super) fn starting_at(position: i64) -> Self {
        Self { start: Some(position), changes: VecDeque::new() }
    }

    /// Adds the changes that follow the last one.
    pub(super) fn extend(&mut self, changes: &[Change]) {
        for change in changes {
            if self.changes.len() == CHANGES_MAX {
                self.start = self.changes.pop_front().map(|(position, _)| position);
            }
            self.changes.push_back((change.position, encode(change)));
        }
    }

    /// Whether the ring has all changes after `position` that are known.
    pub(super) fn covers(&self, position: i64) -> bool {
        let last = self.changes.back().map(|(last, _)| *last).or(self.start);
        self.start.is_some_and(|start| start <= position)
            && last.is_some_and(|last| position <= last)
    }

    /// The next changes after `position`; `None` if the ring does not have all of them.
    pub(super) fn after(&self, position: i64) -> Option<Block> {
        let index = self.changes.partition_point(|(change, _)| *change <= position);
        self.covers(position).then(|| Block::new(self.changes.range(index..)))
    }
}

impl Block {
    pub(super) fn of(changes: &[Change]) -> Self {
        let encoded: Vec<_> =
            changes.iter().map(|change| (change.position, encode(change))).collect();
        Self::new(encoded.iter())
    }

    /// The first [`BLOCK_CHANGES`] of these changes.
    fn new<'a>(changes: impl Iterator<Item = &'a (i64, Bytes)>) -> Self {
        let mut events = BytesMut::new();
        let mut last = None;
        for (position, event) in changes.take(BLOCK_CHANGES) {
            events.extend_from_slice(event);
            last = Some(*position);
        }
        Self { events: events.freeze(), last }
    }
}

fn encode(change: &Change) -> Bytes {
    let Change { position, id, presence, at, last_seen } = *change;
    let (kind, at, last_seen) = (name(presence), text(at), text(last_seen));
    let mut event = String::with_capacity(160);
    // Writing to a string cannot fail.
    let _ = write!(
        event,
        "event: {kind}\nid: {position}\n\
         data: {{\"id\":\"{id}\",\"at\":\"{at}\",\"last_seen\":\"{last_seen}\"}}\n\n"
    );
    event.shrink_to_fit();
    Bytes::from(event)
}

#[cfg(test)]
mod tests {
    use store::{Moment, Presence};

    use super::*;

    fn change(position: i64) -> Change {
        let at = Moment::from_micros(position);
        Change { position, id: -position, presence: Presence::Online, at, last_seen: at }
    }

    /// The positions of the changes after `position`, block by block.
    fn positions(ring: &Ring, mut position: i64) -> Option<Vec<i64>> {
        let mut found = Vec::new();
        loop {
            let block = ring.after(position)?;
            let events = String::from_utf8(block.events.to_vec()).unwrap();
            let ids = events.lines().filter_map(|line| line.strip_prefix("id: "));
            found.extend(ids.map(|id| id.parse::<i64>().unwrap()));
            assert_eq!(block.last.or(Some(position)), found.last().copied().or(Some(position)));
            let Some(last) = block.last else { return Some(found) };
            position = last;
        }
    }

    #[test]
    fn ring_has_exactly_the_latest_changes() {
        let mut ring = Ring::default();
        assert_eq!(positions(&ring, 0), None);
        ring = Ring::starting_at(10);
        assert_eq!([9, 10, 11].map(|after| positions(&ring, after)), [None, Some(vec![]), None]);
        let added = i64::try_from(2 * CHANGES_MAX).unwrap();
        // Every second position was rolled back.
        for position in 1..=added {
            ring.extend(&[change(10 + 2 * position)]);
        }
        let last = 10 + 2 * added;
        let start = last - added;
        let expected: Vec<i64> = (start + 2..=last).step_by(2).collect();
        assert_eq!(positions(&ring, start), Some(expected.clone()));
        assert_eq!(positions(&ring, start + 1), Some(expected));
        assert_eq!(positions(&ring, start - 1), None);
        assert_eq!(positions(&ring, last - 2), Some(vec![last]));
        assert_eq!(positions(&ring, last), Some(vec![]));
        assert_eq!(positions(&ring, last + 1), None, "a position of another viewer");
    }

    #[test]
    fn event_has_the_cursor_as_its_id() {
        let block = Block::of(&[Change { id: i64::MIN, ..change(7) }]);
        let event = "event: online\nid: 7\ndata: {\"id\":\"-9223372036854775808\",\
                     \"at\":\"1970-01-01T00:00:00.000007Z\",\
                     \"last_seen\":\"1970-01-01T00:00:00.000007Z\"}\n\n";
        assert_eq!((block.events.as_ref(), block.last), (event.as_bytes(), Some(7)));
    }
}
