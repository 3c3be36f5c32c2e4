//! Property tests of the parser of answers. Inputs that once failed are in
//! `tests/status.regressions`. Other useful inputs are in `tests/corpus/status`. Files named
//! `online-…` or `offline-…` say this about object 42. No other file is a valid answer about it.

use std::time::Duration;

use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::FileFailurePersistence;
use serde_json::{Value, json};

use http::{HeaderValue, StatusCode};

use super::LookupError;
use super::answer::{ReceivedBody, ReceivedResponse, retry_after};
use crate::config::Status404;

fn online(id: i64, body: &[u8]) -> Result<bool, LookupError> {
    let body = ReceivedBody { bytes: body.to_vec(), is_truncated: false };
    let (content_type, retry_after) = (None, None);
    ReceivedResponse { status: StatusCode::OK, content_type, retry_after, body }
        .is_online(id, Status404::Offline)
}

/// What an answer says about `id` according to another parser.
fn reference_online(id: i64, body: &[u8]) -> Option<bool> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let fields = value.as_object()?;
    let named_id = fields.get("id")?.as_i64()?;
    let online = fields.get("online")?.as_bool()?;
    (named_id == id).then_some(online)
}

fn config() -> ProptestConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/status.regressions");
    let regressions = FileFailurePersistence::Direct(path);
    ProptestConfig { failure_persistence: Some(Box::new(regressions)), ..ProptestConfig::default() }
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => any::<bool>().prop_map(Value::from),
        2 => Just(json!(42)),
        2 => any::<i64>().prop_map(|id| json!(id)),
        1 => any::<f64>().prop_map(|id| json!(id)),
        1 => "\\PC*".prop_map(Value::from),
        1 => Just(Value::Null),
        1 => vec(any::<bool>(), 0..3).prop_map(Value::from),
    ]
}

fn answer() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => (leaf(), leaf()).prop_map(|(id, online)| json!({ "id": id, "online": online })),
        2 => hash_map("id|online|\\PC{0,6}", leaf(), 0..4)
            .prop_map(|fields| fields.into_iter().collect()),
        1 => vec(leaf(), 0..3).prop_map(Value::from),
    ]
}

#[test]
fn corpus_files_are_read_as_their_names_say() {
    let corpus = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/status"));
    let mut answers = 0;
    for entry in corpus.unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let expected = match name.split('-').next().unwrap() {
            "online" => Some(true),
            "offline" => Some(false),
            _ => None,
        };
        assert_eq!(online(42, &std::fs::read(&path).unwrap()).ok(), expected, "{name}");
        answers += u32::from(expected.is_some());
    }
    assert!(answers > 0);
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn an_answer_applies_only_to_the_object_it_names(id: i64, other: i64, is_online: bool) {
        let answer = json!({ "id": id, "online": is_online, "more": [] }).to_string();
        prop_assert_eq!(online(id, answer.as_bytes()).unwrap(), is_online);
        prop_assume!(other != id);
        let refused = online(other, answer.as_bytes());
        let named_id = match refused {
            Err(LookupError::WrongId { id, .. }) => Some(id),
            _ => None,
        };
        prop_assert_eq!(named_id, Some(id));
    }

    #[test]
    fn json_is_read_as_the_reference_parser_reads_it(answer in answer()) {
        let answer = answer.to_string().into_bytes();
        prop_assert_eq!(online(42, &answer).ok(), reference_online(42, &answer));
    }

    #[test]
    fn a_corrupted_answer_is_read_as_the_reference_parser_reads_it(
        is_online: bool,
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut answer = json!({ "id": 42, "online": is_online }).to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(answer.len());
            answer[at] = byte;
        }
        prop_assert_eq!(online(42, &answer).ok(), reference_online(42, &answer));
    }

    #[test]
    fn any_bytes_are_read_as_the_reference_parser_reads_them(answer: Vec<u8>) {
        prop_assert_eq!(online(42, &answer).ok(), reference_online(42, &answer));
    }

    // Field case 3.7.
    #[test]
    fn no_retry_after_is_longer_than_a_minute(
        value in prop_oneof!["[0-9]{1,30}", "[ -~]{0,40}", "(Sun|Mon), [0-9]{2} Jan [0-9]{4} 23:59:60 GMT"],
    ) {
        let value = HeaderValue::from_str(&value).unwrap();
        prop_assert!(retry_after(&value).unwrap_or_default() <= Duration::from_mins(1));
    }

    // Field cases 5.1 and 5.5.
    #[test]
    fn the_error_of_any_response_is_short_and_printable(
        status in 100..=999_u16,
        content_type: Vec<u8>,
        bytes in prop_oneof![any::<Vec<u8>>(), Just("\u{1b}".repeat(5_000).into_bytes())],
        is_truncated: bool,
    ) {
        let content_type = HeaderValue::from_bytes(&content_type).ok();
        let status = StatusCode::from_u16(status).unwrap();
        let body = ReceivedBody { bytes, is_truncated };
        let received = ReceivedResponse { status, content_type, retry_after: None, body };
        if let Err(error) = received.is_online(42, Status404::Offline) {
            let shown = error.to_string();
            prop_assert!(shown.len() < 2_000, "{} bytes: {}", shown.len(), shown);
            prop_assert!(!shown.chars().any(char::is_control), "{}", shown);
        }
    }
}
