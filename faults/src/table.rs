//! The table, on the terminal and in a file.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::case::Case;
use crate::figures::Figures;
use crate::load::Rate;

const HEAD: &str = "\
| case | fault | accepted 2xx | not 2xx | unanswered after 1 s | cut off | lost | looked up twice | dead-lettered | recovery, s | caught up, s | outcome |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
";

/// One case's line.
pub(crate) struct Row {
    name: &'static str,
    line: String,
    pub(crate) breaches: Vec<String>,
}

impl Row {
    /// The row of a case; without figures if it broke off.
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
    let Figures {
        accepted,
        not_2xx,
        unanswered,
        cut_off,
        lost,
        looked_up_twice,
        dead_letters,
        recovery,
        caught_up,
    } = figures;
    let seconds = |duration: &Duration| format!("{:.1}", duration.as_secs_f64());
    let counts = [accepted, not_2xx, unanswered, cut_off, lost, looked_up_twice, dead_letters];
    let mut cells: Vec<String> = counts.iter().map(ToString::to_string).collect();
    cells.push(recovery.as_ref().map_or_else(|| "never".to_owned(), seconds));
    cells.push(seconds(caught_up));
    cells
}

/// The table of these rows.
pub(crate) fn text(rows: &[Row]) -> String {
    let lines = rows.iter().fold(String::new(), |mut lines, row| {
        let _ = writeln!(lines, "{}", row.line);
        lines
    });
    format!("\n{HEAD}{lines}")
}

/// Writes the rows into the file at `path`, which keeps those of cases that were not run, in the order
/// of `names`.
pub(crate) fn write(path: &Path, names: &[&str], rows: &[Row]) {
    let before = std::fs::read_to_string(path).unwrap_or_default();
    let line_of = |name: &&str| {
        let start = format!("| `{name}` |");
        let now = rows.iter().find(|row| row.name == *name).map(|row| row.line.as_str());
        now.or_else(|| before.lines().find(|line| line.starts_with(&start)))
    };
    let lines: Vec<&str> = names.iter().filter_map(line_of).collect();
    let text = format!("{}\n{HEAD}{}\n\n{LEGEND}", introduction(), lines.join("\n"));
    std::fs::write(path, text).expect("the table's file should be writable");
}

fn introduction() -> String {
    let Rate { callbacks, ids } = Rate::USUAL;
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let [rabbitmq, postgres] = testbed::server_versions();
    format!(
        "\
# What faults cost

Measured by `make faults`, which runs every case, or `make faults CASE=broker_killed`, which runs one. Each case starts a RabbitMQ node, a
Postgres cluster, a status API (20 to 49 ms, even ids online), a producer, a consumer and a routine of its own, has `tester load` post
{callbacks} callbacks per second of {ids} new ids each, brings about the fault, and then holds the partner's ledger against what the status API was asked, what the table holds and which dead letters
there are. All of it shares one machine. The last run that wrote here: {cores} cores, RabbitMQ {rabbitmq}, Postgres {postgres}, {build} build, {callbacks} callbacks per second.
"
    )
}

const LEGEND: &str = "\
- **accepted 2xx, not 2xx**: callbacks with a complete answer within a second of when they were due, which is what the rate says and not when they went out.
- **unanswered after 1 s**: callbacks without one, for whatever reason, such as a connection that was refused or broke.
- **cut off**: callbacks whose connection broke or was refused while the case had killed the only producer there was. Nobody was there who could have answered; they are not accepted, and count nowhere else.
- **lost**: ids of callbacks answered 2xx, however late, that in the end have neither a lookup that said online or offline (and for online, a committed row) nor lie among the dead letters.
- **looked up twice**: ids for which the status API was asked again although it had said, or was about to say, online or offline. Failed lookups do not count. Delivery is at-least-once: what a process held when it died is looked up again, and so is what went to the spool because the broker confirmed it too late.
- **recovery, s**: from the end of the fault (a killed server takes connections again, a silent one speaks again) until a callback posted after it has been accepted and an object looked up after it is committed, with the load going on; where lookups that had begun before it can still be committed, that callback's own object. What waited meanwhile goes first; how long that takes is the next column. If a case has several faults, the longest.
- **caught up, s**: from the end of the fault until the last id that had been accepted before it was settled.
- **outcome**: `held` if lost and unanswered are 0, recovery took no more than 10 s, and nothing else stands in the row that the case does not allow; and the day of the measurement.
";
