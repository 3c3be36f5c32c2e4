//! `lastseen objects`: who is online.

use std::time::Duration;

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

fn line(object: &Object, as_json: bool) -> String {
    let Object { id, last_seen, age } = *object;
    let last_seen = humantime::format_rfc3339_millis(last_seen);
    if as_json {
        let age_seconds = age.as_secs_f64();
        let last_seen = last_seen.to_string();
        return json!({ "id": id, "last_seen": last_seen, "age_seconds": age_seconds }).to_string();
    }
    // To the tenth of a second: nobody reads more.
    let tenths = u64::try_from(age.as_millis() / 100).unwrap_or(u64::MAX);
    let age = humantime::format_duration(Duration::from_millis(tenths.saturating_mul(100)));
    format!("{id:>20}  {last_seen:<24}  {age}")
}
