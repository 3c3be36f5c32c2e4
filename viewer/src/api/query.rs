//! Parses the query parameters of requests.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{IntoParams, PartialSchema, ToSchema};

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1_000;
/// The default of `gone_within`.
const GONE_WITHIN: Duration = Duration::from_hours(1);
const STREAM_LIMIT_MAX: usize = 1_000_000;
/// A list of this length still fits into a request's head.
const IDS_LENGTH_MAX: usize = 10_000;

/// An object's id: a signed 64-bit integer, as a string because many JSON parsers keep only 53
/// bits.
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

/// The parameters of `GET /objects`, as text, so that the errors can say what is allowed.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ObjectsQuery {
    /// Whether to list the objects that are online, or those that are gone
    #[param(value_type = Option<bool>, default = true)]
    online: Option<String>,
    /// Maximum number of objects
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 100)]
    limit: Option<String>,
    /// The field `next` of the previous page
    #[param(pattern = "^[0-9a-f]{16}$")]
    after: Option<String>,
    /// Only these objects; ids separated by commas, at most 10,000 characters; not with
    /// `online=false`
    #[param(pattern = "^(0|-?[1-9][0-9]{0,18})(,(0|-?[1-9][0-9]{0,18}))*$", max_length = 10_000)]
    ids: Option<String>,
    /// Only objects that were seen within this time, such as `10s`; not with `online=false`
    #[param(pattern = "^[1-9][0-9]{0,6}(ms|s|m|h|d)$")]
    seen_within: Option<String>,
    /// Only objects that are gone since this time, such as `1h`, which is the default; only with
    /// `online=false`
    #[param(pattern = "^[1-9][0-9]{0,6}(ms|s|m|h|d)$")]
    gone_within: Option<String>,
    /// Only the objects of this group and its subgroups; the group's path, such as `shop/berlin`;
    /// not with `ids`
    #[param(max_length = 1024)]
    group: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct StreamQuery {
    /// Only these objects; ids separated by commas, at most 10,000 characters
    #[param(pattern = "^(0|-?[1-9][0-9]{0,18})(,(0|-?[1-9][0-9]{0,18}))*$", max_length = 10_000)]
    ids: Option<String>,
    /// Only the objects of this group and its subgroups, and the statuses of these groups; the
    /// group's path, such as `shop/berlin`; not with `ids`
    #[param(max_length = 1024)]
    group: Option<String>,
    /// Only the objects with the lowest ids, up to about this number (a quarter more or less)
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1_000_000)]
    limit: Option<String>,
    /// Same as the header `Last-Event-ID`, for clients that cannot send the header
    #[serde(rename = "lastEventId")]
    last_event_id: Option<String>,
    /// Ignored: some clients add it to bypass caches
    #[serde(rename = "_")]
    #[expect(dead_code, reason = "declared so that it is not rejected as unknown")]
    cache_buster: Option<String>,
}

pub(crate) struct ObjectsRequest {
    pub(crate) limit: usize,
    /// The first id; `None` if there is no further one.
    pub(crate) first: Option<i64>,
    /// The path of the group whose objects to list.
    pub(crate) group: Option<String>,
    pub(crate) listed: Listed,
}

pub(crate) struct StreamRequest {
    /// In ascending order.
    pub(crate) ids: Option<Box<[i64]>>,
    /// The path of a group. Not with `ids`.
    pub(crate) group: Option<String>,
    pub(crate) limit: Option<usize>,
    /// Resume after the event with this id.
    pub(crate) after: Option<String>,
}

/// Which objects to list.
pub(crate) enum Listed {
    Online {
        /// In ascending order.
        ids: Option<Vec<i64>>,
        seen_within: Option<Duration>,
    },
    Gone {
        within: Duration,
    },
}

impl ObjectsQuery {
    pub(crate) fn parse(self) -> Result<ObjectsRequest, String> {
        require_one(self.ids.as_ref(), self.group.as_ref())?;
        let after = self.after.as_deref().map(parse_page_cursor).transpose()?;
        let ids = self.ids.as_deref().map(parse_ids).transpose()?;
        let within = |name, text: &Option<String>| {
            text.as_deref().map(|text| parse_duration(name, text)).transpose()
        };
        let seen_within = within("seen_within", &self.seen_within)?;
        let gone_within = within("gone_within", &self.gone_within)?;
        let listed = match (self.online.as_deref(), gone_within) {
            (None | Some("true"), None) => Listed::Online { ids, seen_within },
            (None | Some("true"), Some(_)) => {
                return Err("gone_within: expected only with online=false".to_owned());
            }
            (Some("false"), _) if ids.is_some() || seen_within.is_some() => {
                return Err("ids and seen_within: expected only with online=true".to_owned());
            }
            (Some("false"), within) => Listed::Gone { within: within.unwrap_or(GONE_WITHIN) },
            (Some(_), _) => return Err("online: expected true or false".to_owned()),
        };
        Ok(ObjectsRequest {
            limit: parse_page_limit(self.limit.as_deref())?,
            first: after.map_or(Some(i64::MIN), |after| after.checked_add(1)),
            group: self.group,
            listed,
        })
    }
}

