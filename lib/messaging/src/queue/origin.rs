//! The origin of a message: its callback and the span that published it.

/// The callback and the span that messages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin<'a> {
    /// The id of the callback.
    pub callback_id: &'a str,
    /// The span that publishes the messages (W3C Trace Context), if traces are enabled.
    pub traceparent: Option<&'a str>,
}

impl<'a> From<&'a str> for Origin<'a> {
    /// A callback without a trace.
    fn from(callback_id: &'a str) -> Self {
        Self { callback_id, traceparent: None }
    }
}

impl<'a> Origin<'a> {
    /// Encodes the origin for a queue in a file: the id, followed by a space and the span, if there
    /// is one. Both are in one column, because older versions of the file have no column for the
    /// span.
    pub(crate) fn to_text(self) -> String {
        match self.traceparent {
            None => self.callback_id.to_owned(),
            Some(traceparent) => format!("{} {traceparent}", self.callback_id),
        }
    }

    /// Decodes the result of [`Origin::to_text`].
    pub(crate) fn from_text(text: &'a str) -> Self {
        match text.split_once(' ') {
            None => text.into(),
            Some((callback_id, traceparent)) => {
                Self { callback_id, traceparent: Some(traceparent) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_in_a_file_is_decoded_with_or_without_a_span() {
        let traced = Origin { callback_id: "callback-1", traceparent: Some("00-1-2-01") };
        for origin in [traced, "callback-1".into(), "".into()] {
            assert_eq!(Origin::from_text(&origin.to_text()), origin);
        }
        assert_eq!(Origin::from("callback-1").to_text(), "callback-1");
    }
}
