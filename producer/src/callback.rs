//! Parses the body of a callback: a list of object ids.

use std::borrow::Cow;
use std::fmt;

use axum::http::StatusCode;
use runtime::problem::Problem;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Some clients write this before the text. A JSON parser may ignore it (RFC 8259, section 8.1).
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Above this, a floating-point number does not distinguish neighbouring integers.
const FLOATS_EXACT_UP_TO: u64 = 1 << 53;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Callback {
    /// The number of ids that the callback lists, repeats included.
    pub(crate) listed: usize,
    /// Each id once, in ascending order.
    pub(crate) ids: Vec<i64>,
}

/// The body of a callback. Unknown fields are ignored, so that partners may add fields.
#[derive(Deserialize)]
struct Body {
    object_ids: Ids,
}

struct Ids(Vec<i64>);

struct Id(i64);

/// The same body with the list as unparsed text, for senders that write integers in another form.
#[derive(Deserialize)]
struct BodyAsText<'a> {
    #[serde(borrow)]
    object_ids: &'a RawValue,
}

// These visitors accept values of any type and reject text themselves, because serde's errors quote
// and escape the text, which takes several times the memory of the body.
impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Ids;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a list of ids")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Ids, A::Error> {
                let mut ids = Vec::new();
                while let Some(Id(id)) = list.next_element()? {
                    ids.push(id);
                }
                Ok(Ids(ids))
            }

            fn visit_str<E: de::Error>(self, _: &str) -> Result<Ids, E> {
                Err(E::custom("text"))
            }
        }
        deserializer.deserialize_any(List)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Integer;
        impl Visitor<'_> for Integer {
            type Value = Id;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an integer")
            }

            fn visit_i64<E: de::Error>(self, id: i64) -> Result<Id, E> {
                Ok(Id(id))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Id, E> {
                id.try_into().map(Id).map_err(|_| E::custom("more than 64 bits"))
            }

            fn visit_str<E: de::Error>(self, _: &str) -> Result<Id, E> {
                Err(E::custom("text"))
            }
        }
        deserializer.deserialize_any(Integer)
    }
}

impl Callback {
    /// Parses a body of the form `{"object_ids":[1,2,3]}`. An id may also be a decimal string
    /// (`"2"`), or a number with a fraction of zero or an exponent (`4.0`) up to 2^53.
    ///
    /// # Errors
    /// A 400 with the fault and its position, or a 422 for more than `max_ids` ids.
    pub(crate) fn parse(body: &[u8], max_ids: usize) -> Result<Self, Problem> {
        let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
        // Without this check, serde would accept the list `[[1,2,3]]` as the fields in order.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(bad_request(match other_encoding(body) {
                Some(encoding) => format!("the body is in {encoding}: send it in UTF-8"),
                None => "the body must be a JSON object: {\"object_ids\":[1,2,3]}".to_owned(),
            }));
        }
        // Try `Body` first: almost all senders write integers, so most bodies are parsed only once.
        let mut ids = match serde_json::from_slice::<Body>(body) {
            Ok(body) => body.object_ids.0,
            Err(_) => parse_texts(body)?,
        };
        let listed = ids.len();
        if listed > max_ids {
            return Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!(
                    "{listed} ids are more than the {max_ids} of one callback: \
                     send several callbacks"
                ),
            ));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Self { listed, ids })
    }
}

fn parse_texts(body: &[u8]) -> Result<Vec<i64>, Problem> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let BodyAsText { object_ids } = BodyAsText::deserialize(&mut json).map_err(|error| {
        bad_request(match other_encoding(body) {
            Some(encoding) => format!("the body is in {encoding}: send it in UTF-8"),
            None if error.is_data() => {
                format!("the body must look like {{\"object_ids\":[1,2,3]}}: {error}")
            }
            None => format!("the body is not JSON: {error}"),
        })
    })?;
    json.end().map_err(|_| bad_request("there is more after the end of the JSON object"))?;
    if !object_ids.get().starts_with('[') {
        return Err(bad_request(
            "the body must look like {\"object_ids\":[1,2,3]}: object_ids is not a list",
        ));
    }
    let object_ids: Vec<&RawValue> = serde_json::from_str(object_ids.get())
        .map_err(|error| bad_request(format!("object_ids is not a list: {error}")))?;
    let ids = object_ids.iter().zip(0..).map(|(text, index)| {
        integer(text.get()).ok_or_else(|| {
            let expected = "expected digits, such as 42, \"42\" or, up to 2^53, 42.0";
            bad_request(format!("object_ids[{index}] is not a 64-bit integer: {expected}"))
        })
    });
    ids.collect()
}

