//! The parameters of requests, and what they mean.

use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};

use crate::stream::Request;

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1_000;
const STREAM_LIMIT_MAX: usize = 1_000_000;
/// It has to fit into a request's head.
const IDS_LENGTH_MAX: usize = 10_000;

/// An object's id: any signed 64-bit integer. In JSON it is a string, since many parsers keep only 53 bits of a number.
#[derive(Clone, Copy)]
pub(crate) struct ObjectId(pub(crate) i64);

impl Serialize for ObjectId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl PartialSchema for ObjectId {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
            .pattern(Some("^(0|-?[1-9][0-9]{0,18})$"))
            .into()
    }
}

impl ToSchema for ObjectId {}

/// As text, so that what is wrong with it can be said in words of ours.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ObjectsQuery {
    /// How many at most
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// Those after these: what the page before has as `next`
    #[param(pattern = "^[0-9a-f]{16}$")]
    after: Option<String>,
    /// Of these only, separated by commas, in 10,000 characters at most
    #[param(pattern = "^(0|-?[1-9][0-9]{0,18})(,(0|-?[1-9][0-9]{0,18}))*$", max_length = 10_000)]
    ids: Option<String>,
    /// Only those that were seen so short a time ago, such as `10s`
    #[param(pattern = "^[1-9][0-9]{0,6}(ms|s|m|h)$")]
    seen_within: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct StreamQuery {
    /// Only about these, separated by commas, in 10,000 characters at most
    #[param(pattern = "^(0|-?[1-9][0-9]{0,18})(,(0|-?[1-9][0-9]{0,18}))*$", max_length = 10_000)]
    ids: Option<String>,
    /// Only about this many objects, give or take a quarter: those with the lowest ids
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1_000_000)]
    limit: Option<String>,
    /// The same as the header `Last-Event-ID`, for clients that cannot send one
    #[serde(rename = "lastEventId")]
    last_event_id: Option<String>,
    /// Ignored: some clients add it to get past caches
    #[serde(rename = "_")]
    #[expect(dead_code, reason = "named so that it is not refused as unknown")]
    cache_buster: Option<String>,
}

pub(crate) struct Objects {
    pub(crate) limit: usize,
    pub(crate) after: Option<i64>,
    /// In ascending order.
    pub(crate) ids: Option<Vec<i64>>,
    pub(crate) seen_within_micros: Option<i64>,
}

impl ObjectsQuery {
    pub(crate) fn read(&self) -> Result<Objects, String> {
        Ok(Objects {
            limit: self
                .limit
                .as_deref()
                .map_or(Ok(LIMIT_DEFAULT), |text| limit(text, LIMIT_MAX))?,
            after: self.after.as_deref().map(read_cursor).transpose()?,
            ids: self.ids.as_deref().map(ids).transpose()?,
            seen_within_micros: self.seen_within.as_deref().map(within).transpose()?,
        })
    }
}

impl StreamQuery {
    pub(crate) fn read(self, last_event_id: Option<&str>) -> Result<Request, String> {
        Ok(Request {
            ids: self.ids.as_deref().map(ids).transpose()?.map(Vec::into_boxed_slice),
            limit: self.limit.as_deref().map(|text| limit(text, STREAM_LIMIT_MAX)).transpose()?,
            // A polyfill whose browser can send the header after all has the later one there.
            after: last_event_id.map(str::to_owned).or(self.last_event_id),
        })
    }
}

/// Where a page ended. That it is the last id is nobody's business.
pub(crate) fn cursor(id: i64) -> String {
    format!("{id:016x}")
}

fn read_cursor(text: &str) -> Result<i64, String> {
    let plain =
        text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let id = u64::from_str_radix(text, 16).ok().filter(|_| plain);
    id.map(u64::cast_signed).ok_or_else(|| "after: expected the `next` of a page".to_owned())
}

fn limit(text: &str, most: usize) -> Result<usize, String> {
    let limit = digits(text).filter(|limit| (1..=most).contains(limit));
    limit.ok_or_else(|| format!("limit: expected a number from 1 to {most}"))
}

/// Nothing but digits: no sign, as `parse` takes it.
fn digits(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

pub(crate) fn id(text: &str) -> Result<i64, String> {
    // In its only spelling: neither +1, nor 01, nor -0.
    let id = text.parse().ok().filter(|id: &i64| id.to_string() == text);
    id.ok_or_else(|| "id: expected an integer of 64 bits".to_owned())
}

fn ids(text: &str) -> Result<Vec<i64>, String> {
    if text.len() > IDS_LENGTH_MAX {
        return Err(format!("ids: expected at most {IDS_LENGTH_MAX} characters"));
    }
    let ids: Result<Vec<i64>, String> = text.split(',').map(id).collect();
    let mut ids =
        ids.map_err(|_| "ids: expected integers of 64 bits, separated by commas".to_owned())?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn within(text: &str) -> Result<i64, String> {
    let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    let read = |(unit, ms): (&str, u64)| {
        let number = text.strip_suffix(unit)?;
        let count = digits(number).filter(|_| number.len() <= 7 && !number.starts_with('0'))?;
        Some(Duration::from_millis(ms.saturating_mul(u64::try_from(count).ok()?)))
    };
    let within = units.into_iter().find_map(read).filter(|within| !within.is_zero());
    let micros = within.and_then(|within| i64::try_from(within.as_micros()).ok());
    micros.ok_or_else(|| "seen_within: expected a duration such as 500ms, 10s or 2m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_written() {
        for id in [i64::MIN, -1, 0, 1, i64::MAX] {
            assert_eq!(read_cursor(&cursor(id)), Ok(id));
        }
        for text in ["", "1", "+000000000000001", "00000000000000AB", "00000000000000001"] {
            assert!(read_cursor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_and_limits_are_what_the_document_says_they_are() {
        assert_eq!(within("1500ms"), Ok(1_500_000));
        assert_eq!(within("10s"), Ok(10_000_000));
        assert_eq!(within("2m"), Ok(120_000_000));
        for text in ["", "10", "s", "0s", "+1s", "1us", "1m 30s", "12345678s", "-1s", "1.5s"] {
            assert!(within(text).is_err(), "{text}");
        }
        assert_eq!(limit("1000", LIMIT_MAX), Ok(1_000));
        for text in ["", "0", "1001", "+1", "-1", "1e2", " 1"] {
            assert!(limit(text, LIMIT_MAX).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_sorted_and_free_of_repeats() {
        assert_eq!(ids("7,-3,7,0"), Ok(vec![-3, 0, 7]));
        for text in ["", "1,", "1,,2", "1;2", "9223372036854775808", "+1", "01", "-0", "1.0"] {
            assert!(ids(text).is_err(), "{text}");
        }
        assert!(ids(&vec!["1"; IDS_LENGTH_MAX].join(",")).is_err());
    }
}
