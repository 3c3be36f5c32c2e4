//! Where settings come from: one clap struct per concern, filled from flags, a settings file, the environment,
//! `NAME_FILE` and `.env`.
//!
//! Every option that takes a value is also an environment variable: `--max-consumers` is
//! `MAX_CONSUMERS`. A flag wins over the settings file, the file over the environment, the environment
//! over `.env`, and all of them over the default. An empty variable counts as unset, because compose
//! files pass those on.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Command};

/// Which option names the settings file.
const FILE_FLAG: &str = "lastseen-config";
/// Whatever is larger was not written as settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why the process cannot start with the settings it was given. The text names the variable, the
/// value (masked where it may hold a secret) and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SettingsError(String);

/// What reading the settings led to.
pub(crate) enum Parsed<C> {
    Run(Settings<C>),
    /// `--help` or `--version` was asked for: print this and end with success.
    Print(String),
}

/// The settings, and what they were made of.
pub(crate) struct Settings<C> {
    pub(crate) config: C,
    /// Each variable that is set and is none of another program, except those that a flag replaces.
    pub(crate) given: Values,
    /// What the settings file sets without effect: a flag has the last word, or it is not of this process.
    pub(crate) in_vain: InVain,
}

/// Values by the names of their variables.
pub(crate) type Values = BTreeMap<String, String>;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct InVain {
    pub(crate) replaced: Vec<String>,
    pub(crate) unknown: Vec<String>,
}

/// Where the settings of this process come from. They can be read again, and may have changed.
pub(crate) struct Sources {
    command: Command,
    program: String,
    flags: Vec<String>,
    file: Option<PathBuf>,
}

impl Sources {
    /// # Errors
    /// When `.env` is there but cannot be read or parsed.
    pub(crate) fn new(
        command: Command,
        arguments: impl IntoIterator<Item = String>,
    ) -> Result<Self, SettingsError> {
        let mut arguments = arguments.into_iter();
        let program = arguments.next().unwrap_or_default();
        let flags: Vec<String> = arguments.collect();
        let by_flag = flags.iter().enumerate().rev().find_map(|(at, flag)| {
            let value = flag.strip_prefix("--")?.strip_prefix(FILE_FLAG)?;
            value.strip_prefix('=').or_else(|| flags.get(at + 1).map(String::as_str))
        });
        let environment = environment()?;
        let file = by_flag.or(environment.get(&variable_name(FILE_FLAG)).map(String::as_str));
        let file = file.filter(|file| !file.is_empty()).map(PathBuf::from);
        Ok(Self { command, program, flags, file })
    }

    /// The settings file, if there is to be one.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Reads the settings, those of the settings file from `content`.
    ///
    /// # Errors
    /// [`SettingsError`] for the first setting that is not allowed.
    pub(crate) fn read<C: clap::FromArgMatches>(
        &self,
        content: &[u8],
    ) -> Result<Parsed<C>, SettingsError> {
        let path = self.file.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
        let in_file = entries(&path, dotenvy::Iter::new(content))?;
        let mut environment = environment()?;
        lay_over(&mut environment, in_file.clone());
        let arguments = std::iter::once(self.program.clone()).chain(self.flags.iter().cloned());
        let parsed = parse(self.command.clone(), &environment, arguments);
        let parsed = parsed.map_err(|SettingsError(error)| {
            let sets =
                |name: &String| error.starts_with(&format!("{name}=")) && !self.has_flag(name);
            let of_file = in_file.keys().any(sets);
            SettingsError(if of_file { format!("{error}, as {path} sets it") } else { error })
        })?;
        Ok(match parsed {
            Parsed::Run(settings) => {
                let in_vain = self.in_vain(&in_file, &settings.given);
                Parsed::Run(Settings { in_vain, ..settings })
            }
            printed @ Parsed::Print(_) => printed,
        })
    }

    fn in_vain(&self, in_file: &Values, given: &Values) -> InVain {
        let known: Vec<String> = flags_with_values(&self.command).map(variable_name).collect();
        let mut in_vain = InVain::default();
        for (name, _) in in_file.iter().filter(|(_, value)| !value.is_empty()) {
            let base = name.strip_suffix("_FILE").unwrap_or(name);
            if !known.iter().any(|known| known == base) {
                in_vain.unknown.push(name.clone());
            } else if !given.contains_key(base) {
                in_vain.replaced.push(name.clone());
            }
        }
        in_vain
    }

    fn has_flag(&self, name: &str) -> bool {
        is_given(&flag_name(name), &self.flags)
    }
}

