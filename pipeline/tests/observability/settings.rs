//! The settings, and what README says of them.

use std::collections::BTreeSet;

use testbed::Process;

const README: &str = include_str!("../../../README.md");
const FILE: &str = include_str!("../../../settings/lastseen.env");

/// The names of settings, and which of them change while a process runs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    all: BTreeSet<String>,
    live: BTreeSet<String>,
}

/// What the tables of README have.
fn documented() -> Names {
    let (_, settings) = README.split_once("\n## Settings\n").unwrap();
    let (settings, _) = settings.split_once("\n## ").unwrap();
    let mut names = Names::default();
    for row in settings.lines().filter(|line| line.starts_with("| `")) {
        let cell = row.split(" | ").next().unwrap();
        // As in `POSTGRES_HOST`, `_PORT`; and AMQP_CA stands there by the file that it is mostly in.
        let quoted = cell.split('`').skip(1).step_by(2);
        for name in quoted.map(|name| name.trim_end_matches("_FILE")) {
            let prefix = if name.starts_with('_') { "POSTGRES" } else { "" };
            let name = format!("{prefix}{name}");
            if cell.ends_with('●') {
                names.live.insert(name.clone());
            }
            names.all.insert(name);
        }
    }
    names
}

/// What a service lists when it is asked for help.
async fn listed(service: &str) -> Names {
    let asked = Process::spawn(service, &[], &["--help"]);
    assert_eq!(asked.wait().await.code(), Some(0));
    let help = asked.log();
    let flags = help.iter().filter_map(|line| line.trim_start().strip_prefix("--"));
    let values = flags.filter_map(|flag| flag.split_once(" <")?.1.strip_suffix('>'));
    let aliases = help.iter().filter_map(|line| line.trim().strip_prefix("[alias: --"));
    let aliases = aliases.filter_map(|alias| alias.strip_suffix(']'));
    let aliases = aliases.map(|alias| alias.to_uppercase().replace('-', "_"));
    let text = help.join(" ");
    let (_, live) = text.split_once("can change while the process runs: ").unwrap();
    Names {
        all: values.map(str::to_owned).chain(aliases).collect(),
        live: live.trim_end_matches('.').split(", ").map(str::to_owned).collect(),
    }
}

#[tokio::test]
async fn the_settings_of_all_services_are_written_down_with_those_that_change_while_they_run() {
    let mut told = Names::default();
    for service in ["producer", "consumer", "routine", "viewer"] {
        let Names { all, live } = listed(service).await;
        told.all.extend(all);
        told.live.extend(live);
    }
    // Of `lastseen` alone; and the C library's.
    told.all.extend(["LASTSEEN_DIR".to_owned(), "TZ".to_owned()]);
    assert_eq!(documented(), told);
    for name in told.live {
        assert!(FILE.contains(&name), "settings/lastseen.env does not name {name}");
    }
}
