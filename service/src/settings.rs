//! Settings: one clap struct per concern, filled from flags, the environment, `NAME_FILE` and `.env`.
//!
//! Every option that takes a value is also an environment variable: `--max-consumers` is
//! `MAX_CONSUMERS`. A flag wins over the environment, the environment over `.env`, and all of them
//! over the default. An empty variable counts as unset, because compose files pass those on.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Command};

/// Why the process cannot start with the settings it was given. The text names the variable, the
/// value (masked where it may hold a secret) and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

/// What reading the command line led to.
pub(crate) enum Parsed<C> {
    Run(C),
    /// `--help` or `--version` was asked for: print this and end with success.
    Print(String),
}

/// The environment variables, laid over what `.env` holds.
///
/// # Errors
/// When `.env` is there but cannot be read or parsed.
pub(crate) fn environment() -> Result<BTreeMap<String, String>, SettingsError> {
    let mut variables = BTreeMap::new();
    match dotenvy::dotenv_iter() {
        Ok(file) => {
            for entry in file {
                // dotenvy's error quotes the line, which may be the one with the password.
                let (name, value) = entry.map_err(|_| {
                    SettingsError(".env holds a line that is not of the form NAME=value".to_owned())
                })?;
                variables.insert(name, value);
            }
        }
        Err(error) if error.not_found() => {}
        Err(error) => return Err(SettingsError(format!(".env cannot be read: {error}"))),
    }
    // A container's POSTGRES_PASSWORD_FILE also takes the place of a POSTGRES_PASSWORD in `.env`.
    for (name, value) in std::env::vars_os() {
        // Somebody else's variable may be anything; ours are all text.
        let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else { continue };
        match name.strip_suffix("_FILE") {
            Some(base) if !value.is_empty() && std::env::var_os(base).is_none() => {
                variables.remove(base);
            }
            _ => {}
        }
        variables.insert(name, value);
    }
    Ok(variables)
}

/// Reads the settings of `command` from its arguments and `environment`.
///
/// # Errors
/// [`SettingsError`] for the first setting that is not allowed.
pub(crate) fn parse<C: clap::FromArgMatches>(
    command: Command,
    environment: &BTreeMap<String, String>,
    arguments: impl IntoIterator<Item = String>,
) -> Result<Parsed<C>, SettingsError> {
    let mut arguments = arguments.into_iter();
    let program = arguments.next().unwrap_or_default();
    let given: Vec<String> = arguments.collect();
    let from_environment = environment_arguments(&command, environment, &given)?;
    let all = std::iter::once(program).chain(from_environment).chain(given);
    let matches = command.try_get_matches_from(all);
    match matches.and_then(|matches| C::from_arg_matches(&matches)) {
        Ok(config) => Ok(Parsed::Run(config)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            | ErrorKind::DisplayVersion => Ok(Parsed::Print(error.to_string())),
            _ => Err(SettingsError(explain(&error))),
        },
    }
}

/// The environment as flags, less those that the command line gives itself.
fn environment_arguments(
    command: &Command,
    environment: &BTreeMap<String, String>,
    given: &[String],
) -> Result<Vec<String>, SettingsError> {
    let set = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let mut arguments = Vec::new();
    for option in command.get_arguments() {
        let Some(flag) = option.get_long() else { continue };
        if !matches!(option.get_action(), ArgAction::Set | ArgAction::Append) {
            continue;
        }
        let on_command_line = given.iter().any(|argument| {
            argument
                .strip_prefix("--")
                .and_then(|argument| argument.strip_prefix(flag))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        });
        if on_command_line {
            continue;
        }
        let name = variable_name(flag);
        let file_variable = format!("{name}_FILE");
        let value = match (set(&name), set(&file_variable)) {
            (Some(_), Some(_)) => {
                return Err(SettingsError(format!(
                    "{name} and {file_variable} are both set: set one of them"
                )));
            }
            (Some(value), None) => value.clone(),
            (None, Some(path)) => std::fs::read_to_string(path)
                .map(|content| content.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| {
                    SettingsError(format!(
                        "{file_variable}={path}: cannot be read ({error}); it must name a readable file that holds the value"
                    ))
                })?,
            (None, None) => continue,
        };
        arguments.push(format!("--{flag}={value}"));
    }
    Ok(arguments)
}

fn variable_name(flag: &str) -> String {
    flag.to_uppercase().replace('-', "_")
}

/// Says what clap found wrong in terms of the variable: name, value, and what is allowed.
fn explain(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if let (ErrorKind::ValueValidation | ErrorKind::InvalidValue, Some(argument)) =
        (error.kind(), text(ContextKind::InvalidArg))
    {
        let flag = argument.split_whitespace().next().unwrap_or(argument);
        let name = variable_name(flag.trim_start_matches('-'));
        let value = mask(&name, text(ContextKind::InvalidValue).unwrap_or_default());
        let allowed = match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(values)) if !values.is_empty() => {
                format!("allowed are {}", values.join(", "))
            }
            _ => error.source().map(ToString::to_string).unwrap_or_default(),
        };
        return format!("{name}={value}: {allowed} (variable {name}, flag {flag})");
    }
    if let (ErrorKind::MissingRequiredArgument, Some(ContextValue::Strings(missing))) =
        (error.kind(), error.get(ContextKind::InvalidArg))
    {
        let names: Vec<String> = missing
            .iter()
            .filter_map(|argument| argument.split([' ', '=']).next())
            .map(|flag| variable_name(flag.trim_start_matches('-')))
            .collect();
        return format!("{} must be set (see --help)", names.join(", "));
    }
    let text = error.to_string();
    text.trim_start_matches("error: ").trim_end().to_owned()
}

