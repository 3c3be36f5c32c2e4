//! `lastseen dead-letters`: lists dead letters, sends them back to the queue, or deletes them.

use std::time::SystemTime;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use messaging::queue::{DeadLetter, DeadLetterAction, Inspector, Selection};
use runtime::CancellationToken;
use runtime::settings::{Check, Checked, number};
use serde_json::json;

use crate::objects::time_text;
use crate::{print_line, unless_stopped};

/// What to do with dead letters.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List dead letters, one per line
    List(ListArgs),
    /// Show dead letters with all details
    Show(ListArgs),
    /// Send dead letters back to the queue, as if they had just been published
    Redrive(Checked<ChangeArgs>),
    /// Delete dead letters permanently
    Purge(Checked<ChangeArgs>),
}

/// Which dead letters to list: all, unless a filter is set.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct ListArgs {
    #[command(flatten)]
    pub filter: Filter,
    /// Print one JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Which dead letters to redrive or purge: a filter or `--all` is required.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct ChangeArgs {
    #[command(flatten)]
    pub filter: Filter,
    /// All dead letters
    #[arg(long, conflicts_with_all = ["id", "reason"])]
    pub all: bool,
    /// Only print the dead letters that would be affected
    #[arg(long)]
    pub dry_run: bool,
}

/// Selects dead letters. If both conditions are set, both must match.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Filter {
    /// Dead letters of this object; may be repeated
    #[arg(long, value_parser = number(i64::MIN..=i64::MAX), allow_negative_numbers = true)]
    pub id: Vec<i64>,
    /// Dead letters whose reason contains this text
    #[arg(long, value_parser = reason)]
    pub reason: Option<String>,
}

impl Check for ChangeArgs {
    fn check(&self) -> Result<(), String> {
        if !self.all && self.filter.id.is_empty() && self.filter.reason.is_none() {
            return Err("select dead letters with --id or --reason, or all with --all".to_owned());
        }
        Ok(())
    }
}

/// Rejects an empty text, because every reason contains it. `--all` selects all dead letters.
fn reason(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("expected text that the reason contains, such as 503".to_owned());
    }
    Ok(text.to_owned())
}

/// Runs the command, and prints each dead letter once it is read, redriven or purged.
///
/// # Errors
/// When the queue cannot be reached or read, or a signal stops the command. Even then, `redrive` or
/// `purge` has affected each dead letter that it printed, and perhaps a few others.
pub(crate) async fn run(
    command: Command,
    config: &messaging::queue::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let (filter, action, outcome, format): (_, _, _, fn(&DeadLetter) -> String) = match command {
        Command::List(ListArgs { filter, json }) => {
            (filter, DeadLetterAction::List, "found", if json { json_line } else { line })
        }
        Command::Show(ListArgs { filter, json }) => {
            (filter, DeadLetterAction::List, "found", if json { json_line } else { details })
        }
        Command::Redrive(args) if args.dry_run => {
            (args.into_inner().filter, DeadLetterAction::List, "would be redriven", line)
        }
        Command::Purge(args) if args.dry_run => {
            (args.into_inner().filter, DeadLetterAction::List, "would be purged", line)
        }
        Command::Redrive(args) => {
            (args.into_inner().filter, DeadLetterAction::Redrive, "redriven", line)
        }
        Command::Purge(args) => (args.into_inner().filter, DeadLetterAction::Purge, "purged", line),
    };
    let mut count = 0_u64;
    // `Ok(false)` once the reader of the pipe is gone.
    let mut printed = Ok(true);
    let print = |letter: DeadLetter| {
        count += 1;
        if matches!(printed, Ok(true)) {
            printed = print_line(format(&letter));
        }
    };
    let mut inspector = unless_stopped(shutdown, Inspector::open(config)).await?;
    let selection = Selection { ids: filter.id, reason: filter.reason };
    let acting = inspector.dead_letters(&selection, action, print);
    let result = unless_stopped(shutdown, acting).await;
    // To standard error, so that the list can be piped.
    eprintln!("{count} dead letter{} {outcome}", if count == 1 { "" } else { "s" });
    inspector.close().await;
    result.with_context(|| format!("stopped early, after {count} dead letters"))?;
    printed.map(drop)
}

fn line(letter: &DeadLetter) -> String {
    let DeadLetter { attempts, reason, .. } = letter;
    let id = letter.id.map_or("?".to_owned(), |id| id.to_string());
    let at = time(letter.last_failed_at);
    format!("{id:>20}  {at:<24}  {attempts:>3} attempts  {reason}")
}

fn details(letter: &DeadLetter) -> String {
    let id = letter.id.map_or("unreadable".to_owned(), |id| id.to_string());
    format!(
        "object        {id}
reason        {}
attempts      {}
published     {}
first failed  {}
last failed   {}
callback      {}
message       {}
",
        letter.reason,
        letter.attempts,
        time(letter.published_at),
        time(letter.first_failed_at),
        time(letter.last_failed_at),
        letter.callback_id,
        String::from_utf8_lossy(&letter.body),
    )
}

fn json_line(letter: &DeadLetter) -> String {
    let time = |at: Option<SystemTime>| at.map(time_text);
    json!({
        "id": letter.id,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "published_at": time(letter.published_at),
        "first_failed_at": time(letter.first_failed_at),
        "last_failed_at": time(letter.last_failed_at),
        "callback_id": letter.callback_id,
        "message": String::from_utf8_lossy(&letter.body),
    })
    .to_string()
}

fn time(at: Option<SystemTime>) -> String {
    at.map_or("-".to_owned(), time_text)
}
