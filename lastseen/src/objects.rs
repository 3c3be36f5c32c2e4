//! `lastseen objects`: lists the objects that are online.

use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use runtime::CancellationToken;
use runtime::settings::{self, display};
use serde_json::json;
use store::{Change, History, Moment, Object, Objects};

use crate::history::rounded;
use crate::{print_line, unless_stopped};

/// Rows read at a time.
const PAGE_ROWS: u32 = 1_000;

/// How to list the objects.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct List {
    /// Print one JSON object per line, with id, `last_seen` and `age_seconds`
    #[arg(long)]
    pub json: bool,
    /// List the objects that are gone instead, from the history
    #[arg(long)]
    pub gone: bool,
    /// With --gone: only those that are gone since at most this time
    #[arg(long, requires = "gone", value_parser = settings::duration(WITHIN), default_value = "1d")]
    pub within: Duration,
}

const WITHIN: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24 * 3_650);

/// Prints the objects that were seen within `ttl`, in ascending order of their ids. Older rows are
/// omitted, because they remain in the table while no routine runs.
///
/// # Errors
/// When the table cannot be read, the list cannot be written, or a signal stops the command.
pub(crate) async fn list(
    command: &List,
    config: &store::Config,
    ttl: Duration,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    if command.gone {
        return list_gone(command, config, shutdown).await;
    }
    let mut objects = unless_stopped(shutdown, Box::pin(Objects::open(config))).await?;
    let mut after = None;
    let mut is_empty = true;
    loop {
        let page = unless_stopped(shutdown, objects.page(after, PAGE_ROWS)).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        for object in page.iter().filter(|object| object.age <= ttl) {
            if std::mem::take(&mut is_empty) && !command.json {
                print_line(format_args!("{:>20}  {:<24}  ago", "id", "last seen"))?;
            }
            if !print_line(line(object, command.json))? {
                return Ok(());
            }
        }
    }
    if is_empty {
        eprintln!("no object is online: none was seen within OBJECT_TTL={}", display(ttl));
    }
    Ok(())
}

/// Prints the objects that are gone, in ascending order of their ids.
async fn list_gone(
    command: &List,
    config: &store::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let history = History::new(config);
    let now = unless_stopped(shutdown, history.now()).await?;
    let since = now.minus(command.within);
    let mut first = Some(i64::MIN);
    let mut is_empty = true;
    while let Some(first_id) = first {
        let gone = history.gone_since(since, first_id, PAGE_ROWS);
        let gone = unless_stopped(shutdown, gone).await?;
        first = gone.last().and_then(|last| last.id.checked_add(1));
        for change in &gone {
            if std::mem::take(&mut is_empty) && !command.json {
                print_line(format_args!(
                    "{:>20}  {:<24}  {:<24}  gone for",
                    "id", "last seen", "gone"
                ))?;
            }
            if !print_line(gone_line(change, now, command.json))? {
                return Ok(());
            }
        }
    }
    if is_empty {
        eprintln!("no object is gone since at most {}", display(command.within));
    }
    Ok(())
}

fn gone_line(change: &Change, now: Moment, as_json: bool) -> String {
    let Change { id, at, last_seen, .. } = *change;
    let gone_for = now.ahead_of(at);
    let (at, last_seen) = (time_text(at.time()), time_text(last_seen.time()));
    if as_json {
        let gone_seconds = gone_for.as_secs_f64();
        return json!({
            "id": id.to_string(), "last_seen": last_seen, "gone_at": at,
            "gone_seconds": gone_seconds,
        })
        .to_string();
    }
    format!("{id:>20}  {last_seen:<24}  {at:<24}  {}", rounded(gone_for))
}

/// Formats a time in RFC 3339, in UTC, with milliseconds. A time outside the years 1970 to 9999, on
/// which humantime panics, is replaced by the nearest time within them.
pub(crate) fn time_text(time: SystemTime) -> String {
    const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);
    let last = SystemTime::UNIX_EPOCH + LAST_SECOND;
    humantime::format_rfc3339_millis(time.clamp(SystemTime::UNIX_EPOCH, last)).to_string()
}

fn line(object: &Object, as_json: bool) -> String {
    let Object { id, last_seen, age } = *object;
    let last_seen = time_text(last_seen);
    if as_json {
        let age_seconds = age.as_secs_f64();
        // The id is a string, because JSON parsers such as jq keep only 53 bits of a number.
        return json!({ "id": id.to_string(), "last_seen": last_seen, "age_seconds": age_seconds })
            .to_string();
    }
    // Rounded down to a tenth of a second, which is enough for a person.
    let tenths = u64::try_from(age.as_millis() / 100).unwrap_or(u64::MAX);
    let age = humantime::format_duration(Duration::from_millis(tenths.saturating_mul(100)));
    format!("{id:>20}  {last_seen:<24}  {age}")
}

#[cfg(test)]
mod tests {
    use super::*;

    // Field case 3.7.
    #[test]
    fn a_time_of_any_year_is_shown() {
        let shown = |id, micros: i64| {
            let since_1970 = Duration::from_micros(micros.unsigned_abs());
            let last_seen = if micros < 0 {
                SystemTime::UNIX_EPOCH - since_1970
            } else {
                SystemTime::UNIX_EPOCH + since_1970
            };
            line(&Object { id, last_seen, age: Duration::MAX }, false)
        };
        assert!(shown(1, i64::MAX).contains("9999-12-31T23:59:59"));
        assert!(shown(2, i64::MIN).contains("1970-01-01T00:00:00"));
    }
}
