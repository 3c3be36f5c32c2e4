//! All cases, in one file for each component that fails.

use crate::case::Case;

mod broker;
mod cluster;
mod consumer;
mod database;
mod fleet;
mod history;
mod machine;
mod producer;
mod routine;
mod status_api;
mod viewer;

/// All cases, in the order of the table.
pub(crate) fn all() -> Vec<Case> {
    let parts = [
        broker::cases(),
        cluster::cases(),
        fleet::cases(),
        producer::cases(),
        consumer::cases(),
        database::cases(),
        status_api::cases(),
        routine::cases(),
        machine::cases(),
        viewer::cases(),
        history::cases(),
    ];
    parts.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// Adds all words in the sources below `folder`.
    fn add_words(folder: &Path, words: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let is_source = path.extension().is_some_and(|ending| ending == "rs");
            if is_source {
                let text = fs::read_to_string(&path).unwrap();
                let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                words.extend(text.split(|c| !is_word(c)).map(str::to_owned));
            } else if entry.file_type().unwrap().is_dir() && entry.file_name() != "target" {
                add_words(&path, words);
            }
        }
    }

    #[test]
    fn every_test_cited_by_a_field_case_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().parent().unwrap();
        let mut words = BTreeSet::new();
        add_words(root, &mut words);
        let table = fs::read_to_string(root.join("tests/end-to-end/cases.md")).unwrap();
        let is_name = |word: &&str| word.len() >= 10 && word.contains('_');
        let mut found = 0;
        for row in table.lines().filter(|line| line.starts_with("| ")) {
            let cited = row.split(" | ").nth(2).unwrap();
            let quoted = cited.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for name in quoted.filter(is_name) {
                assert!(words.contains(name), "there is no test {name}: {row}");
                found += 1;
            }
        }
        assert!(found > 100, "only {found} names were recognised");
    }

    #[test]
    fn no_case_name_contains_another_one() {
        let cases = super::all();
        assert!(cases.iter().all(|case| !case.fault.is_empty()));
        let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
        for name in &names {
            let matched = names.iter().filter(|other| other.contains(name)).count();
            assert_eq!(matched, 1, "`make faults CASE={name}` would run {matched} cases");
        }
    }
}
