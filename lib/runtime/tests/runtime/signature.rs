//! Property tests of signature headers. Inputs that once failed are in
//! `tests/signature.regressions`. Each file in `tests/corpus/signature` holds one header, and its
//! name says whether the header is valid.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::FileFailurePersistence;
use runtime::authenticity::{Claim, Fingerprint, ID, Keys, Refusal, SIGNATURE, TIMESTAMP};

// The test vector that Standard Webhooks publishes.
const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const MESSAGE: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const SECONDS: u64 = 1_614_265_330;
const BODY: &[u8] = br#"{"test": 2432232314}"#;
const VALID: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

fn keys() -> Keys {
    KEY.parse().unwrap()
}

fn time() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(SECONDS)
}

fn headers(id: &str, timestamp: &str, signature: &[u8]) -> HeaderMap {
    let value = |bytes: &[u8]| HeaderValue::from_bytes(bytes).unwrap();
    HeaderMap::from_iter([
        (ID, value(id.as_bytes())),
        (TIMESTAMP, value(timestamp.as_bytes())),
        (SIGNATURE, value(signature)),
    ])
}

fn verified(headers: &HeaderMap, keys: &Keys, body: &[u8]) -> Result<Fingerprint, Refusal> {
    Claim::read(headers, time())?.verify(keys, body)
}

/// Whether the published message is accepted with this header.
fn is_accepted(signature: &[u8]) -> bool {
    verified(&headers(MESSAGE, &SECONDS.to_string(), signature), &keys(), BODY).is_ok()
}

/// Whether one of the items of the header, which are separated by spaces, is exactly [`VALID`].
fn contains_valid_signature(header: &[u8]) -> bool {
    header.split(|&byte| byte == b' ').any(|item| item == VALID.as_bytes())
}

fn config() -> ProptestConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/signature.regressions");
    let regressions = FileFailurePersistence::Direct(path);
    ProptestConfig { failure_persistence: Some(Box::new(regressions)), ..ProptestConfig::default() }
}

#[test]
fn only_corpus_files_named_valid_are_valid() {
    let corpus = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/signature"));
    let mut valid = 0;
    for entry in corpus.unwrap() {
        let path = entry.unwrap().path();
        let expected = path.file_name().unwrap().to_str().unwrap().starts_with("valid");
        assert_eq!(is_accepted(&std::fs::read(&path).unwrap()), expected, "{}", path.display());
        valid += u32::from(expected);
    }
    assert!(valid > 0);
}

fn renamed(headers: &HeaderMap, names: &[(&'static str, &'static str)]) -> HeaderMap {
    let name = |name: &HeaderName| {
        let to = names.iter().find(|(from, _)| name == from).map(|(_, to)| *to);
        to.map_or_else(|| name.clone(), HeaderName::from_static)
    };
    headers.iter().map(|(key, value)| (name(key), value.clone())).collect()
}

const TO_SVIX: [(&str, &str); 3] = [
    ("webhook-id", "svix-id"),
    ("webhook-timestamp", "svix-timestamp"),
    ("webhook-signature", "svix-signature"),
];

/// Field case 8.1.
#[test]
fn headers_of_svix_are_accepted_and_never_mixed() {
    let standard = headers(MESSAGE, &SECONDS.to_string(), VALID.as_bytes());
    assert!(verified(&renamed(&standard, &TO_SVIX), &keys(), BODY).is_ok());
    for (mixed, missing) in [(0, "webhook-id"), (1, "webhook-timestamp"), (2, "webhook-signature")]
    {
        let refusal = verified(&renamed(&standard, &TO_SVIX[mixed..=mixed]), &keys(), BODY);
        assert_eq!(refusal, Err(Refusal::Missing(missing)));
    }
    // If both sets are present, only the standard one is read.
    let mut both = renamed(&standard, &TO_SVIX);
    both.extend(headers(MESSAGE, &SECONDS.to_string(), b"v1,nonsense"));
    assert_eq!(verified(&both, &keys(), BODY), Err(Refusal::NoMatch("webhook-signature")));
    let unsigned = verified(&HeaderMap::new(), &keys(), BODY);
    assert_eq!(unsigned, Err(Refusal::Missing("webhook-id")));
}