/// What the settings file holds now.
///
/// # Errors
/// Why it cannot be read, in words for an operator.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, SettingsError> {
    let variable = variable_name(FILE_FLAG);
    let mut content = Vec::new();
    let read = File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content))
        .and_then(|_| match content.len() as u64 {
            ..=FILE_BYTES_MAX => Ok(()),
            _ => Err(io::Error::other(format!("it is over {FILE_BYTES_MAX} bytes"))),
        });
    match read {
        Ok(()) => Ok(content),
        Err(error) => Err(SettingsError(format!(
            "{variable}={}: cannot be read ({error}); it must name a readable file of lines NAME=value",
            path.display()
        ))),
    }
}

/// The environment variables, laid over what `.env` holds.
///
/// # Errors
/// When `.env` is there but cannot be read or parsed.
fn environment() -> Result<Values, SettingsError> {
    let mut variables = match dotenvy::dotenv_iter() {
        Ok(lines) => entries(".env", lines)?,
        Err(error) if error.not_found() => Values::new(),
        Err(error) => return Err(SettingsError(format!(".env cannot be read: {error}"))),
    };
    // Somebody else's variable may be anything; ours are all text.
    let text = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    lay_over(&mut variables, std::env::vars_os().filter_map(text).collect());
    Ok(variables)
}

/// The variables that the lines of a file set.
fn entries<R: io::Read>(file: &str, lines: dotenvy::Iter<R>) -> Result<Values, SettingsError> {
    // dotenvy's error quotes the line, which may be the one with the password.
    let entries = lines.collect::<Result<_, _>>();
    entries.map_err(|_| {
        SettingsError(format!("{file} holds a line that is not of the form NAME=value"))
    })
}

/// Lets `above` win over `variables`. A container's `POSTGRES_PASSWORD_FILE` also takes the place of a
/// `POSTGRES_PASSWORD` in `.env`.
fn lay_over(variables: &mut Values, above: Values) {
    for (name, _) in above.iter().filter(|(_, value)| !value.is_empty()) {
        let other = match name.strip_suffix("_FILE") {
            Some(base) => base.to_owned(),
            None => format!("{name}_FILE"),
        };
        if !above.contains_key(&other) {
            variables.remove(&other);
        }
    }
    variables.extend(above);
}

/// Reads the settings of `command` from its arguments and `environment`.
///
/// # Errors
/// [`SettingsError`] for the first setting that is not allowed.
fn parse<C: clap::FromArgMatches>(
    command: Command,
    environment: &Values,
    arguments: impl IntoIterator<Item = String>,
) -> Result<Parsed<C>, SettingsError> {
    let mut arguments = arguments.into_iter();
    let program = arguments.next().unwrap_or_default();
    let flags: Vec<String> = arguments.collect();
    let given = given(&command, environment, &flags)?;
    let as_flags = given.iter().map(|(name, value)| format!("--{}={value}", flag_name(name)));
    let all = std::iter::once(program).chain(as_flags).chain(flags);
    let matches = command.try_get_matches_from(all);
    match matches.and_then(|matches| C::from_arg_matches(&matches)) {
        Ok(config) => Ok(Parsed::Run(Settings { config, given, in_vain: InVain::default() })),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            | ErrorKind::DisplayVersion => Ok(Parsed::Print(error.to_string())),
            _ => Err(SettingsError(explain(&error))),
        },
    }
}

/// The variables that are set and are settings of `command`, less those that the command line gives itself.
fn given(
    command: &Command,
    environment: &Values,
    flags: &[String],
) -> Result<Values, SettingsError> {
    let set = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let mut given = Values::new();
    for flag in flags_with_values(command).filter(|flag| !is_given(flag, flags)) {
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
        given.insert(name, value);
    }
    Ok(given)
}

/// The flags that can be set by a variable: those that take a value, but the one that names the file of
/// them.
fn flags_with_values(command: &Command) -> impl Iterator<Item = &str> {
    let options = command.get_arguments();
    let with_values =
        options.filter(|option| matches!(option.get_action(), ArgAction::Set | ArgAction::Append));
    with_values.filter_map(clap::Arg::get_long).filter(|flag| *flag != FILE_FLAG)
}

/// Whether the command line gives that flag.
fn is_given(flag: &str, flags: &[String]) -> bool {
    flags.iter().any(|argument| {
        argument
            .strip_prefix("--")
            .and_then(|argument| argument.strip_prefix(flag))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

fn variable_name(flag: &str) -> String {
    flag.to_uppercase().replace('-', "_")
}

fn flag_name(variable: &str) -> String {
    variable.to_lowercase().replace('_', "-")
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
pub(crate) fn mask(name: &str, value: &str) -> String {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Args;

    use super::*;
    use crate::settings::{duration, number};

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
            Ok(Parsed::Run(settings)) => Ok(settings.config),
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
}
