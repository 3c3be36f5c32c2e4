//! The table of measurements.

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::usage::Cost;

const HEAD: &str = "\
| part | what | limit | plain peer | ours | ratio | p50 ms | p99 ms | peak MB | CPU s per 100,000 | goals and notes |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
";

/// One measurement of our services and its limit.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) part: String,
    pub(crate) what: String,
    /// The unit of `limit` and `ours`.
    pub(crate) unit: &'static str,
    pub(crate) limit: Option<f64>,
    /// The result of a plain program in another language.
    pub(crate) peer: Option<f64>,
    pub(crate) ours: f64,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) cost: Option<Cost>,
    pub(crate) goals: Vec<Goal>,
    pub(crate) note: Option<String>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum Goal {
    RatioAtLeast(f64),
    /// Our result divided by the peer's.
    PeerRatioAtLeast(f64),
    OursAtLeast(f64),
    OursAtMost(f64),
    P50MsAtMost(f64),
    P99MsAtMost(f64),
    PeakMbAtMost(f64),
    /// Per 100,000 units of work.
    CpuSecondsAtMost(f64),
}

impl Row {
    /// A measurement with only its main figure.
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, ours: f64) -> Self {
        Self {
            part: String::new(),
            what: what.into(),
            unit,
            limit: None,
            peer: None,
            ours,
            p50_ms: None,
            p99_ms: None,
            cost: None,
            goals: Vec::new(),
            note: None,
        }
    }

    pub(crate) fn ratio(&self) -> Option<f64> {
        self.limit.map(|limit| self.ours / limit)
    }

    /// Whether the row reaches `goal`. A row without the figure of the goal does not.
    fn reaches(&self, goal: Goal) -> bool {
        match goal {
            Goal::RatioAtLeast(least) => self.ratio().is_some_and(|ratio| ratio >= least),
            Goal::PeerRatioAtLeast(least) => {
                self.peer.is_some_and(|peer| self.ours / peer >= least)
            }
            Goal::OursAtLeast(least) => self.ours >= least,
            Goal::OursAtMost(most) => self.ours <= most,
            Goal::P50MsAtMost(most) => self.p50_ms.is_some_and(|p50| p50 <= most),
            Goal::P99MsAtMost(most) => self.p99_ms.is_some_and(|p99| p99 <= most),
            Goal::PeakMbAtMost(most) => self.cost.is_some_and(|cost| cost.peak_mb <= most),
            Goal::CpuSecondsAtMost(most) => {
                self.cost.is_some_and(|cost| cost.cpu_seconds_per_100k <= most)
            }
        }
    }

    fn line(&self) -> String {
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
        };
        let goals = self.goals.iter().map(|goal| self.goal_text(*goal));
        let last: Vec<String> = goals.chain(self.note.clone()).collect();
        format!(
            "| {} | {} | {} | {} | {} {} | {} | {} | {} | {} | {} | {} |",
            self.part,
            self.what,
            self.limit.map_or_else(|| "–".to_owned(), rounded),
            self.peer.map_or_else(|| "–".to_owned(), rounded),
            rounded(self.ours),
            self.unit,
            optional(self.ratio(), 2),
            optional(self.p50_ms, 1),
            optional(self.p99_ms, 1),
            optional(self.cost.map(|cost| cost.peak_mb), 1),
            optional(self.cost.map(|cost| cost.cpu_seconds_per_100k), 2),
            if last.is_empty() { "–".to_owned() } else { last.join(", ") },
        )
    }

    fn goal_text(&self, goal: Goal) -> String {
        let text = match goal {
            Goal::RatioAtLeast(least) => format!("ratio ≥ {least}"),
            Goal::PeerRatioAtLeast(least) => format!("≥ {least} of the peer"),
            Goal::OursAtLeast(least) => format!("≥ {}", rounded(least)),
            Goal::OursAtMost(most) => format!("≤ {}", rounded(most)),
            Goal::P50MsAtMost(most) => format!("p50 ≤ {most} ms"),
            Goal::P99MsAtMost(most) => format!("p99 ≤ {most} ms"),
            Goal::PeakMbAtMost(most) => format!("peak ≤ {most:.0} MB"),
            Goal::CpuSecondsAtMost(most) => format!("CPU ≤ {most} s"),
        };
        if self.reaches(goal) { text } else { format!("**missed: {text}**") }
    }
}

pub(crate) fn text(rows: &[Row]) -> String {
    let lines: Vec<String> = rows.iter().map(Row::line).collect();
    format!("\n{HEAD}{}\n", lines.join("\n"))
}

pub(crate) fn write(path: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(rows)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// A row of an earlier run.
#[derive(Debug, Deserialize)]
struct Stored {
    part: String,
    what: String,
    limit: Option<f64>,
    ours: f64,
}

/// Describes the rows whose ratio has fallen by more than a tenth since the file at `path`. Rows
/// without a limit or a goal are not compared, because they depend mostly on the machine.
pub(crate) fn fallen(path: &Path, rows: &[Row]) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let stored: Vec<Stored> = serde_json::from_str(&text)?;
    let before = |row: &Row| {
        let stored = stored.iter().find(|old| old.part == row.part && old.what == row.what)?;
        stored.limit.map(|limit| stored.ours / limit)
    };
    let fallen = rows.iter().filter(|row| !row.goals.is_empty()).filter_map(|row| {
        let (before, now) = (before(row)?, row.ratio()?);
        (now < before * 0.9)
            .then(|| format!("{}, {}: {now:.2} instead of {before:.2}", row.part, row.what))
    });
    Ok(fallen.collect())
}

/// Formats a number with commas between thousands, and with a decimal only below 100.
fn rounded(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_goal_is_marked() {
        let mut row = Row::new("callbacks", "/s", 16_000.0);
        row.limit = Some(20_000.0);
        row.goals = vec![Goal::RatioAtLeast(0.8), Goal::OursAtLeast(16_700.0)];
        assert!(row.line().ends_with("| ratio ≥ 0.8, **missed: ≥ 16,700** |"), "{}", row.line());
    }

    #[test]
    fn goal_without_a_measurement_is_missed() {
        let row = Row::new("callbacks", "/s", 16_000.0);
        assert!(!row.reaches(Goal::RatioAtLeast(0.1)));
        assert!(!row.reaches(Goal::P99MsAtMost(1_000.0)));
        assert!(!row.reaches(Goal::PeakMbAtMost(1_000.0)));
    }

    #[test]
    fn ratio_that_fell_by_more_than_a_tenth_is_reported() {
        let row = |what: &str, ours| {
            let mut row = Row::new(what, "/s", ours);
            row.limit = Some(100.0);
            row.goals = vec![Goal::RatioAtLeast(0.5)];
            row
        };
        let path = std::env::temp_dir().join(format!("bench-{}.json", std::process::id()));
        write(&path, &[row("a", 80.0), row("b", 80.0)]).unwrap();
        // Row "c" was not measured before, so it cannot have fallen.
        let mut rows = vec![row("a", 73.0), row("b", 71.0), row("c", 1.0)];
        // A row without a goal is only for comparison.
        rows.push(Row { goals: Vec::new(), ..row("a", 1.0) });
        let fallen = fallen(&path, &rows);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(fallen.unwrap(), [", b: 0.71 instead of 0.80"]);
    }

    #[test]
    fn thousands_are_separated_by_commas() {
        assert_eq!(
            [7.25, 100.4, 16_700.0, 1_234_567.0].map(rounded),
            ["7.2", "100", "16,700", "1,234,567"]
        );
    }
}
