//! What a person is told at the start: what runs, where to POST, how to look.

use std::path::Path;
use std::time::Duration;

use service::settings;
use url::Url;

use crate::{Config, print_line};

/// The default, which `lastseen objects` has too.
const OBJECT_TTL: Duration = Duration::from_secs(30);

/// Where the roles that are played are found, and whom they ask.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    /// The viewer's page.
    pub(crate) shown_at: Option<Url>,
    /// Where the producer takes callbacks.
    pub(crate) callbacks_to: Option<Url>,
    /// Where the consumer asks.
    pub(crate) lookups_at: Option<Url>,
}

/// Prints it to standard output; the logs go elsewhere.
///
/// # Errors
/// When standard output cannot be written.
pub(crate) fn print(config: &Config, addresses: &Addresses) -> anyhow::Result<()> {
    let program = std::env::args().next().unwrap_or_else(|| "lastseen".to_owned());
    print_line(text(config, addresses, &program)).map(drop)
}

fn text(config: &Config, addresses: &Addresses, program: &str) -> String {
    let Addresses { shown_at, callbacks_to, lookups_at } = addresses;
    let without = config.without;
    let roles = [
        ("producer", !without.no_producer),
        ("consumer", !without.no_consumer),
        ("routine", !without.no_routine),
        ("viewer", !without.no_viewer),
        ("simulated partner", !without.partner()),
        ("simulated status API", !without.api()),
    ];
    let roles: Vec<&str> =
        roles.into_iter().filter_map(|(name, played)| played.then_some(name)).collect();
    let post = callbacks_to.as_ref().map(|url| {
        if config.authenticity.callback_secret.is_some() {
            return format!("{url}, signed with CALLBACK_SECRET");
        }
        format!("curl -d '{{\"object_ids\":[2,4,7]}}' -H 'content-type: application/json' {url}")
    });
    let mut lastseen = quoted(program);
    if config.lastseen_dir != Path::new("./data") {
        let directory = quoted(&config.lastseen_dir.display().to_string());
        lastseen = format!("{lastseen} --lastseen-dir {directory}");
    }
    let ttl = match config.cleanup.object_ttl {
        OBJECT_TTL => String::new(),
        other => format!(" --object-ttl {}", settings::display(other)),
    };
    let elsewhere = config.amqp_uri.is_some() || config.database_url.is_some();
    let same = if elsewhere { "  (with the same AMQP_URI and DATABASE_URL)" } else { "" };
    let lines = [
        ("watch", shown_at.as_ref().map(ToString::to_string)),
        ("post", post),
        ("look", Some(format!("{lastseen} objects{ttl}{same}"))),
        ("given up", Some(format!("{lastseen} dead-letters list{same}"))),
        ("lookups", lookups_at.as_ref().map(|url| format!("GET {}/objects/{{id}}", shown(url)))),
        ("queue", Some(format!("{:?}", config.broker().amqp_uri))),
        ("table", Some(format!("{:?}", config.table()))),
        ("stop", Some("ctrl-c; what was accepted is kept".to_owned())),
    ];
    let lines =
        lines.into_iter().filter_map(|(name, value)| Some(format!("  {name:<8}  {}", value?)));
    let lines: Vec<String> = lines.collect();
    format!("Lastseen is at work: {}\n\n{}\n", roles.join(", "), lines.join("\n"))
}

/// Without the user, the password and a slash at the end.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // An http URL has a host, so these cannot fail.
    _ = url.set_username("");
    _ = url.set_password(None);
    url.as_str().trim_end_matches('/').to_owned()
}

/// As one word of a shell.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "/._-+:@%,=".contains(letter);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn config(arguments: &[&str]) -> Config {
        let command = Config::augment_args(clap::Command::new("lastseen"));
        let arguments = std::iter::once("lastseen").chain(arguments.iter().copied());
        Config::from_arg_matches(&command.get_matches_from(arguments)).unwrap()
    }

    #[test]
    fn by_default_all_roles_and_the_files_are_told() {
        let url = |url: &str| Some(url.parse().unwrap());
        let addresses = Addresses {
            shown_at: url("http://127.0.0.1:9080/"),
            callbacks_to: url("http://127.0.0.1:9090/callback"),
            lookups_at: url("http://127.0.0.1:9010/"),
        };
        let text = text(&config(&[]), &addresses, "target/debug/lastseen");
        assert_eq!(
            text,
            "\
Lastseen is at work: producer, consumer, routine, viewer, simulated partner, simulated status API

  watch     http://127.0.0.1:9080/
  post      curl -d '{\"object_ids\":[2,4,7]}' -H 'content-type: application/json' http://127.0.0.1:9090/callback
  look      target/debug/lastseen objects
  given up  target/debug/lastseen dead-letters list
  lookups   GET http://127.0.0.1:9010/objects/{id}
  queue     sqlite:./data/queue.db
  table     sqlite:./data/store.db
  stop      ctrl-c; what was accepted is kept
"
        );
    }

    /// Field case 6.12.
    #[test]
    fn the_command_that_lists_objects_has_the_same_ttl() {
        let look = |arguments: &[&str]| {
            let text = text(&config(arguments), &Addresses::default(), "lastseen");
            text.lines().find(|line| line.contains("look ")).unwrap().to_owned()
        };
        assert!(look(&["--object-ttl=90s"]).ends_with("lastseen objects --object-ttl 90s"));
        assert!(look(&["--object-ttl=2h"]).ends_with("lastseen objects --object-ttl 2h"));
        assert!(look(&["--object-ttl=30s"]).ends_with("lastseen objects"));
    }

    #[test]
    fn what_is_not_played_is_left_out_and_an_unusual_directory_is_quoted() {
        let config = config(&["--no-producer", "--no-consumer", "--lastseen-dir", "it's here"]);
        let text = text(&config, &Addresses::default(), "lastseen");
        assert!(!text.contains("post") && !text.contains("lookups"), "{text}");
        assert!(text.contains(r"lastseen --lastseen-dir 'it'\''s here' objects"), "{text}");
        assert!(text.contains("queue     sqlite:it's here/queue.db"), "{text}");
    }

    #[test]
    fn a_place_elsewhere_has_to_be_named_again_and_no_password_is_shown() {
        let config = config(&["--amqp-uri", "amqp://me:s3cret@rabbit:5672/x", "--no-tester"]);
        let lookups_at = Some("http://me:s3cret@api/v2/".parse().unwrap());
        let addresses = Addresses { lookups_at, ..Addresses::default() };
        let text = text(&config, &addresses, "lastseen");
        let given_up = "lastseen dead-letters list  (with the same AMQP_URI and DATABASE_URL)";
        assert!(text.contains(given_up), "{text}");
        assert!(text.contains("GET http://api/v2/objects/{id}"), "{text}");
        assert!(text.contains("@rabbit:5672/x") && !text.contains("s3cret"), "{text}");
    }
}
