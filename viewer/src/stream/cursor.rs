//! The position of a subscriber in the stream.

use messaging::events::Kind;

use crate::object::Object;
use crate::view_state::ViewState;

/// The position of a subscriber in the list of objects and in the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The subscriber has all changes of listed objects up to this number.
    pub(super) sequence: u64,
    /// The change number in the latest event id that was sent to the subscriber.
    pub(super) sent_sequence: u64,
    /// The lowest id that is not listed yet; the subscriber gets no changes of objects from this id
    /// on. `None` if all objects are listed.
    pub(super) next_id: Option<i64>,
    /// The number of listed objects that are online.
    pub(super) online: usize,
    pub(super) listing: Listing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Listing {
    /// Nothing is listed yet. The first part replaces all that the subscriber knows.
    First,
    /// Further objects must be listed.
    Further,
    /// All objects are listed, or as many as the limit allows.
    Done,
}

impl Cursor {
    pub(super) fn new(sequence: u64) -> Self {
        let (next_id, listing) = (Some(i64::MIN), Listing::First);
        Self { sequence, sent_sequence: sequence, next_id, online: 0, listing }
    }

    /// Resumes after an event. `rest` is the text after the change number in its event id, and
    /// `online` the number of objects that are online.
    pub(super) fn resume(sequence: u64, rest: &str, online: usize, limit: usize) -> Option<Self> {
        let (next_id, online) = match rest {
            "" => (None, online),
            rest => {
                // The id may be negative, so its sign is not the separator.
                let (next_id, online) = rest.rsplit_once('-')?;
                (Some(next_id.parse().ok()?), online.parse().ok()?)
            }
        };
        let is_done = next_id.is_none() || online >= limit;
        let listing = if is_done { Listing::Done } else { Listing::Further };
        Some(Self { sequence, sent_sequence: sequence, next_id, online, listing })
    }

    /// The id of an event at this cursor. The subscriber can resume after the event with this id.
    pub(super) fn event_id(&self, view: &ViewState) -> String {
        let event_id = view.event_id(self.sequence);
        match self.next_id {
            None => event_id,
            Some(next_id) => format!("{event_id}-{next_id}-{}", self.online),
        }
    }

    /// The value of the field `remaining`: whether the list of objects continues.
    pub(super) fn remaining(&self) -> &'static str {
        match (self.next_id, self.listing) {
            (None, _) => "none",
            (Some(_), Listing::Done) => "over_limit",
            (Some(_), Listing::First | Listing::Further) => "follow",
        }
    }

    /// The changed objects that the subscriber must get.
    pub(super) fn select(&self, objects: &[Object], ids: Option<&[i64]>) -> Vec<Object> {
        let is_listed = |object: &&Object| self.next_id.is_none_or(|next| object.id < next);
        let is_requested =
            |object: &&Object| ids.is_none_or(|ids| ids.binary_search(&object.id).is_ok());
        objects.iter().filter(is_listed).filter(is_requested).copied().collect()
    }

    /// Updates the number of listed objects that are online.
    pub(super) fn update_online(&mut self, kind: Kind, objects: usize) {
        self.online = match kind {
            Kind::Online => self.online.saturating_add(objects),
            Kind::Gone => self.online.saturating_sub(objects),
            Kind::Seen => self.online,
        };
    }

    /// Lists further objects once the listed ones are a quarter below the limit, and starts a new
    /// snapshot once they are a quarter above it.
    pub(super) fn adjust_to_limit(&mut self, limit: usize) {
        let quarter = limit / 4;
        if self.online > limit.saturating_add(quarter) {
            *self = Self::new(self.sequence);
        } else if self.next_id.is_some() && self.online < limit - quarter {
            self.listing = Listing::Further;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_event_ids_are_not_resumed() {
        for rest in ["-", "1", "1-", "x-1", "1--1", "9223372036854775808-1", "1-1-"] {
            assert_eq!(Cursor::resume(1, rest, 0, 10), None, "{rest}");
        }
        let negative = Cursor::resume(1, "-5-3", 0, 10).unwrap();
        assert_eq!((negative.next_id, negative.online), (Some(-5), 3));
    }
}
