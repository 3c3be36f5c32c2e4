//! The values of fields: rules and ids.

use std::time::Duration;

use json_event_parser::JsonEvent;

use crate::builder::quote;
use crate::rules::Need;

pub(super) enum Rule {
    Up(Need),
    Degraded(Need),
    Hold(Duration),
}

/// Reads the value of `up`, `degraded` or `for`.
pub(super) fn rule(field: &str, value: &JsonEvent<'_>) -> Result<Rule, String> {
    let text = text(value);
    if field == "for" {
        let quoted = matches!(value, JsonEvent::String(_));
        let hold = text.filter(|_| quoted).and_then(|text| humantime::parse_duration(text).ok());
        return hold.map(Rule::Hold).ok_or_else(|| {
            format!("for: expected a duration such as \"30s\", not {}", shown(value))
        });
    }
    match text.and_then(Need::parse) {
        Some(need) if field == "up" => Ok(Rule::Up(need)),
        Some(need) => Ok(Rule::Degraded(need)),
        None => Err(format!(
            "{field}: expected all, any, a number from 1, or a percentage from 1% to 100%, not {}",
            shown(value)
        )),
    }
}

/// Reads an object `42` or a range `"100-199"`, whose ends are included.
pub(super) fn range(value: &JsonEvent<'_>) -> Result<(i64, i64), String> {
    let parsed = text(value).and_then(|text| {
        // The first character may be the sign of the first id.
        let dash = text.char_indices().skip(1).find(|&(_, character)| character == '-');
        let (first, last) =
            dash.map_or((text, text), |(dash, _)| (&text[..dash], &text[dash + 1..]));
        Some((id(first)?, id(last)?))
    });
    parsed.ok_or_else(|| {
        let value = shown(value);
        format!("expected a 64-bit id such as 42, or a range such as \"100-199\", not {value}")
    })
}

fn id(text: &str) -> Option<i64> {
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

fn text<'a>(value: &'a JsonEvent<'_>) -> Option<&'a str> {
    match value {
        JsonEvent::String(text) | JsonEvent::Number(text) => Some(text),
        _ => None,
    }
}

/// A value for an error.
pub(super) fn shown(value: &JsonEvent<'_>) -> String {
    match value {
        JsonEvent::String(text) => quote(text),
        JsonEvent::Number(number) => number.chars().take(40).collect(),
        JsonEvent::Boolean(value) => value.to_string(),
        JsonEvent::Null => "null".to_owned(),
        JsonEvent::StartArray => "an array".to_owned(),
        _ => "an object".to_owned(),
    }
}
