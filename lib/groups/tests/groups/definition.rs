//! Which definitions are valid, and how invalid ones are explained.

use groups::{Builder, MAX_GROUPS, Need, Weights};

use crate::{SHOP, error, parse};

#[test]
fn all_forms_of_fields_are_read() {
    let tree = parse(concat!(
        "\u{feff}",
        r#"[{"children": [{"name": "b", "objects": [5, "7", "-5--3", 5, "4-6"], "degraded": "2"}],
            "for": "1m 30s", "up": 3, "name": "a"}, {"name": "Köln 1", "up": 9, "degraded": "100%"}]"#
    ));
    let [a, b, empty] = tree.groups().collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(tree.object_ids(), [-5, -4, -3, 4, 5, 6, 7]);
    assert_eq!((tree.path(b), tree.name(empty)), ("a/b".to_owned(), "Köln 1"));
    assert_eq!((tree.rules(a).up, tree.rules(b).degraded), (Need::Count(3), Need::Count(2)));
    assert_eq!(tree.rules(a).hold.as_secs(), 90);
    assert_eq!(tree.rules(empty).degraded.to_string(), "100%");
    assert_eq!(tree.view(empty).status, groups::Status::Up);
}

#[test]
fn several_documents_form_one_forest() {
    let documents: [(&str, &[u8]); 3] =
        [("a.json", br#"{"name": "a"}"#), ("b.json", b"[]"), ("c.json", br#"[{"name": "c"}]"#)];
    let tree = groups::parse(documents, Weights::default()).unwrap();
    assert_eq!(tree.roots().map(|root| tree.name(root)).collect::<String>(), "ac");
    let documents = [documents[0], ("b.json", b"\n{\"name\": \"a\"}".as_slice())];
    let error = groups::parse(documents, Weights::default()).unwrap_err().to_string();
    assert_eq!(error, "b.json:2:10: a: name: \"a\" is the name of a sibling, too");
}

#[test]
fn ranges_reach_both_ends_of_64_bits() {
    let tree = parse(
        r#"{"name": "a", "objects": ["9223372036854775806-9223372036854775807",
            "-9223372036854775808--9223372036854775807", -9223372036854775808]}"#,
    );
    assert_eq!(tree.object_ids(), [i64::MIN, i64::MIN + 1, i64::MAX - 1, i64::MAX]);
    let other = groups::Tree::from_bytes(&tree.to_bytes(0), 0, Weights::default()).unwrap();
    assert_eq!(other.object_ids(), tree.object_ids());
    let all = r#"{"name": "a", "objects": ["-9223372036854775808-9223372036854775807"]}"#;
    let expected = "groups.json:1:27: a: objects: too many; the groups may list 10000000 in total";
    assert_eq!(error(all), expected);
}