/// The value as it may be shown: not at all where a password may be in it, in whichever place.
fn mask(name: &str, value: &str) -> String {
    let secret =
        ["PASSWORD", "SECRET", "URI", "URL", "HEADERS"].iter().any(|part| name.contains(part));
    // Where certificates are expected, somebody may have put the key.
    let secret = secret || name == "AMQP_CA";
    match value.rsplit_once('@') {
        _ if secret => "***".to_owned(),
        Some((_, after)) => format!("***@{after}"),
        None => value.to_owned(),
    }
}

/// A value parser for durations such as `500ms`, `3s` or `1m 30s`; zero is not allowed.
///
/// # Errors
/// What is allowed, in words.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration above zero, such as 500ms, 3s or 2m".to_owned())
}

/// A value parser for what is `on` or `off`.
///
/// # Errors
/// What is allowed, in words.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_owned()),
    }
}

/// A value parser for listening addresses: `127.0.0.1:9090`, `[::1]:9090`, or `:9090` for all
/// interfaces. Port 0 takes any free port.
///
/// # Errors
/// What is allowed, in words.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
    full.parse().map_err(|_| {
        "expected IP:PORT such as 127.0.0.1:9090, or :9090 for all interfaces; port 0 takes any free one".to_owned()
    })
}

/// A value parser for numbers within `allowed`, both ends included.
pub fn number<T>(
    allowed: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: std::str::FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        text.parse().ok().filter(|number| allowed.contains(number)).ok_or_else(|| {
            format!("expected a number from {} to {}", allowed.start(), allowed.end())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args;

    #[derive(Args, Debug)]
    struct Sample {
        #[arg(long, default_value = "100", value_parser = number(1..=1000_u32))]
        max_consumers: u32,
        #[arg(long, default_value = "3s", value_parser = duration)]
        routine_interval: Duration,
        #[arg(long)]
        postgres_password: Option<String>,
        #[arg(long, value_parser = |text: &str| Err::<String, _>(format!("no URI, {} bytes", text.len())))]
        amqp_uri: Option<String>,
        #[arg(long)]
        once: bool,
    }

    fn read(environment: &[(&str, &str)], arguments: &[&str]) -> Result<Sample, String> {
        let environment =
            environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let arguments = std::iter::once("sample").chain(arguments.iter().copied());
        let command = Sample::augment_args(Command::new("sample"));
        match parse::<Sample>(command, &environment, arguments.map(str::to_owned)) {
            Ok(Parsed::Run(sample)) => Ok(sample),
            Ok(Parsed::Print(text)) => panic!("nobody asked for help: {text}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_the_environment_over_the_default() {
        let environment = [("MAX_CONSUMERS", "7"), ("ROUTINE_INTERVAL", "500ms")];
        let sample = read(&environment, &["--max-consumers", "9"]).unwrap();
        assert_eq!(sample.max_consumers, 9);
        assert_eq!(sample.routine_interval, Duration::from_millis(500));
        assert_eq!(read(&[], &[]).unwrap().max_consumers, 100);
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        assert_eq!(read(&[("MAX_CONSUMERS", "")], &[]).unwrap().max_consumers, 100);
    }

    #[test]
    fn a_switch_is_not_taken_from_the_environment() {
        assert!(!read(&[("ONCE", "true")], &[]).unwrap().once);
        assert!(read(&[], &["--once"]).unwrap().once);
    }

    #[test]
    fn a_bad_value_is_told_with_its_variable_value_and_what_is_allowed() {
        let error = read(&[("MAX_CONSUMERS", "0")], &[]).unwrap_err();
        assert!(error.starts_with("MAX_CONSUMERS=0: expected a number from 1 to 1000"), "{error}");
        let error = read(&[], &["--routine-interval=soon"]).unwrap_err();
        assert!(error.starts_with("ROUTINE_INTERVAL=soon: expected a duration"), "{error}");
    }

    #[test]
    fn a_secret_in_a_bad_value_is_masked() {
        for value in ["amqp://me:s3cret@host/x", "me:s3cret@host", "host?password=s3cret"] {
            let error = read(&[("AMQP_URI", value)], &[]).unwrap_err();
            assert!(error.starts_with("AMQP_URI=***: no URI"), "{error}");
        }
        let error = read(&[("ROUTINE_INTERVAL", "http://me:s3cret@host")], &[]).unwrap_err();
        assert!(error.starts_with("ROUTINE_INTERVAL=***@host: expected"), "{error}");
    }

    #[test]
    fn a_secret_can_come_from_a_file_without_its_line_end() {
        let path = std::env::temp_dir().join(format!("lastseen-secret-{}", std::process::id()));
        std::fs::write(&path, "s3cret\n").unwrap();
        let file = path.to_str().unwrap();
        let sample = read(&[("POSTGRES_PASSWORD_FILE", file)], &[]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(sample.unwrap().postgres_password.as_deref(), Some("s3cret"));
        let error = read(&[("POSTGRES_PASSWORD_FILE", file)], &[]).unwrap_err();
        assert!(error.starts_with("POSTGRES_PASSWORD_FILE="), "{error}");
    }

    #[test]
    fn a_value_and_its_file_together_are_refused() {
        let both = [("POSTGRES_PASSWORD", "a"), ("POSTGRES_PASSWORD_FILE", "/b")];
        assert!(read(&both, &[]).unwrap_err().contains("are both set"));
    }

    #[test]
    fn a_listening_address_may_leave_out_the_host() {
        assert_eq!(listen_address(":9090").unwrap().to_string(), "0.0.0.0:9090");
        assert!(listen_address("9090").is_err());
    }
}