/// Recognises UTF-16 and UTF-32 by the zero bytes around the opening brace, or by the byte order
/// mark.
fn other_encoding(body: &[u8]) -> Option<&'static str> {
    match body {
        [0xff, 0xfe, 0, 0, ..]
        | [0, 0, 0xfe, 0xff, ..]
        | [b'{', 0, 0, 0, ..]
        | [0, 0, 0, b'{', ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{', 0, ..] | [0, b'{', ..] => Some("UTF-16"),
        _ => None,
    }
}

/// The integer that a JSON number or string represents, if it is unambiguous.
fn integer(json: &str) -> Option<i64> {
    if json.starts_with('"') {
        let text: Cow<str> = serde_json::from_str(json).ok()?;
        // Rejects blanks, plus signs and leading zeros.
        let is_decimal = |id: &i64| id.to_string() == *text;
        return text.parse().ok().filter(is_decimal);
    }
    json.parse().ok().or_else(|| whole_float(json))
}

/// The value of a JSON number such as `4.0` or `4e2`, if it is whole and between -2^53 and 2^53. It
/// is calculated from the digits, because a floating-point number would be rounded first.
fn whole_float(json: &str) -> Option<i64> {
    let (mantissa, exponent) = json.split_once(['e', 'E']).unwrap_or((json, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    if significant.trim_start_matches(['-', '0']).is_empty() {
        return Some(0);
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let fraction = i64::try_from(fraction.len()).ok()?;
    let power = exponent.parse::<i64>().ok()?.checked_add(zeros)?.checked_sub(fraction)?;
    let scale = 10_i64.checked_pow(u32::try_from(power).ok()?)?;
    let value = significant.parse::<i64>().ok()?.checked_mul(scale)?;
    (value.unsigned_abs() <= FLOATS_EXACT_UP_TO).then_some(value)
}

fn bad_request(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(body: &str) -> String {
        let problem = Callback::parse(body.as_bytes(), 10).unwrap_err();
        assert_eq!(problem.status, StatusCode::BAD_REQUEST, "{body}");
        problem.detail
    }

    #[test]
    fn repeated_ids_are_counted_as_listed_and_kept_once() {
        let callback = Callback::parse(br#" {"object_ids":[3,1,3,-2]} "#, 10).unwrap();
        assert_eq!(callback, Callback { listed: 4, ids: vec![-2, 1, 3] });
    }

    #[test]
    fn extreme_ids_and_unknown_fields_are_accepted() {
        let body = format!(r#"{{"at":1,"object_ids":[{},{}],"x":{{}}}}"#, i64::MIN, i64::MAX);
        assert_eq!(Callback::parse(body.as_bytes(), 10).unwrap().ids, [i64::MIN, i64::MAX]);
        assert_eq!(Callback::parse(br#"{"object_ids":[]}"#, 10).unwrap().listed, 0);
    }

    /// Field case 1.4.
    #[test]
    fn ids_in_other_unambiguous_forms_are_accepted() {
        for (text, id) in [
            (r#""2""#, 2),
            (r#""-9223372036854775808""#, i64::MIN),
            (r#""\u0037""#, 7),
            (r#""0""#, 0),
            ("4.0", 4),
            ("-4.00e1", -40),
            ("1e3", 1_000),
            ("1200E-2", 12),
            ("-0.0", 0),
            ("0e99999999999999999999", 0),
            ("9007199254740992.0", 1 << 53),
        ] {
            let body = format!(r#"{{"object_ids":[1,{text}]}}"#);
            let mut expected = vec![1, id];
            expected.sort_unstable();
            assert_eq!(Callback::parse(body.as_bytes(), 10).unwrap().ids, expected, "{text}");
        }
    }

    /// Field case 1.3.
    #[test]
    fn byte_order_mark_is_ignored_and_other_encodings_are_named() {
        let callback = Callback::parse("\u{feff}{\"object_ids\":[1]}".as_bytes(), 10).unwrap();
        assert_eq!(callback.ids, [1]);
        let text = r#"{"object_ids":[1]}"#;
        let utf_16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let utf_32: Vec<u8> = text.chars().flat_map(|c| (c as u32).to_be_bytes()).collect();
        let marked = [&[0xff, 0xfe], utf_16.as_slice()].concat();
        for (body, encoding) in [(utf_16, "UTF-16"), (marked, "UTF-16"), (utf_32, "UTF-32")] {
            let problem = Callback::parse(&body, 10).unwrap_err();
            assert_eq!(problem.status, StatusCode::BAD_REQUEST);
            assert!(problem.detail.contains(encoding), "{}", problem.detail);
        }
    }

    #[test]
    fn id_that_is_not_a_64_bit_integer_is_named_by_its_index() {
        for id in [
            r#"" 7""#,
            r#""0x7""#,
            r#""+7""#,
            r#""007""#,
            r#""""#,
            r#""-""#,
            r#""7.0""#,
            r#""9223372036854775808""#,
            "4.5",
            "1e-1",
            "1e99999999999999999999",
            "9007199254740993.0",
            "1e19",
            "9223372036854775808",
            "null",
            "[]",
            "true",
        ] {
            let detail = detail(&format!(r#"{{"object_ids":[1,2,{id}]}}"#));
            assert!(detail.starts_with("object_ids[2] is not a 64-bit integer"), "{detail}");
        }
    }

    /// Field case 2.1: serde's error about a text quotes all of it.
    #[test]
    fn error_does_not_quote_a_long_text() {
        let text = "\u{301}".repeat(10_000);
        for body in [
            format!(r#"{{"object_ids":"{text}"}}"#),
            format!(r#"{{"object_ids":["{text}"]}}"#),
            format!(r#"{{"object_ids":[["{text}"]]}}"#),
            format!(r#"{{"object_ids":{{"{text}":1}}}}"#),
            format!(r#"{{"object_ids":[1],"object_ids":"{text}"}}"#),
        ] {
            let detail = detail(&body);
            assert!(detail.len() < 200, "{} bytes: {detail:.300}", detail.len());
        }
        // The error of the first attempt to parse is discarded, but its text takes memory.
        let first_error =
            |body: String| serde_json::from_slice::<Body>(body.as_bytes()).err().unwrap();
        for body in
            [format!(r#"{{"object_ids":"{text}"}}"#), format!(r#"{{"object_ids":["{text}"]}}"#)]
        {
            assert!(first_error(body).to_string().len() < 200);
        }
    }

    #[test]
    fn invalid_json_and_json_of_another_shape_have_different_errors() {
        for body in ["{", r#"{"object_ids":[1,}"#, r#"{"object_ids":[1"#, "{]"] {
            assert!(detail(body).starts_with("the body is not JSON"), "{body}");
        }
        for body in ["", "[1]", "[[1]]", "null", "7", "{}", r#"{"object_ids":7}"#] {
            assert!(detail(body).starts_with("the body must "), "{body}");
        }
        let trailing = detail(r#"{"object_ids":[1]}{"object_ids":[2]}"#);
        assert!(trailing.starts_with("there is more after"), "{trailing}");
    }

    #[test]
    fn body_of_brackets_is_an_error_and_no_stack_overflow() {
        let body = format!(r#"{{"x":{}"#, "[".repeat(1 << 20));
        assert!(detail(&body).starts_with("the body is not JSON"));
    }

    #[test]
    fn more_ids_than_allowed_are_rejected_as_unprocessable() {
        let problem = Callback::parse(br#"{"object_ids":[1,1,1]}"#, 2).unwrap_err();
        assert_eq!(problem.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}
