//! What a message carries along from where it comes from.

/// Where messages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin<'a> {
    /// The callback that names the objects.
    pub callback_id: &'a str,
    /// The span in which they are published (W3C Trace Context), if traces are taken.
    pub traceparent: Option<&'a str>,
}

impl<'a> From<&'a str> for Origin<'a> {
    /// A callback of which no trace is taken.
    fn from(callback_id: &'a str) -> Self {
        Self { callback_id, traceparent: None }
    }
}

impl<'a> Origin<'a> {
    /// The form that it has in a file: the id, and behind a space the span, if there is one. Both in one
    /// column, because those who know of no spans have no other.
    pub(crate) fn to_text(self) -> String {
        match self.traceparent {
            None => self.callback_id.to_owned(),
            Some(traceparent) => format!("{} {traceparent}", self.callback_id),
        }
    }

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
    fn what_stands_in_a_file_is_read_back_also_from_before_there_were_spans() {
        let traced = Origin { callback_id: "callback-1", traceparent: Some("00-1-2-01") };
        for origin in [traced, "callback-1".into(), "".into()] {
            assert_eq!(Origin::from_text(&origin.to_text()), origin);
        }
        assert_eq!(Origin::from("callback-1").to_text(), "callback-1");
    }
}