impl StreamQuery {
    pub(crate) fn parse(self, last_event_id: Option<&str>) -> Result<StreamRequest, String> {
        require_one(self.ids.as_ref(), self.group.as_ref())?;
        Ok(StreamRequest {
            ids: self.ids.as_deref().map(parse_ids).transpose()?.map(Vec::into_boxed_slice),
            group: self.group,
            limit: self
                .limit
                .as_deref()
                .map(|text| parse_limit(text, STREAM_LIMIT_MAX))
                .transpose()?,
            // If a polyfill sends the header and the parameter, the browser's header is newer.
            after: last_event_id.map(str::to_owned).or(self.last_event_id),
        })
    }
}

fn require_one(ids: Option<&String>, group: Option<&String>) -> Result<(), String> {
    if ids.is_some() && group.is_some() {
        return Err("ids and group: expected only one of them".to_owned());
    }
    Ok(())
}

/// The `next` of a page that ends with `id`, encoded so that clients treat it as opaque.
pub(crate) fn page_cursor(id: i64) -> String {
    format!("{id:016x}")
}

fn parse_page_cursor(text: &str) -> Result<i64, String> {
    let is_hex =
        text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let id = u64::from_str_radix(text, 16).ok().filter(|_| is_hex);
    id.map(u64::cast_signed).ok_or_else(|| "after: expected the `next` of a page".to_owned())
}

pub(crate) fn parse_page_limit(text: Option<&str>) -> Result<usize, String> {
    text.map_or(Ok(LIMIT_DEFAULT), |text| parse_limit(text, LIMIT_MAX))
}

fn parse_limit(text: &str, max: usize) -> Result<usize, String> {
    parse_number("limit", text, 1..=max)
}

/// Parses a parameter that is a number.
pub(crate) fn parse_number(
    name: &str,
    text: &str,
    allowed: RangeInclusive<usize>,
) -> Result<usize, String> {
    let number = parse_digits(text).filter(|number| allowed.contains(number));
    number.ok_or_else(|| {
        format!("{name}: expected a number from {} to {}", allowed.start(), allowed.end())
    })
}

/// Accepts only digits: `parse` would also accept a sign.
fn parse_digits(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

pub(crate) fn parse_id(text: &str) -> Result<i64, String> {
    // Only the canonical spelling: neither +1, nor 01, nor -0.
    let id = text.parse().ok().filter(|id: &i64| id.to_string() == text);
    id.ok_or_else(|| "id: expected a 64-bit integer".to_owned())
}

fn parse_ids(text: &str) -> Result<Vec<i64>, String> {
    if text.len() > IDS_LENGTH_MAX {
        return Err(format!("ids: expected at most {IDS_LENGTH_MAX} characters"));
    }
    let ids: Result<Vec<i64>, String> = text.split(',').map(parse_id).collect();
    let mut ids =
        ids.map_err(|_| "ids: expected 64-bit integers, separated by commas".to_owned())?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Parses a parameter that is a duration with a unit, such as `10s`.
pub(crate) fn parse_duration(name: &str, text: &str) -> Result<Duration, String> {
    let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    let parse = |(unit, ms): (&str, u64)| {
        let number = text.strip_suffix(unit)?;
        let count =
            parse_digits(number).filter(|_| number.len() <= 7 && !number.starts_with('0'))?;
        Some(Duration::from_millis(ms.saturating_mul(u64::try_from(count).ok()?)))
    };
    let duration = units.into_iter().find_map(parse).filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| format!("{name}: expected a duration such as 500ms, 10s, 2m or 1d"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_cursor_round_trips() {
        for id in [i64::MIN, -1, 0, 1, i64::MAX] {
            assert_eq!(parse_page_cursor(&page_cursor(id)), Ok(id));
        }
        for text in ["", "1", "+000000000000001", "00000000000000AB", "00000000000000001"] {
            assert!(parse_page_cursor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_and_limits_match_the_openapi_patterns() {
        let parse_duration = |text| parse_duration("window", text);
        assert_eq!(parse_duration("1500ms"), Ok(Duration::from_millis(1_500)));
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_mins(2)));
        assert_eq!(parse_duration("9999999d"), Ok(24 * Duration::from_hours(9_999_999)));
        for text in ["", "10", "s", "0s", "+1s", "1us", "1m 30s", "12345678s", "-1s", "1.5s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(parse_limit("1000", LIMIT_MAX), Ok(1_000));
        for text in ["", "0", "1001", "+1", "-1", "1e2", " 1"] {
            assert!(parse_limit(text, LIMIT_MAX).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_sorted_and_deduplicated() {
        assert_eq!(parse_ids("7,-3,7,0"), Ok(vec![-3, 0, 7]));
        for text in ["", "1,", "1,,2", "1;2", "9223372036854775808", "+1", "01", "-0", "1.0"] {
            assert!(parse_ids(text).is_err(), "{text}");
        }
        assert!(parse_ids(&vec!["1"; IDS_LENGTH_MAX].join(",")).is_err());
    }
}
