//! The text that `lastseen` prints at the start: which roles run, where to POST callbacks, and how
//! to inspect the queue and the table.

use std::path::Path;
use std::time::Duration;

use runtime::settings;
use url::Url;

use crate::{Config, print_line};

/// The default of `OBJECT_TTL`, which also applies to `lastseen objects`.
const DEFAULT_OBJECT_TTL: Duration = Duration::from_secs(30);

/// The addresses of the roles that run, and of the status API.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    /// The viewer's page.
    pub(crate) viewer: Option<Url>,
    /// Where the producer accepts callbacks.
    pub(crate) callbacks: Option<Url>,
    /// The status API that the consumer uses.
    pub(crate) status_api: Option<Url>,
}

pub(crate) fn print(config: &Config, addresses: &Addresses) -> anyhow::Result<()> {
    let program = std::env::args().next().unwrap_or_else(|| "lastseen".to_owned());
    print_line(text(config, addresses, &program)).map(drop)
}

fn text(config: &Config, addresses: &Addresses, program: &str) -> String {
    let Addresses { viewer, callbacks, status_api } = addresses;
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
        roles.into_iter().filter_map(|(name, is_running)| is_running.then_some(name)).collect();
    let post = callbacks.as_ref().map(|url| {
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
        DEFAULT_OBJECT_TTL => String::new(),
        other => format!(" --object-ttl {}", settings::display(other)),
    };
    let has_urls = config.amqp_uri.is_some() || config.database_url.is_some();
    let same = if has_urls { "  (with the same AMQP_URI and DATABASE_URL)" } else { "" };
    let lookups = status_api.as_ref().map(|url| format!("GET {}/objects/{{id}}", masked(url)));
    let lines = [
        ("page", viewer.as_ref().map(ToString::to_string)),
        ("post", post),
        ("objects", Some(format!("{lastseen} objects{ttl}{same}"))),
        ("dead letters", Some(format!("{lastseen} dead-letters list{same}"))),
        ("lookups", lookups),
        ("queue", Some(format!("{:?}", config.broker().amqp_uri))),
        ("table", Some(format!("{:?}", config.table()))),
        ("stop", Some("ctrl-c; accepted callbacks are kept".to_owned())),
    ];
    let lines =
        lines.into_iter().filter_map(|(name, value)| Some(format!("  {name:<12}  {}", value?)));
    let lines: Vec<String> = lines.collect();
    format!("Lastseen is running: {}\n\n{}\n", roles.join(", "), lines.join("\n"))
}

/// The URL without user, password and final slash.
fn masked(url: &Url) -> String {
    let mut url = url.clone();
    // An http URL has a host, so these cannot fail.
    _ = url.set_username("");
    _ = url.set_password(None);
    url.as_str().trim_end_matches('/').to_owned()
}

/// The word, quoted for a shell if necessary.
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
    use super::*;

    fn config(arguments: &[&str]) -> Config {
        testkit::parse(arguments)
    }

    #[test]
    fn default_banner_lists_all_roles_and_files() {
        let url = |url: &str| Some(url.parse().unwrap());
        let addresses = Addresses {
            viewer: url("http://127.0.0.1:9080/"),
            callbacks: url("http://127.0.0.1:9090/callback"),
            status_api: url("http://127.0.0.1:9010/"),
        };
        let text = text(&config(&[]), &addresses, "target/debug/lastseen");
        assert_eq!(
            text,
            "\
Lastseen is running: producer, consumer, routine, viewer, simulated partner, simulated status API

  page          http://127.0.0.1:9080/
  post          curl -d '{\"object_ids\":[2,4,7]}' -H 'content-type: application/json' http://127.0.0.1:9090/callback
  objects       target/debug/lastseen objects
  dead letters  target/debug/lastseen dead-letters list
  lookups       GET http://127.0.0.1:9010/objects/{id}
  queue         sqlite:./data/queue.db
  table         sqlite:./data/store.db
  stop          ctrl-c; accepted callbacks are kept
"
        );
    }

    /// Field case 6.12.
    #[test]
    fn the_command_that_lists_objects_has_the_same_ttl() {
        let objects = |arguments: &[&str]| {
            let text = text(&config(arguments), &Addresses::default(), "lastseen");
            text.lines().find(|line| line.contains("lastseen objects")).unwrap().to_owned()
        };
        assert!(objects(&["--object-ttl=90s"]).ends_with("lastseen objects --object-ttl 90s"));
        assert!(objects(&["--object-ttl=2h"]).ends_with("lastseen objects --object-ttl 2h"));
        assert!(objects(&["--object-ttl=30s"]).ends_with("lastseen objects"));
    }

    #[test]
    fn omitted_roles_are_left_out_and_the_directory_quoted() {
        let config = config(&["--no-producer", "--no-consumer", "--lastseen-dir", "it's here"]);
        let text = text(&config, &Addresses::default(), "lastseen");
        assert!(!text.contains("post") && !text.contains("lookups"), "{text}");
        assert!(text.contains(r"lastseen --lastseen-dir 'it'\''s here' objects"), "{text}");
        assert!(text.contains("queue         sqlite:it's here/queue.db"), "{text}");
    }

    #[test]
    fn banner_repeats_settings_but_no_password() {
        let config = config(&["--amqp-uri", "amqp://me:s3cret@rabbit:5672/x", "--no-tester"]);
        let status_api = Some("http://me:s3cret@api/v2/".parse().unwrap());
        let addresses = Addresses { status_api, ..Addresses::default() };
        let text = text(&config, &addresses, "lastseen");
        let command = "lastseen dead-letters list  (with the same AMQP_URI and DATABASE_URL)";
        assert!(text.contains(command), "{text}");
        assert!(text.contains("GET http://api/v2/objects/{id}"), "{text}");
        assert!(text.contains("@rabbit:5672/x") && !text.contains("s3cret"), "{text}");
    }
}
