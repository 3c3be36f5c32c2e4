//! `lastseen dead-letters`: the messages that were given up.

use std::time::SystemTime;

use anyhow::Context as _;
use broker::{DeadLetter, DeadLetterAction, Inspector, Selection};
use clap::{Args, Subcommand};
use serde_json::json;
use service::CancellationToken;
use tester::config::{Check, Checked};

use crate::objects::time_text;
use crate::{print_line, unless_stopped};

/// What to do with dead letters.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List them, one per line
    List(Look),
    /// Show them with all that is known of them
    Show(Look),
    /// Send them back to the queue, as if they had just been published
    Redrive(Checked<Treat>),
    /// Delete them for good
    Purge(Checked<Treat>),
}

/// Which dead letters to look at: all, unless some are named.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Look {
    #[command(flatten)]
    pub which: Which,
    /// Print one JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Which dead letters to treat: some must be named.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Treat {
    #[command(flatten)]
    pub which: Which,
    /// All that there are
    #[arg(long, conflicts_with_all = ["id", "reason"])]
    pub all: bool,
    /// Only say which it would be
    #[arg(long)]
    pub dry_run: bool,
}

/// Which dead letters are meant: those that fit all that is given.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct Which {
    /// Those of this object; may be repeated
    #[arg(long, allow_negative_numbers = true)]
    pub id: Vec<i64>,
    /// Those with this text in the reason
    #[arg(long, value_parser = reason)]
    pub reason: Option<String>,
}

impl Check for Treat {
    fn check(&self) -> Result<(), String> {
        if !self.all && self.which.id.is_empty() && self.which.reason.is_none() {
            return Err("name some by --id or --reason, or all of them by --all".to_owned());
        }
        Ok(())
    }
}

/// An empty one would be in every reason, where `--all` is the word for all.
fn reason(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("expected a part of a reason, such as 503".to_owned());
    }
    Ok(text.to_owned())
}

impl Which {
    fn selection(self) -> Selection {
        Selection { ids: self.id, reason: self.reason }
    }
}

/// Does it, and prints each dead letter when it is done.
///
/// # Errors
/// When the queue cannot be reached or read, or a signal stops it. What was printed is done all the
/// same; of what was under way then, some may be done as well.
pub(crate) async fn run(
    command: Command,
    config: &broker::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let (which, treatment, done, form): (_, _, _, fn(&DeadLetter) -> String) = match command {
        Command::List(Look { which, json: false }) => {
            (which, DeadLetterAction::List, "found", line)
        }
        Command::Show(Look { which, json: false }) => {
            (which, DeadLetterAction::List, "found", card)
        }
        Command::List(Look { which, json: true }) | Command::Show(Look { which, json: true }) => {
            (which, DeadLetterAction::List, "found", json_line)
        }
        Command::Redrive(treat) if treat.dry_run => {
            (treat.into_inner().which, DeadLetterAction::List, "would be redriven", line)
        }
        Command::Purge(treat) if treat.dry_run => {
            (treat.into_inner().which, DeadLetterAction::List, "would be purged", line)
        }
        Command::Redrive(treat) => {
            (treat.into_inner().which, DeadLetterAction::Redrive, "redriven", line)
        }
        Command::Purge(treat) => {
            (treat.into_inner().which, DeadLetterAction::Purge, "purged", line)
        }
    };
    let mut count = 0_u64;
    let mut printed = Ok(true);
    let print = |letter: DeadLetter| {
        count += 1;
        if matches!(printed, Ok(true)) {
            printed = print_line(form(&letter));
        }
    };
    let mut inspector = unless_stopped(shutdown, Inspector::open(config)).await?;
    let selection = which.selection();
    let treating = inspector.dead_letters(&selection, treatment, print);
    let ended = unless_stopped(shutdown, treating).await;
    // On standard error, so that the list can be piped.
    eprintln!("{count} dead letter{} {done}", if count == 1 { "" } else { "s" });
    inspector.close().await;
    ended.with_context(|| format!("ended early, after {count}"))?;
    printed.map(drop)
}

fn line(letter: &DeadLetter) -> String {
    let DeadLetter { attempts, reason, .. } = letter;
    let id = letter.id.map_or("?".to_owned(), |id| id.to_string());
    let at = time(letter.last_failed_at);
    format!("{id:>20}  {at:<24}  {attempts:>3} attempts  {reason}")
}

fn card(letter: &DeadLetter) -> String {
    let id = letter.id.map_or("none that can be read".to_owned(), |id| id.to_string());
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
