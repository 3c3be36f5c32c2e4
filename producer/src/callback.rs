//! The body of a callback: a list of object ids.

use axum::http::StatusCode;
use serde::Deserialize;
use service::problem::Problem;

/// The ids of one callback.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Callback {
    /// How many the callback lists, repeats included.
    pub(crate) listed: usize,
    /// Each of them once, in ascending order.
    pub(crate) ids: Vec<i64>,
}

/// Fields that we do not know are ignored, so that partners may add some.
#[derive(Deserialize)]
struct Body {
    object_ids: Vec<i64>,
}

impl Callback {
    /// Reads a body of the form `{"object_ids":[1,2,3]}`.
    ///
    /// # Errors
    /// A 400 that says what is wrong and where, or a 422 for more than `max_ids`.
    pub(crate) fn parse(body: &[u8], max_ids: usize) -> Result<Self, Problem> {
        // Without this, serde would take the bare list `[[1,2,3]]` for the object's fields in order.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(bad_request("the body must be a JSON object: {\"object_ids\":[1,2,3]}"));
        }
        let Body { object_ids: mut ids } =
            serde_json::from_slice(body).map_err(|_| explain(body))?;
        let listed = ids.len();
        if listed > max_ids {
            return Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("{listed} ids are more than the {max_ids} of one callback: send several"),
            ));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Self { listed, ids })
    }
}

/// Reads a body that is wrong once more, this time keeping track of where. The way of a right one
/// is spared that.
fn explain(body: &[u8]) -> Problem {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize::<_, Body>(&mut deserializer);
    let Err(error) = parsed else {
        return bad_request("there is more after the end of the JSON object");
    };
    let path = error.path().to_string();
    let cause = error.into_inner();
    if cause.is_syntax() || cause.is_eof() {
        bad_request(format!("the body is not JSON: {cause}"))
    } else if path.starts_with("object_ids[") {
        bad_request(format!("{path} is not a 64-bit integer: {cause}"))
    } else {
        bad_request(format!("the body must look like {{\"object_ids\":[1,2,3]}}: {cause}"))
    }
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
    fn repeats_are_listed_but_looked_up_once() {
        let callback = Callback::parse(br#" {"object_ids":[3,1,3,-2]} "#, 10).unwrap();
        assert_eq!(callback, Callback { listed: 4, ids: vec![-2, 1, 3] });
    }

    #[test]
    fn the_ends_of_64_bits_and_unknown_fields_are_taken() {
        let body = format!(r#"{{"at":1,"object_ids":[{},{}],"x":{{}}}}"#, i64::MIN, i64::MAX);
        assert_eq!(Callback::parse(body.as_bytes(), 10).unwrap().ids, [i64::MIN, i64::MAX]);
        assert_eq!(Callback::parse(br#"{"object_ids":[]}"#, 10).unwrap().listed, 0);
    }

    #[test]
    fn an_id_that_is_no_64_bit_integer_is_told_by_its_index() {
        for id in [r#""7""#, "1.5", "1.0", "9223372036854775808", "null", "[]", "true"] {
            let detail = detail(&format!(r#"{{"object_ids":[1,2,{id}]}}"#));
            assert!(detail.starts_with("object_ids[2] is not a 64-bit integer"), "{detail}");
        }
    }

    #[test]
    fn what_is_no_json_is_told_apart_from_what_has_another_shape() {
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
    fn a_body_of_brackets_ends_in_an_error_and_not_in_a_stack_overflow() {
        let body = format!(r#"{{"x":{}"#, "[".repeat(1 << 20));
        assert!(detail(&body).starts_with("the body is not JSON"));
    }

    #[test]
    fn more_ids_than_allowed_are_refused_as_unprocessable() {
        let problem = Callback::parse(br#"{"object_ids":[1,1,1]}"#, 2).unwrap_err();
        assert_eq!(problem.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}
