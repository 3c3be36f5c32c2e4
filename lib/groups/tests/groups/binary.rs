//! The binary form: what it keeps, and what it rejects.

use groups::{BinaryError, Tree, Weights};
use twox_hash::XxHash3_64;

use crate::{SHOP, parse};

fn read(bytes: &[u8]) -> Result<Tree, BinaryError> {
    Tree::from_bytes(bytes, 7, Weights::default())
}

fn small() -> Vec<u8> {
    parse(&SHOP.replace("100-199", "100-102").replace(
        "\"up\": \"80%\"",
        r#""up": 2, "maintenance": [{"until": "2030-01-01T00:00:00+01:00"}]"#,
    ))
    .to_bytes(7)
}

#[test]
fn binary_form_keeps_the_definition() {
    let bytes = small();
    let tree = read(&bytes).unwrap();
    assert_eq!(tree.to_bytes(7), bytes);
    assert_eq!(tree.object_ids(), [7, 8, 42, 100, 101, 102]);
    assert_eq!(tree.next_maintenance_end(), Some(1_893_452_400_000_000));
}

#[test]
fn any_changed_byte_and_any_missing_end_is_an_error() {
    let bytes = small();
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1 << bit;
            assert!(read(&damaged).is_err(), "bit {bit} of byte {place}");
        }
        assert!(read(&bytes[..place]).is_err(), "cut off at byte {place}");
    }
    assert!(read(&[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn wrong_content_with_a_right_hash_never_panics() {
    let bytes = small();
    for place in 28..bytes.len() {
        for value in 0..=u8::MAX {
            let mut wrong = bytes.clone();
            wrong[place] = value;
            let hash = XxHash3_64::oneshot(&wrong[28..]).to_le_bytes();
            wrong[20..28].copy_from_slice(&hash);
            if let Ok(mut tree) = read(&wrong) {
                let mut changed = Vec::new();
                tree.end_maintenance(u64::MAX, &mut changed);
                tree.set_facts(|_, _| groups::Fact::Online);
                for id in tree.object_ids().to_vec() {
                    tree.set_fact(tree.object(id).unwrap(), groups::Fact::Gone, &mut changed);
                }
                for group in tree.groups() {
                    let _ =
                        (tree.path(group), tree.because(group, usize::MAX), tree.objects_of(group));
                }
            }
        }
    }
}

#[test]
fn other_files_versions_and_sources_are_named() {
    let bytes = small();
    assert_eq!(read(b"").unwrap_err(), BinaryError::Foreign);
    assert_eq!(read(br#"{"name": "shop"}"#).unwrap_err(), BinaryError::Foreign);
    let other_source = Tree::from_bytes(&bytes, 8, Weights::default()).unwrap_err();
    assert_eq!(other_source, BinaryError::OtherSource);
    let mut other_version = bytes.clone();
    other_version[8] += 1;
    assert!(matches!(read(&other_version), Err(BinaryError::OtherVersion(_))));
    let mut damaged = bytes;
    *damaged.last_mut().unwrap() ^= 1;
    assert!(matches!(read(&damaged), Err(BinaryError::Damaged(_))));
}

#[test]
fn source_hash_depends_on_names_contents_and_order() {
    let hash = |documents: &[(&str, &[u8])]| groups::source_hash(documents.iter().copied());
    let hashes = [
        hash(&[]),
        hash(&[("a", b"1")]),
        hash(&[("b", b"1")]),
        hash(&[("a", b"2")]),
        hash(&[("a", b"1"), ("b", b"2")]),
        hash(&[("b", b"2"), ("a", b"1")]),
    ];
    assert!((1..hashes.len()).all(|place| !hashes[..place].contains(&hashes[place])));
}