/// Field case 8.2.
#[test]
fn timestamp_in_milliseconds_is_named_as_such() {
    let headers = headers(MESSAGE, &(SECONDS * 1_000).to_string(), VALID.as_bytes());
    let refusal = verified(&headers, &keys(), BODY).unwrap_err();
    assert_eq!(refusal, Refusal::Milliseconds("webhook-timestamp"));
    assert!(refusal.to_string().contains("milliseconds"), "{refusal}");
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn signature_with_a_changed_letter_is_rejected(at: Index, letter in 0x20_u8..0x7f) {
        let mut signature = VALID.as_bytes().to_vec();
        let at = at.index(signature.len());
        signature[at] = letter;
        // The new letter may be the one that was there.
        prop_assert_eq!(is_accepted(&signature), contains_valid_signature(&signature));
    }

    #[test]
    fn signature_with_a_missing_or_added_letter_is_rejected(
        at: Index,
        letter in 0x20_u8..0x7f,
    ) {
        let mut shorter = VALID.as_bytes().to_vec();
        shorter.remove(at.index(VALID.len()));
        prop_assert!(!is_accepted(&shorter));
        let mut longer = VALID.as_bytes().to_vec();
        longer.insert(at.index(VALID.len() + 1), letter);
        // A space before or after the signature leaves it intact.
        prop_assert_eq!(is_accepted(&longer), contains_valid_signature(&longer));
    }

    #[test]
    fn list_is_accepted_only_if_it_has_the_valid_signature(
        before in vec("v1,[A-Za-z0-9+/]{43}=|v1a,[A-Za-z0-9+/]{8}|v1|[!-~]{0,60}", 0..6),
        with_it: bool,
        after in vec("v1,[A-Za-z0-9+/]{42}==|v2,[A-Za-z0-9+/]{43}=|[!-~]{0,60}", 0..6),
    ) {
        let valid = with_it.then(|| VALID.to_owned());
        let list = [before, valid.into_iter().collect(), after].concat().join(" ");
        prop_assert_eq!(is_accepted(list.as_bytes()), with_it);
    }

    #[test]
    fn any_bytes_are_accepted_only_with_the_valid_signature(
        bytes in vec(prop_oneof![0x20_u8..0x7f, 0x80..=0xff_u8, Just(b'\t')], 0..200),
    ) {
        prop_assert_eq!(is_accepted(&bytes), contains_valid_signature(&bytes));
    }

    #[test]
    fn signature_is_valid_only_for_its_key_and_content(
        key: [u8; 24],
        id in "[A-Za-z0-9_-]{1,40}",
        other_id in "[A-Za-z0-9_-]{1,40}",
        body: Vec<u8>,
        other_body: Vec<u8>,
        seconds in SECONDS - 300..=SECONDS + 300,
        other_seconds in SECONDS - 300..=SECONDS + 300,
    ) {
        use base64::Engine as _;
        let key = format!("whsec_{}", base64::prelude::BASE64_STANDARD.encode(key));
        let sent_at = UNIX_EPOCH + Duration::from_secs(seconds);
        let signed = key.parse::<Keys>().unwrap().sign(&id, sent_at, &body);
        let is_accepted = |keys: &str, id: &str, timestamp: &str, body: &[u8]| {
            let headers = headers(id, timestamp, signed.signature.as_bytes());
            verified(&headers, &keys.parse().unwrap(), body).is_ok()
        };
        let at = signed.timestamp.as_str();
        prop_assert!(is_accepted(&key, &id, at, &body));
        let both = format!("{KEY} {key}");
        prop_assert!(is_accepted(&both, &id, at, &body));
        prop_assert!(!is_accepted(KEY, &id, at, &body));
        prop_assert_eq!(is_accepted(&key, &other_id, at, &body), other_id == id);
        prop_assert_eq!(is_accepted(&key, &id, at, &other_body), other_body == body);
        let other_at = other_seconds.to_string();
        prop_assert_eq!(is_accepted(&key, &id, &other_at, &body), other_seconds == seconds);
        // The signature covers the timestamp as text, so a leading zero invalidates it.
        let with_zero = format!("0{at}");
        prop_assert!(!is_accepted(&key, &id, &with_zero, &body));
    }

    #[test]
    fn clock_may_differ_by_five_minutes_and_no_more(ahead in -1_000_i64..1_000) {
        let sent_at = SECONDS.checked_add_signed(ahead).unwrap();
        let signed = keys().sign(MESSAGE, UNIX_EPOCH + Duration::from_secs(sent_at), BODY);
        let headers = headers(MESSAGE, &signed.timestamp, signed.signature.as_bytes());
        prop_assert_eq!(verified(&headers, &keys(), BODY).is_ok(), ahead.abs() <= 300);
    }
}
