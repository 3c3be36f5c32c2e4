//! `lastseen objects`: who is online.

use std::time::{Duration, SystemTime};

use serde_json::json;
use service::CancellationToken;
use service::settings::display;
use store::{Object, Objects};

use crate::{print_line, unless_stopped};

/// Rows read at a time.
const PAGE: u32 = 1_000;

/// How to list them.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct List {
    /// Print one JSON object per line, with id, `last_seen` and `age_seconds`
    #[arg(long)]
    pub json: bool,
}

/// Prints the table, in ascending order of the ids, less what is older than `ttl`: while no routine
/// runs, nobody deletes that.
///
/// # Errors
/// When the table cannot be read, or the list not be written, or a signal stops it.
pub(crate) async fn list(
    command: &List,
    config: &store::Config,
    ttl: Duration,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let mut objects = unless_stopped(shutdown, Box::pin(Objects::open(config))).await?;
    let mut after = None;
    let mut nobody_yet = true;
    loop {
        let page = unless_stopped(shutdown, objects.page(after, PAGE)).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        for object in page.iter().filter(|object| object.age <= ttl) {
            if std::mem::take(&mut nobody_yet) && !command.json {
                print_line(format_args!("{:>20}  {:<24}  ago", "id", "last seen"))?;
            }
            if !print_line(line(object, command.json))? {
                return Ok(());
            }
        }
    }
    if nobody_yet {
        eprintln!("nobody is online: no object was seen within OBJECT_TTL={}", display(ttl));
    }
    Ok(())
}

/// A time from a server or a file in RFC 3339, in UTC, to the millisecond. A time outside the years 1970 to
/// 9999 is shown as the nearest within: humantime panics on it.
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
        // As text, since jq keeps 53 bits of a number.
        return json!({ "id": id.to_string(), "last_seen": last_seen, "age_seconds": age_seconds })
            .to_string();
    }
    // To the tenth of a second: nobody reads more.
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
