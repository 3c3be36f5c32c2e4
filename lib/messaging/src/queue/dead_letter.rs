//! A dead letter, and the actions of an operator on selected dead letters.

use std::time::SystemTime;

/// A message that was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The object; `None` if the body cannot be decoded.
    pub id: Option<i64>,
    /// The message as it was published.
    pub body: Vec<u8>,
    /// The callback that named the object; empty for a message of the Go producer.
    pub callback_id: String,
    /// Why the message was given up.
    pub reason: String,
    /// The number of failed attempts.
    pub attempts: u32,
    /// When the message was published, to the second.
    pub published_at: Option<SystemTime>,
    /// When the first attempt failed.
    pub first_failed_at: Option<SystemTime>,
    /// When the last attempt failed.
    pub last_failed_at: Option<SystemTime>,
}

/// Selects the dead letters that match all criteria. The default selects every dead letter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Ids of objects; empty selects all.
    pub ids: Vec<i64>,
    /// A text that the reason contains.
    pub reason: Option<String>,
}

/// What to do with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterAction {
    /// List them and leave them as they are.
    List,
    /// Send them back to the end of the queue, as if they had just been published.
    Redrive,
    /// Delete them.
    Purge,
}

impl Selection {
    /// Whether `letter` matches all criteria.
    #[must_use]
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let matches_id = self.ids.is_empty() || letter.id.is_some_and(|id| self.ids.contains(&id));
        matches_id && self.reason.as_ref().is_none_or(|reason| letter.reason.contains(reason))
    }
}
