//! `lastseen history` and `lastseen changes`: when objects were online, and the feed of changes.

use std::time::{Duration, Instant};

use anyhow::bail;
use runtime::CancellationToken;
use runtime::settings::{self, display};
use serde_json::{Value, json};
use store::{Change, History, Moment, Presence, Session, SessionQuery};

use crate::objects::time_text;
use crate::{print_line, unless_stopped};

/// Sessions and changes read at a time.
const PAGE: u32 = 1_000;
/// How often `changes` looks for further changes.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);
/// How long `changes` without `--follow` waits for a transaction that may commit an earlier change.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
const SINCE: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(24 * 3_650);

/// Which part of an object's history to show.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Show {
    /// The object's id
    #[arg(allow_negative_numbers = true, value_parser = settings::number(i64::MIN..=i64::MAX))]
    pub id: i64,
    /// How far back to look
    #[arg(long, value_parser = settings::duration(SINCE), default_value = "7d")]
    pub since: Duration,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which changes to print.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Feed {
    /// Position after which to begin, as printed in the first column; 0 for the oldest change
    #[arg(long, default_value_t = 0, value_parser = settings::number(0..=i64::MAX))]
    pub after: i64,
    /// Print further changes as they are committed, until a signal arrives
    #[arg(long)]
    pub follow: bool,
    /// Print one JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Prints how long the object was online, and its sessions, newest first.
///
/// # Errors
/// When the history cannot be read, the result cannot be written, or a signal stops the command.
pub(crate) async fn show(
    command: &Show,
    config: &store::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let history = History::new(config);
    let Show { id, since, json } = *command;
    let availability = unless_stopped(shutdown, history.availability(id, since)).await?;
    let mut query = SessionQuery { since: Some(availability.since), ..SessionQuery::default() };
    let mut sessions = Vec::new();
    loop {
        let page = unless_stopped(shutdown, history.sessions(id, query, PAGE as usize)).await?;
        sessions.extend(page.sessions);
        query.after = page.next;
        if page.next.is_none() {
            break;
        }
    }
    if json {
        let document = json!({
            "id": id.to_string(),
            "since": text(availability.since),
            "until": text(availability.until),
            "seconds_online": availability.online.as_secs_f64(),
            "ratio": availability.ratio(),
            "sessions": sessions.iter().map(session_json).collect::<Vec<_>>(),
        });
        return print_line(document).map(drop);
    }
    if sessions.is_empty() {
        eprintln!(
            "object {id} was not online in the last {}, as far as the history knows",
            display(since)
        );
        return Ok(());
    }
    print_line(format_args!(
        "object {id} was online for {} since {} ({:.1}%), in {} session{}",
        rounded(availability.online),
        text(availability.since),
        availability.ratio() * 100.0,
        availability.sessions,
        if availability.sessions == 1 { "" } else { "s" },
    ))?;
    print_line(format_args!("{:<24}  {:<24}  {:<24}  duration", "online", "gone", "last seen"))?;
    for session in &sessions {
        if !print_line(session_line(session, availability.until))? {
            break;
        }
    }
    Ok(())
}

/// Prints changes in the order of the feed.
///
/// # Errors
/// When the history cannot be read or no longer has all changes after the position, the changes
/// cannot be written, an open transaction hides the newest ones, or a signal stops the command before
/// its end.
pub(crate) async fn feed(
    command: &Feed,
    config: &store::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let history = History::new(config);
    let newest = unless_stopped(shutdown, history.extent()).await?;
    let newest = newest.map_or(0, |extent| extent.last.position);
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    let mut position = command.after;
    loop {
        let page = unless_stopped(shutdown, history.changes_after(position, PAGE)).await?;
        // After the page was read, because changes could be deleted in between.
        if !unless_stopped(shutdown, history.has_all_after(position)).await? {
            bail!(
                "the history does not have all changes after position {position}; begin at 0, and treat \
                 all that you know as outdated"
            );
        }
        for change in &page.changes {
            position = change.position;
            if !print_line(change_line(change, command.json))? {
                return Ok(());
            }
        }
        if page.has_more {
            continue;
        }
        if !command.follow && position >= newest {
            return Ok(());
        }
        if !command.follow && Instant::now() >= deadline {
            bail!(
                "changes after position {position} are not printed, because an open transaction may \
                 commit an earlier one; find it in pg_stat_activity"
            );
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(FOLLOW_INTERVAL)).await.is_none() {
            return Ok(());
        }
    }
}

fn text(moment: Moment) -> String {
    time_text(moment.time())
}

/// The duration in whole seconds.
pub(crate) fn rounded(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

fn session_json(session: &Session) -> Value {
    let Session { online_at, gone_at, last_seen } = *session;
    json!({
        "online_at": online_at.map(text),
        "gone_at": gone_at.map(text),
        "last_seen": last_seen.map(text),
    })
}

fn session_line(session: &Session, now: Moment) -> String {
    let Session { online_at, gone_at, last_seen } = *session;
    let duration = online_at.map(|online_at| gone_at.unwrap_or(now).ahead_of(online_at));
    format!(
        "{:<24}  {:<24}  {:<24}  {}",
        online_at.map_or_else(|| "not known".to_owned(), text),
        gone_at.map_or_else(|| "still online".to_owned(), text),
        last_seen.map_or_else(String::new, text),
        duration.map_or_else(|| "not known".to_owned(), rounded),
    )
}

fn change_line(change: &Change, as_json: bool) -> String {
    let Change { position, id, presence, at, last_seen } = *change;
    let (kind, at, last_seen) = (name(presence), text(at), text(last_seen));
    if as_json {
        // The ids are strings, because JSON parsers such as jq keep only 53 bits of a number.
        return json!({
            "cursor": position.to_string(), "id": id.to_string(), "kind": kind, "at": at,
            "last_seen": last_seen,
        })
        .to_string();
    }
    format!("{position}  {at}  {kind:<6}  {id:>20}  last seen {last_seen}")
}

fn name(presence: Presence) -> &'static str {
    match presence {
        Presence::Online => "online",
        Presence::Gone => "gone",
    }
}