#[test]
fn every_mistake_is_located() {
    const RULE: &str = "expected all, any, a number from 1, or a percentage from 1% to 100%, not";
    const ID: &str = "expected a 64-bit id such as 42, or a range such as \"100-199\", not";
    const FIELDS: &str = "name, children, objects, up, degraded, for, maintenance";
    let in_a = [
        (r#""up": "80 %""#, format!("1:20: a: up: {RULE} \"80 %\"")),
        (r#""up": "0%""#, format!("1:20: a: up: {RULE} \"0%\"")),
        (r#""up": "101%""#, format!("1:20: a: up: {RULE} \"101%\"")),
        (r#""up": 0"#, format!("1:20: a: up: {RULE} 0")),
        (r#""up": 1.5"#, format!("1:20: a: up: {RULE} 1.5")),
        (r#""up": "+1""#, format!("1:20: a: up: {RULE} \"+1\"")),
        (r#""degraded": null"#, format!("1:26: a: degraded: {RULE} null")),
        (
            r#""up": 2, "objects": [1, 1]"#,
            "1:20: a: up: 2 is more than the weight 1 of the group".into(),
        ),
        (
            r#""objects": [1], "degraded": "3""#,
            "1:42: a: degraded: 3 is more than the weight 1 of the group".into(),
        ),
        (r#""for": 30"#, "1:21: a: for: expected a duration such as \"30s\", not 30".into()),
        (r#""objects": [1, "x"]"#, format!("1:29: a: objects: {ID} \"x\"")),
        (
            r#""objects": [9223372036854775808]"#,
            format!("1:26: a: objects: {ID} 9223372036854775808"),
        ),
        (r#""objects": [1.0]"#, format!("1:26: a: objects: {ID} 1.0")),
        (r#""objects": ["1-"]"#, format!("1:26: a: objects: {ID} \"1-\"")),
        (r#""objects": [[1]]"#, format!("1:26: a: objects: {ID} an array")),
        (r#""objects": ["9-1"]"#, "1:26: a: objects: 9-1 is empty; put 1 first".into()),
        (r#""objects": 1"#, "1:25: a: objects: expected an array such as [42, \"100-199\"]".into()),
        (r#""children": {}"#, "1:26: a: children: expected an array of groups".into()),
        (r#""children": [1]"#, "1:27: a: expected a group, such as {\"name\": \"shop\"}".into()),
        (r#""colour": 1"#, format!("1:14: a: unknown field \"colour\"; allowed are {FIELDS}")),
        (r#""name": "b""#, format!("1:14: a: repeated field name; allowed once are {FIELDS}")),
        (
            r#""children": [{"name": "c"}, {"name": "d"}, {"name": "c"}]"#,
            "1:66: a/c: name: \"c\" is the name of a sibling, too".into(),
        ),
        (
            r#""maintenance": [{"until": "tomorrow"}]"#,
            "1:40: a: maintenance: expected a time such as 2030-01-01T00:00:00Z, not \"tomorrow\""
                .into(),
        ),
        (r#""maintenance": [{}]"#, "1:31: a: maintenance: until is missing".into()),
        (
            r#""maintenance": [{"from": 1}]"#,
            "1:31: a: maintenance: unknown or repeated field \"from\"; allowed are until, objects"
                .into(),
        ),
        (
            r#""objects": [1], "maintenance": [{"until": "2030-01-01T00:00:00Z", "objects": [1, 5]}]"#,
            "1:95: a: maintenance: object 5 is not in the group".into(),
        ),
        (
            r#""objects": [1], "maintenance": [{"until": "2030-01-01T00:00:00Z", "objects": ["2-5"]}]"#,
            "1:92: a: maintenance: no object of 2-5 is in the group".into(),
        ),
    ];
    for (fields, expected) in in_a {
        assert_eq!(
            error(&format!(r#"{{"name": "a",{fields}}}"#)),
            format!("groups.json:{expected}")
        );
    }
}

#[test]
fn mistakes_in_names_and_in_json_are_located() {
    let plain = "expected a name without / and control characters, and other than . and ..";
    let long = "x".repeat(101);
    let cases = [
        (r#"{"name": "a/b"}"#, format!("1:10: (no name): name: {plain}, not \"a/b\"")),
        (r#"{"name": ".."}"#, format!("1:10: (no name): name: {plain}, not \"..\"")),
        (r#"{"name": "a\u0007"}"#, format!("1:10: (no name): name: {plain}, not \"a\\u{{7}}\"")),
        (
            r#"{"name": " a"}"#,
            "1:10: (no name): name: expected a name without blanks at its start and end, not \" a\"".into(),
        ),
        (
            r#"{"name": ""}"#,
            "1:10: (no name): name: expected 1 to 100 characters, not \"\"".into(),
        ),
        ("{\"name\": \"ä\",\n \"children\": [{}]}", "2:16: ä/(no name): name: missing".into()),
        ("{\"name\": \"ä\", x}", "1:15: ä: invalid JSON:".into()),
        ("{\"name\": \"ä\"", "1:13: ä: invalid JSON:".into()),
        ("{\"name\": \"a\"}\n{}", "2:1: invalid JSON:".into()),
        ("", "1:1: invalid JSON:".into()),
        ("5", "1:1: expected a group or an array of groups".into()),
    ];
    for (json, expected) in cases {
        let error = error(json);
        assert!(error.starts_with(&format!("groups.json:{expected}")), "{json}: {error}");
    }
    let error = error(&SHOP.replace("berlin", &long));
    assert!(error.ends_with(&format!("100 characters, not \"{}…\"", "x".repeat(40))), "{error}");
}

#[test]
fn long_path_is_shortened_in_an_error() {
    let json = (0..10).map(|level| format!("{{\"name\": \"g{level}\", \"children\": ["));
    let error = error(&(json.collect::<String>() + "5"));
    assert!(error.contains(": g0/g1/g2/…/g7/g8/g9: expected a group"), "{error}");
}

#[test]
fn too_many_groups_are_an_error() {
    let mut builder = Builder::default();
    for _ in 0..MAX_GROUPS {
        builder.begin().unwrap();
    }
    let error = builder.begin().unwrap_err().to_string();
    assert!(error.ends_with("too many groups; at most 4000000 are allowed"), "{error}");
}
