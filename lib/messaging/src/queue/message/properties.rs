//! Property tests of message bodies. Inputs that once failed are in `tests/message.regressions`.
//! Other useful inputs are in `tests/corpus/message`, in files whose names begin with the expected
//! id, or with `none`.

use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::FileFailurePersistence;
use serde_json::{Value, json};

use super::{decode, encode};

const NAMES: [&str; 4] = ["id", "ID", "Id", "iD"];

/// The id in a body according to another parser.
fn reference_decode(body: &[u8]) -> Option<i64> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let fields = value.as_object()?;
    let mut named = NAMES.iter().filter_map(|name| fields.get(*name));
    let id = named.next()?.as_i64();
    if named.next().is_some() { None } else { id }
}

fn config() -> ProptestConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/message.regressions");
    let regressions = FileFailurePersistence::Direct(path);
    ProptestConfig { failure_persistence: Some(Box::new(regressions)), ..ProptestConfig::default() }
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => any::<i64>().prop_map(|id| json!(id)),
        1 => any::<u64>().prop_map(|id| json!(id)),
        1 => any::<f64>().prop_map(|id| json!(id)),
        1 => "\\PC*".prop_map(Value::from),
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        1 => vec(any::<i64>(), 0..3).prop_map(Value::from),
    ]
}

fn body() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => hash_map("id|ID|Id|iD|\\PC{0,6}", leaf(), 0..4)
            .prop_map(|fields| fields.into_iter().collect()),
        1 => leaf(),
    ]
}

#[test]
fn corpus_files_decode_to_the_id_in_their_name() {
    let corpus = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/message"));
    let mut messages = 0;
    for entry in corpus.unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let expected = name.split('-').next().unwrap().parse::<i64>().ok();
        assert_eq!(decode(&std::fs::read(&path).unwrap()).ok(), expected, "{name}");
        messages += u32::from(expected.is_some());
    }
    assert!(messages > 0);
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_id_is_decoded_in_both_formats(id: i64) {
        prop_assert_eq!(decode(&encode(id)).unwrap(), id);
        prop_assert_eq!(decode(format!(r#"{{"ID":{id}}}"#).as_bytes()).unwrap(), id);
    }

    #[test]
    fn other_fields_are_ignored(
        id: i64,
        name in select(NAMES.as_slice()),
        others in hash_map("[a-z_]{3,8}", leaf(), 0..4),
    ) {
        let mut fields: serde_json::Map<String, Value> = others.into_iter().collect();
        fields.insert(name.to_owned(), json!(id));
        prop_assert_eq!(decode(Value::from(fields).to_string().as_bytes()).unwrap(), id);
    }

    #[test]
    fn json_is_decoded_as_by_the_reference_parser(body in body()) {
        let body = body.to_string();
        prop_assert_eq!(decode(body.as_bytes()).ok(), reference_decode(body.as_bytes()));
    }

    #[test]
    fn corrupted_body_is_decoded_as_by_the_reference_parser(
        id: i64,
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = encode(id);
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        prop_assert_eq!(decode(&body).ok(), reference_decode(&body));
    }

    #[test]
    fn any_bytes_are_decoded_as_by_the_reference_parser(body: Vec<u8>) {
        prop_assert_eq!(decode(&body).ok(), reference_decode(&body));
    }
}
