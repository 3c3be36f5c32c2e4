//! Formats the table of all figures, and writes it to a file.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::case::Case;
use crate::figures::Figures;
use crate::load::Rate;

const HEAD: &str = "\
| case | fault | accepted 2xx | not 2xx | unanswered after 1 s | cut off | lost | looked up twice | dead-lettered | recovery, s | caught up, s | outcome |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
";

/// The row of one case.
pub(crate) struct Row {
    name: &'static str,
    line: String,
    pub(crate) breaches: Vec<String>,
}

impl Row {
    /// The row of a case. A case that panicked has no figures.
    pub(crate) fn new(case: &Case, figures: Option<Figures>, breaches: Vec<String>) -> Self {
        let cells = match figures {
            Some(figures) => cells(&figures),
            None => vec!["–".to_owned(); 9],
        };
        let today = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let outcome = if breaches.is_empty() { "held" } else { "**breached**" };
        let line = format!(
            "| `{}` | {} | {} | {outcome}, {} |",
            case.name,
            case.fault,
            cells.join(" | "),
            &today[..10]
        );
        Self { name: case.name, line, breaches }
    }
}

fn cells(figures: &Figures) -> Vec<String> {
    let f = figures;
    let seconds = |duration: &Duration| format!("{:.1}", duration.as_secs_f64());
    let counts = [f.accepted, f.not_2xx, f.unanswered, f.cut_off];
    let counts = counts.into_iter().chain([f.lost, f.looked_up_twice, f.dead_letters]);
    let mut cells: Vec<String> = counts.map(|count| count.to_string()).collect();
    cells.push(f.recovery.as_ref().map_or_else(|| "never".to_owned(), seconds));
    cells.push(seconds(&f.caught_up));
    cells
}

/// The table of these rows.
pub(crate) fn text(rows: &[Row]) -> String {
    let lines: Vec<&str> = rows.iter().map(|row| row.line.as_str()).collect();
    format!("\n{HEAD}{}\n", lines.join("\n"))
}

/// Writes the rows into the section of these servers in the file at `path`. The other sections stay
/// as they are, and so do the rows of cases that were not run; rows are in the order of `names`.
pub(crate) fn write(path: &Path, names: &[&str], rows: &[Row]) {
    let before = std::fs::read_to_string(path).unwrap_or_default();
    let servers = servers();
    let mut sections: Vec<Section> = sections(&before).collect();
    let earlier = sections.iter().position(|section| section.servers == servers);
    let earlier = earlier.map(|at| sections.remove(at).text).unwrap_or_default();
    let line_of = |name: &&str| {
        let start = format!("| `{name}` |");
        let now = rows.iter().find(|row| row.name == *name).map(|row| row.line.as_str());
        now.or_else(|| earlier.lines().find(|line| line.starts_with(&start)))
    };
    let lines: Vec<&str> = names.iter().filter_map(line_of).collect();
    let text = format!("{}\n{HEAD}{}\n", circumstances(), lines.join("\n"));
    sections.push(Section { servers, text });
    sections.sort_by_key(|section| version_numbers(&section.servers));
    let tables = sections.iter().map(|Section { servers, text }| format!("## {servers}\n{text}\n"));
    let text = format!("{}{}{LEGEND}", introduction(), tables.collect::<String>());
    std::fs::write(path, text).expect("the table's file should be writable");
}

/// The measurements on one set of servers.
struct Section {
    /// The heading, such as `RabbitMQ 3.10, Postgres 15`.
    servers: String,
    /// The text below the heading.
    text: String,
}

fn sections(file: &str) -> impl Iterator<Item = Section> {
    file.split("\n## ").skip(1).filter_map(|section| {
        let (servers, text) = section.split_once('\n')?;
        if servers == LEGEND_TITLE {
            return None;
        }
        Some(Section { servers: servers.to_owned(), text: text.trim_end().to_owned() + "\n" })
    })
}

/// The tested servers with the parts of their versions on which their features depend.
fn servers() -> String {
    let [rabbitmq, postgres] = testkit::server_versions();
    let rabbitmq: Vec<&str> = rabbitmq.split('.').take(2).collect();
    let postgres = postgres.split('.').next().unwrap_or_default();
    format!("RabbitMQ {}, Postgres {postgres}", rabbitmq.join("."))
}

fn version_numbers(servers: &str) -> Vec<u32> {
    servers.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn introduction() -> String {
    let Rate { callbacks, ids } = Rate::USUAL;
    format!(
        "\
# What faults cost

Measured by `make faults`, which runs every case, or `make faults CASE=broker_killed`, which runs one; `scripts/with-servers --newest make faults` does so on
Debian's newest servers. Each case starts its own RabbitMQ node, Postgres cluster, status API (20 to 49 ms, even ids are online), producer, consumer and
routine. `tester load` posts {callbacks} callbacks per second of {ids} new ids each, the case causes the fault, and then compares the partner's ledger with
the lookups that the status API received, the rows of the table and the dead letters. Everything shares one machine. [cases.md](tests/end-to-end/cases.md) lists the
failures from the field that led to many of the cases.

"
    )
}

fn circumstances() -> String {
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let [rabbitmq, postgres] = testkit::server_versions();
    let Rate { callbacks, .. } = Rate::USUAL;
    format!(
        "
The last run: {cores} cores, RabbitMQ {rabbitmq}, Postgres {postgres}, {build} build, {callbacks} callbacks per second.
"
    )
}

const LEGEND_TITLE: &str = "Columns";

const LEGEND: &str = "\
## Columns

- **accepted 2xx, not 2xx**: callbacks with a complete response within a second of the time at which they were due. The rate decides when a callback is due, not the time at which it was sent.
- **unanswered after 1 s**: callbacks without a complete response in that time, for any reason, such as a refused or broken connection.
- **cut off**: callbacks whose connection was refused or broke after the case had killed the only producer. No process could have answered them. They are not accepted, and no other column counts them.
- **lost**: ids of callbacks answered 2xx, however late, for which at the end there is neither a lookup that said online or offline (with a committed row if online) nor a dead letter.
- **looked up twice**: ids that the status API was asked about again although it had already said online or offline, or was about to. Failed lookups do not count. Delivery is at-least-once: the deliveries of a killed process are looked up again, and so are messages that went to the spool because the broker confirmed them too late.
- **recovery, s**: from the end of the fault (a killed server accepts connections again, a silent one responds again) until a callback posted after it has been accepted and an object looked up after it is committed, under load. Where lookups that began before the end of the fault can still be committed, it is the object of that callback. The backlog is processed first; the next column says how long that takes. If a case has several faults, the longest recovery counts.
- **caught up, s**: from the end of the fault until the last id that was accepted before it was settled.
- **outcome**: `held` if lost and unanswered are 0, recovery took at most 10 s, and every other figure is within what the case allows; and the day of the measurement.
";
