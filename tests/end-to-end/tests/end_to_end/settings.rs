//! `docs/configuration.md` lists exactly the settings that the services list in their `--help`.

use std::collections::BTreeSet;

use testkit::Process;

const CONFIGURATION: &str = include_str!("../../../../docs/configuration.md");
const FILES: [(&str, &str); 2] = [
    ("settings/lastseen.env", include_str!("../../../../settings/lastseen.env")),
    (
        "deploy/kubernetes/base/lastseen.env",
        include_str!("../../../../deploy/kubernetes/base/lastseen.env"),
    ),
];

/// The names of settings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) all: BTreeSet<String>,
    pub(crate) reloadable: BTreeSet<String>,
}

/// The settings in the tables of `docs/configuration.md`.
fn documented() -> Names {
    let (_, settings) = CONFIGURATION.split_once("\n## Settings\n").unwrap();
    let (settings, _) = settings.split_once("\n## ").unwrap();
    let mut names = Names::default();
    for row in settings.lines().filter(|line| line.starts_with("| `")) {
        let cell = row.split(" | ").next().unwrap();
        // A cell may hold the short form `POSTGRES_HOST`, `_PORT`, and lists `AMQP_CA` as
        // `AMQP_CA_FILE`.
        let quoted = cell.split('`').skip(1).step_by(2);
        for name in quoted {
            let name = if name == "AMQP_CA_FILE" { "AMQP_CA" } else { name };
            let prefix = if name.starts_with('_') { "POSTGRES" } else { "" };
            let name = format!("{prefix}{name}");
            if cell.ends_with('●') {
                names.reloadable.insert(name.clone());
            }
            names.all.insert(name);
        }
    }
    names
}

/// The lines of a service's `--help`.
pub(crate) async fn help_of(service: &str) -> Vec<String> {
    let process = Process::spawn(service, &[], &["--help"]);
    assert_eq!(process.wait().await.code(), Some(0));
    process.log()
}

/// The default of a setting in the `--help` of a service.
#[track_caller]
pub(crate) fn default_in(help: &[String], name: &str) -> String {
    let value = format!(" <{name}>");
    let lines = help.iter().skip_while(|line| !line.ends_with(&value)).skip(1);
    let mut lines = lines.take_while(|line| !line.trim_start().starts_with("--"));
    let default = lines.find_map(|line| line.trim().strip_prefix("[default: ")?.strip_suffix(']'));
    default.unwrap_or_else(|| panic!("{name} has no default")).to_owned()
}

/// The settings that a service lists in its `--help`.
pub(crate) async fn listed(service: &str) -> Names {
    let help = help_of(service).await;
    let flags = help.iter().filter_map(|line| line.trim_start().strip_prefix("--"));
    let values = flags.filter_map(|flag| flag.split_once(" <")?.1.strip_suffix('>'));
    let aliases = help.iter().filter_map(|line| line.trim().strip_prefix("[alias: --"));
    let aliases = aliases.filter_map(|alias| alias.strip_suffix(']'));
    let aliases = aliases.map(|alias| alias.to_uppercase().replace('-', "_"));
    let text = help.join(" ");
    let (_, reloadable) = text.split_once("can change while the process runs: ").unwrap();
    Names {
        all: values.map(str::to_owned).chain(aliases).collect(),
        reloadable: reloadable.trim_end_matches('.').split(", ").map(str::to_owned).collect(),
    }
}

#[tokio::test]
async fn configuration_document_lists_and_marks_all_settings() {
    let mut expected = Names::default();
    for service in ["producer", "consumer", "routine", "viewer"] {
        let Names { all, reloadable } = listed(service).await;
        expected.all.extend(all);
        expected.reloadable.extend(reloadable);
    }
    // Only `lastseen` has LASTSEEN_DIR. Services without a database read TZ without listing it.
    expected.all.extend(["LASTSEEN_DIR".to_owned(), "TZ".to_owned()]);
    assert_eq!(documented(), expected);
    for name in expected.reloadable {
        for (file, content) in FILES {
            assert!(content.contains(&name), "{file} does not name {name}");
        }
    }
}
