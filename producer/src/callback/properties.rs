//! Property tests of callback bodies. Inputs that once failed are in `tests/callback.regressions`.
//! The corpus in `tests/corpus/callback` has more inputs; the name of each file says whether its
//! content is a callback.
//!
//! Decision: docs/decisions/0073-how-are-parsers-tested.md

use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::FileFailurePersistence;
use serde_json::{Value, json};

use super::Callback;

const MAX_IDS: usize = 1_000;

/// The distinct ids of a body in ascending order, according to another parser.
fn reference_ids(body: &[u8]) -> Option<Vec<i64>> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let value: Value = serde_json::from_slice(body).ok()?;
    let listed = value.as_object()?.get("object_ids")?.as_array()?;
    let mut ids = listed.iter().map(reference_id).collect::<Option<Vec<i64>>>()?;
    ids.sort_unstable();
    ids.dedup();
    Some(ids)
}

fn reference_id(value: &Value) -> Option<i64> {
    let as_text = |text: &str| text.parse::<i64>().ok().filter(|id| id.to_string() == text);
    #[expect(clippy::cast_possible_truncation, reason = "a whole number up to 2^53 is an i64")]
    let as_whole = |float: f64| {
        (float.fract() == 0.0 && float.abs() <= 2_f64.powi(53)).then_some(float as i64)
    };
    value
        .as_i64()
        .or_else(|| value.as_str().and_then(as_text))
        .or_else(|| value.as_f64().and_then(as_whole))
}

fn ids(body: &[u8]) -> Option<Vec<i64>> {
    Callback::parse(body, MAX_IDS).ok().map(|callback| callback.ids)
}

fn config() -> ProptestConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/callback.regressions");
    let regressions = FileFailurePersistence::Direct(path);
    ProptestConfig { failure_persistence: Some(Box::new(regressions)), ..ProptestConfig::default() }
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => any::<i64>().prop_map(|id| json!(id)),
        1 => any::<u64>().prop_map(|id| json!(id)),
        1 => any::<f64>().prop_map(|id| json!(id)),
        1 => any::<i32>().prop_map(|id| json!(f64::from(id))),
        1 => any::<i64>().prop_map(|id| json!(id.to_string())),
    ]
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number(),
        "\\PC*".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            hash_map("object_ids|\\PC{0,8}", inner, 0..4)
                .prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// Generates JSON that is in most cases a callback, or nearly one.
fn body() -> impl Strategy<Value = Value> {
    let listed = prop_oneof![
        4 => vec(number(), 0..8).prop_map(Value::from),
        1 => any_json(),
    ];
    let like_a_callback = (listed, hash_map("\\PC{0,8}", any_json(), 0..3)).prop_map(
        |(listed, mut fields): (Value, std::collections::HashMap<String, Value>)| {
            fields.insert("object_ids".to_owned(), listed);
            fields.into_iter().collect()
        },
    );
    prop_oneof![4 => like_a_callback, 1 => any_json()]
}

#[test]
fn only_corpus_files_named_callback_are_callbacks() {
    let corpus = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/callback"));
    let mut callbacks = 0;
    for entry in corpus.unwrap() {
        let path = entry.unwrap().path();
        let expected = path.file_name().unwrap().to_str().unwrap().starts_with("callback");
        let ids = ids(&std::fs::read(&path).unwrap());
        assert_eq!(ids.is_some(), expected, "{}", path.display());
        callbacks += u32::from(expected);
    }
    assert!(callbacks > 0);
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_list_of_ids_is_parsed(mut listed in vec(any::<i64>(), 0..MAX_IDS)) {
        let body = format!(r#"{{"object_ids":{listed:?}}}"#);
        let callback = Callback::parse(body.as_bytes(), MAX_IDS).unwrap();
        prop_assert_eq!(callback.listed, listed.len());
        listed.sort_unstable();
        listed.dedup();
        prop_assert_eq!(callback.ids, listed);
    }

    #[test]
    fn any_json_is_parsed_as_by_the_reference_parser(body in body(), pretty: bool) {
        let body = if pretty { format!("\n{body:#}\n") } else { body.to_string() };
        prop_assert_eq!(ids(body.as_bytes()), reference_ids(body.as_bytes()));
    }

    #[test]
    fn json_with_wrong_bytes_is_parsed_as_by_the_reference_parser(
        body in body(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = body.to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        // If the other parser finds no JSON, the wrong bytes may be in a field that
        // `Callback::parse` ignores.
        if let (Some(ids), Ok(_)) = (ids(&body), serde_json::from_slice::<Value>(&body)) {
            prop_assert_eq!(Some(ids), reference_ids(&body));
        }
    }

    #[test]
    fn any_bytes_are_parsed_or_rejected_without_a_panic(body: Vec<u8>) {
        if let Some(ids) = ids(&body) {
            prop_assert_eq!(Some(ids), reference_ids(&body));
        }
    }
}
