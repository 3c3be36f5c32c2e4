//! The sources of settings: one clap struct per concern, filled from flags, a settings file, the
//! environment, `NAME_FILE` and `.env`.
//!
//! Every option that takes a value is also an environment variable: `--max-consumers` is
//! `MAX_CONSUMERS`. A flag overrides the settings file, the file the environment, the environment
//! `.env`, and each of them the default. An empty variable counts as unset, because compose files
//! pass those on. `.env` is read from the working directory only: one in a parent directory may
//! belong to another application.
//!
//! Decision: docs/decisions/0066-how-are-settings-read.md

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Command};

use crate::env_file::{self, Entry};
use crate::secrets::{self, mask};
use crate::time_zone;

/// The option that names the settings file.
const FILE_FLAG: &str = "lastseen-config";
const DOT_ENV: &str = ".env";

/// A setting that is not allowed. The text contains the variable, the value (masked where it may
/// hold a secret), the place where it was set, and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SettingsError(String);

/// The result of parsing the settings.
pub(crate) enum Parsed<C> {
    Run(Settings<C>),
    /// The flags contain `--help` or `--version`: print this text and exit with 0.
    Print(String),
}

/// The settings, and the values they were made from.
pub(crate) struct Settings<C> {
    pub(crate) config: C,
    /// The variables that are set and are settings of this process, without those that a flag
    /// overrides.
    pub(crate) given: Values,
    pub(crate) ignored: IgnoredSettings,
    /// The `.env` that was read, and the settings that it set.
    pub(crate) dot_env: Option<(PathBuf, Vec<String>)>,
    /// `TZ`, if a file sets it to another value than the environment.
    pub(crate) time_zone: Option<String>,
}

/// Values by the names of their variables.
pub(crate) type Values = BTreeMap<String, String>;

/// Settings that have no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IgnoredSettings {
    /// Settings in the settings file that a flag overrides.
    pub(crate) replaced: Vec<String>,
    /// Names in the settings file that are not settings of this process.
    pub(crate) unknown: Vec<String>,
    /// Other warnings for the operator, in complete sentences.
    pub(crate) warnings: Vec<String>,
}

/// The sources of this process's settings. They can be read repeatedly.
pub(crate) struct Sources {
    command: Command,
    program: String,
    flags: Vec<String>,
    file: Option<PathBuf>,
}

/// A variable in one of the sources.
#[derive(Clone, Debug)]
struct Variable {
    /// The value, or the reason why it is malformed.
    value: Result<String, &'static str>,
    origin: Origin,
}

/// Where a variable was set.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Environment,
    File { path: Arc<Path>, line: usize },
}

type Variables = BTreeMap<String, Variable>;

/// The variables of the process and of `.env`, with warnings about `.env`.
struct Environment {
    variables: Variables,
    dot_env: Option<Arc<Path>>,
    warnings: Vec<String>,
}

impl Sources {
    /// # Errors
    /// When `.env` exists but cannot be read.
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
        let environment = environment(&command)?;
        let variable = environment.variables.get(&variable_name(FILE_FLAG));
        let by_variable = variable.and_then(|variable| variable.value.as_deref().ok());
        let file = by_flag.or(by_variable).filter(|file| !file.is_empty()).map(PathBuf::from);
        Ok(Self { command, program, flags, file })
    }

    /// The path of the settings file, if one is configured.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Reads the settings from all sources. `content` is that of the settings file.
    ///
    /// # Errors
    /// [`SettingsError`] for the first setting that is not allowed.
    pub(crate) fn read<C: clap::FromArgMatches>(
        &self,
        content: &str,
    ) -> Result<Parsed<C>, SettingsError> {
        let mut environment = environment(&self.command)?;
        let path: Arc<Path> = self.file.as_deref().unwrap_or(Path::new("")).into();
        let mut in_file = entries_of_settings_file(&path, content, &mut environment.warnings)?;
        unify_names(&self.command, &mut in_file)?;
        override_with(&mut environment.variables, in_file.clone());
        let arguments = std::iter::once(self.program.clone()).chain(self.flags.iter().cloned());
        let time_zone = time_zone(&environment.variables)?;
        let parsed = parse(self.command.clone(), &environment, arguments)?;
        Ok(match parsed {
            Parsed::Run(mut settings) => {
                settings.time_zone = time_zone;
                self.note_ineffective(&in_file, &mut settings);
                Parsed::Run(settings)
            }
            printed @ Parsed::Print(_) => printed,
        })
    }

    fn note_ineffective<C>(&self, in_file: &Variables, settings: &mut Settings<C>) {
        let known = known_names(&self.command);
        for (name, variable) in in_file {
            if variable.is_empty() || name == time_zone::NAME {
                continue;
            }
            let base = name.strip_suffix("_FILE").unwrap_or(name);
            if !known.contains(base) {
                settings.ignored.unknown.push(name.clone());
            } else if !settings.given.contains_key(base) {
                settings.ignored.replaced.push(name.clone());
            }
        }
    }
}

/// `TZ`, if a file sets it to another value than the environment.
///
/// # Errors
/// When it is not a time zone.
fn time_zone(variables: &Variables) -> Result<Option<String>, SettingsError> {
    let name = time_zone::NAME;
    let Some(Variable { value: Ok(zone), origin }) = variables.get(name) else { return Ok(None) };
    time_zone::check(zone).map_err(|allowed| {
        SettingsError(format!("{name}={}: {allowed} (set in {origin})", mask(name, zone)))
    })?;
    let is_new = !zone.is_empty() && std::env::var(name).as_ref() != Ok(zone);
    Ok(is_new.then(|| zone.clone()))
}

/// Reads the settings file.
///
/// # Errors
/// The reason why it cannot be read, in words for an operator.
pub(crate) fn read_file(path: &Path) -> Result<String, SettingsError> {
    env_file::read(path).map_err(|error| {
        SettingsError(format!(
            "{}={}: {}; it must name a readable file of lines NAME=value",
            variable_name(FILE_FLAG),
            secrets::mask_path(FILE_FLAG, &path.display().to_string()),
            cannot_read(path, &error),
        ))
    })
}

/// Explains why a file cannot be read, and how to fix its permissions if they are the cause.
fn cannot_read(path: &Path, error: &io::Error) -> String {
    let own_uid = rustix::process::geteuid().as_raw();
    match path.metadata() {
        Ok(file) if error.kind() == io::ErrorKind::PermissionDenied => format!(
            "cannot be read ({error}): it belongs to uid {} with mode {:04o}, and this process \
            runs as uid {own_uid}; allow it to read the file, as with chown or chmod a+r",
            file.uid(),
            file.mode() & 0o7777,
        ),
        Err(_) if error.kind() == io::ErrorKind::PermissionDenied => format!(
            "cannot be read ({error}): this process runs as uid {own_uid}, which may not enter \
            one of its parent directories; allow it to, as with chmod a+x"
        ),
        _ => format!("cannot be read ({error})"),
    }
}

/// Reads `.env` and overrides it with the environment variables.
///
/// # Errors
/// When `.env` exists but cannot be read, or one of the two gives a setting two values under two
/// names.
fn environment(command: &Command) -> Result<Environment, SettingsError> {
    let path = std::path::absolute(DOT_ENV).unwrap_or_else(|_| DOT_ENV.into());
    let path: Arc<Path> = path.into();
    let (content, dot_env) = match env_file::read(&path) {
        Ok(content) => (content, Some(Arc::clone(&path))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (String::new(), None),
        Err(error) => {
            let reason = cannot_read(&path, &error);
            return Err(SettingsError(format!("{}: {reason}", path.display())));
        }
    };
    let (mut variables, mut warnings) = (Variables::new(), Vec::new());
    for entry in env_file::parse(&content) {
        warnings.extend(warning_about(&path, &entry));
        let Some(name) = entry.name.clone() else { continue };
        variables.insert(name, Variable::in_file(&path, entry));
    }
    let of_process = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        let value = value.into_string().map_err(|_| "is not UTF-8");
        let value = value.map(|value| secrets::trim(&name, &value).to_owned());
        Some((name, Variable { value, origin: Origin::Environment }))
    });
    let mut of_process: Variables = of_process.collect();
    unify_names(command, &mut variables)?;
    unify_names(command, &mut of_process)?;
    override_with(&mut variables, of_process);
    Ok(Environment { variables, dot_env, warnings })
}

fn warning_about(
    path: &Path,
    Entry { line, name, value, looks_expandable }: &Entry,
) -> Option<String> {
    let name = name.as_ref().map_or_else(String::new, |name| format!(", {name}"));
    let place = format!("{}, line {line}{name}", path.display());
    if let Err(problem) = value {
        return Some(format!("{place}: the line is skipped because {problem}"));
    }
    looks_expandable.then(|| {
        format!(
            "{place}: ${{…}} is used literally, because variables are not expanded; write it in \
            single quotes to silence this warning"
        )
    })
}

/// The variables in the settings file. Unlike `.env`, no other application shares it, so every line
/// must be valid.
///
/// # Errors
/// [`SettingsError`] for the first line that is not.
fn entries_of_settings_file(
    path: &Arc<Path>,
    content: &str,
    warnings: &mut Vec<String>,
) -> Result<Variables, SettingsError> {
    let mut variables = Variables::new();
    for entry in env_file::parse(content) {
        let place = || format!("{}, line {}", path.display(), entry.line);
        match (&entry.name, &entry.value) {
            (Some(name), Ok(_)) => {
                warnings.extend(warning_about(path, &entry));
                variables.insert(name.clone(), Variable::in_file(path, entry));
            }
            (Some(name), Err(problem)) => {
                return Err(SettingsError(format!("{}, {name}: {problem}", place())));
            }
            (None, Ok(_) | Err(_)) => {
                return Err(SettingsError(format!(
                    "{}: it is not of the form NAME=value",
                    place()
                )));
            }
        }
    }
    Ok(variables)
}

impl Variable {
    fn in_file(path: &Arc<Path>, Entry { line, value, .. }: Entry) -> Self {
        Self { value, origin: Origin::File { path: Arc::clone(path), line } }
    }

    fn is_empty(&self) -> bool {
        self.value.as_ref().is_ok_and(String::is_empty)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment => formatter.write_str("the environment"),
            Self::File { path, line } => write!(formatter, "{}, line {line}", path.display()),
        }
    }
}

/// Replaces aliases of settings (`STATUS_API`) by their primary names (`TESTER_ENDPOINT`), within
/// one source.
///
/// # Errors
/// When a source sets both, to different values.
fn unify_names(command: &Command, variables: &mut Variables) -> Result<(), SettingsError> {
    for (alias, name) in aliases(command) {
        for suffix in ["", "_FILE"] {
            let (alias, name) = (format!("{alias}{suffix}"), format!("{name}{suffix}"));
            let other = variables.remove(&alias).filter(|other| !other.is_empty());
            let Some(other) = other else { continue };
            match variables.get(&name).filter(|variable| !variable.is_empty()) {
                Some(variable) if variable.value != other.value => {
                    return Err(SettingsError(format!(
                        "{alias} (in {}) and {name} (in {}) are two names of one setting and \
                        differ: set one of them",
                        other.origin, variable.origin
                    )));
                }
                _ => _ = variables.insert(name, other),
            }
        }
    }
    Ok(())
}

/// Overrides `variables` with those of a source of higher precedence. There, `NAME_FILE` also
/// replaces `NAME`, such as a container's `POSTGRES_PASSWORD_FILE` the `POSTGRES_PASSWORD` of
/// `.env`.
fn override_with(variables: &mut Variables, higher: Variables) {
    for (name, _) in higher.iter().filter(|(_, variable)| !variable.is_empty()) {
        let other = match name.strip_suffix("_FILE") {
            Some(base) => base.to_owned(),
            None => format!("{name}_FILE"),
        };
        if !higher.contains_key(&other) {
            variables.remove(&other);
        }
    }
    variables.extend(higher);
}

/// Reads the settings of `command` from its arguments and `environment`.
///
/// # Errors
/// [`SettingsError`] for the first setting that is not allowed.
fn parse<C: clap::FromArgMatches>(
    command: Command,
    environment: &Environment,
    arguments: impl IntoIterator<Item = String>,
) -> Result<Parsed<C>, SettingsError> {
    let Environment { variables, dot_env, warnings } = environment;
    let mut ignored = IgnoredSettings { warnings: warnings.clone(), ..IgnoredSettings::default() };
    let mut arguments = arguments.into_iter();
    let program = arguments.next().unwrap_or_default();
    let flags: Vec<String> = arguments.collect();
    let (given, origins) = given(&command, variables, &flags, &mut ignored.warnings)?;
    for (name, value) in given.iter().map(|(name, value)| (name.as_str(), value.as_str())) {
        check_urls(name, value, origins.get(name))?;
    }
    for (flag, value) in values_of_flags(&command, &flags) {
        check_urls(&variable_name(flag), value, None)?;
    }
    ignored.warnings.extend(misspelled(&command, variables));
    let dot_env = dot_env.as_ref().map(|dot_env| {
        let is_dot_env =
            |origin: &Origin| matches!(origin, Origin::File { path, .. } if path == dot_env);
        let names =
            origins.iter().filter(|(_, origin)| is_dot_env(origin)).map(|(name, _)| name.clone());
        (dot_env.to_path_buf(), names.collect())
    });
    let as_flags = given.iter().map(|(name, value)| format!("--{}={value}", flag_name(name)));
    let all = std::iter::once(program).chain(as_flags).chain(flags);
    let matches = command.try_get_matches_from(all);
    match matches.and_then(|matches| C::from_arg_matches(&matches)) {
        Ok(config) => {
            Ok(Parsed::Run(Settings { config, given, ignored, dot_env, time_zone: None }))
        }
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
            | ErrorKind::DisplayVersion => Ok(Parsed::Print(error.to_string())),
            _ => Err(SettingsError(explain(&error, &origins))),
        },
    }
}

type Origins = BTreeMap<String, Origin>;

/// The variables that are set and are settings of `command`, without those that a flag overrides,
/// and the origin of each.
fn given(
    command: &Command,
    variables: &Variables,
    flags: &[String],
    warnings: &mut Vec<String>,
) -> Result<(Values, Origins), SettingsError> {
    let set = |name: &str| variables.get(name).filter(|variable| !variable.is_empty());
    let (mut given, mut origins) = (Values::new(), Origins::new());
    let is_given = |flag: &&str| names_of(command, flag).any(|name| is_given(name, flags));
    for flag in flags_with_values(command).filter(|flag| !is_given(flag)) {
        let name = variable_name(flag);
        let value = match value_of(&name, set(&name), set(&format!("{name}_FILE"))) {
            Ok(value) => value,
            // A bad OpenTelemetry variable must not prevent the start.
            Err(SettingsError(error)) if name.starts_with("OTEL_") => {
                warnings.push(format!("{error}; it is ignored"));
                continue;
            }
            Err(error) => return Err(error),
        };
        if let Some((value, origin)) = value {
            given.insert(name.clone(), value);
            origins.insert(name, origin);
        }
    }
    Ok((given, origins))
}

/// The value of a setting and its origin, from the variable itself or from the file that
/// `NAME_FILE` names.
fn value_of(
    name: &str,
    variable: Option<&Variable>,
    file_variable: Option<&Variable>,
) -> Result<Option<(String, Origin)>, SettingsError> {
    let text = |name: &str, Variable { value, origin }: &Variable| {
        let value = value
            .as_ref()
            .map_err(|problem| SettingsError(format!("{name}: {problem} (set in {origin})")));
        value.map(|value| (value.clone(), origin.clone()))
    };
    let file_name = format!("{name}_FILE");
    match (variable, file_variable) {
        (None, None) => Ok(None),
        (Some(variable), None) => text(name, variable).map(Some),
        (None, Some(variable)) => {
            let (path, origin) = text(&file_name, variable)?;
            let unreadable = |reason: &str| {
                let shown = secrets::mask_path(name, &path);
                SettingsError(format!(
                    "{file_name}={shown}: {reason}; it must name a readable file that holds the \
                    value (set in {origin})"
                ))
            };
            let file = Path::new(&path);
            let content =
                env_file::read(file).map_err(|error| unreadable(&cannot_read(file, &error)))?;
            match env_file::single_value(&content) {
                "" => Err(unreadable("the file is empty")),
                value => Ok(Some((value.to_owned(), origin))),
            }
        }
        (Some(variable), Some(other)) => Err(SettingsError(format!(
            "{name} (in {}) and {file_name} (in {}) are both set: set one of them",
            variable.origin, other.origin
        ))),
    }
}

fn check_urls(name: &str, value: &str, origin: Option<&Origin>) -> Result<(), SettingsError> {
    secrets::check_urls(name, value).map_err(|reason| {
        let flag = flag_name(name);
        let place = origin.map_or_else(String::new, |origin| format!("; set in {origin}"));
        SettingsError(format!("{name}=***: {reason} (variable {name}, flag --{flag}{place})"))
    })
}

/// Warnings about variables that are not settings but resemble one of this process.
fn misspelled(command: &Command, variables: &Variables) -> Vec<String> {
    let known = known_names(command);
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let unknown = variables.iter().filter(|(name, variable)| {
        let base = name.strip_suffix("_FILE").unwrap_or(name);
        !known.contains(&base) && !variable.is_empty()
    });
    let warning = |(name, Variable { origin, .. }): (&String, &Variable)| {
        let base = name.strip_suffix("_FILE").unwrap_or(name);
        let intended = suggestion(base, &known)?;
        let suffix = &name[base.len()..];
        Some(format!(
            "{name} is not a setting and has no effect; did you mean {intended}{suffix}? \
            (set in {origin})"
        ))
    };
    unknown.filter_map(warning).collect()
}

/// The one of the `known` names that `name` probably misspells: at most one letter in five differs,
/// and at most two in all.
fn suggestion<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let normal = name.to_uppercase().replace(['-', '.'], "_");
    let distances = known.iter().map(|known| (strsim::osa_distance(&normal, known), *known));
    let (distance, nearest) = distances.min()?;
    (distance <= (nearest.len() / 5).min(2)).then_some(nearest)
}

/// The names of all variables that are settings of `command`.
fn known_names(command: &Command) -> BTreeSet<String> {
    let names = flags_with_values(command).chain([FILE_FLAG]).map(variable_name);
    let aliases = aliases(command).map(|(alias, _)| alias);
    names.chain(aliases).chain([time_zone::NAME.to_owned()]).collect()
}

/// The variables that are aliases of settings, each with the setting's primary name.
fn aliases(command: &Command) -> impl Iterator<Item = (String, String)> {
    flags_with_values(command).flat_map(move |flag| {
        let others = names_of(command, flag).filter(move |name| *name != flag);
        others.map(move |other| (variable_name(other), variable_name(flag)))
    })
}

/// The name of a flag and its aliases.
fn names_of<'a>(command: &'a Command, flag: &'a str) -> impl Iterator<Item = &'a str> {
    let option = command.get_arguments().find(|option| option.get_long() == Some(flag));
    let aliases = option.and_then(clap::Arg::get_all_aliases).unwrap_or_default();
    std::iter::once(flag).chain(aliases)
}

/// The flags that a variable can set: those that take a value, except the one that names the
/// settings file.
fn flags_with_values(command: &Command) -> impl Iterator<Item = &str> {
    let options = command.get_arguments();
    let with_values =
        options.filter(|option| matches!(option.get_action(), ArgAction::Set | ArgAction::Append));
    with_values.filter_map(clap::Arg::get_long).filter(|flag| *flag != FILE_FLAG)
}

/// The values of these flags on the command line, including those after the name of a subcommand.
fn values_of_flags<'a>(
    command: &'a Command,
    flags: &'a [String],
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let names = |flag| names_of(command, flag).map(move |name| (flag, name));
    flags_with_values(command).flat_map(names).flat_map(move |(flag, name)| {
        flags.iter().enumerate().filter_map(move |(at, argument)| {
            let rest = argument.strip_prefix("--")?.strip_prefix(name)?;
            let following = || flags.get(at + 1).map(String::as_str);
            let value = if rest.is_empty() { following() } else { rest.strip_prefix('=') };
            Some((flag, value?))
        })
    })
}

/// Whether the command line contains the flag.
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

/// Rewrites clap's error in terms of the variable: its name, value, origin, and what is allowed.
fn explain(error: &clap::Error, origins: &Origins) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if let (ErrorKind::ValueValidation | ErrorKind::InvalidValue, Some(argument)) =
        (error.kind(), text(ContextKind::InvalidArg))
    {
        let flag = argument.split_whitespace().next().unwrap_or(argument);
        let name = variable_name(flag.trim_start_matches('-'));
        let value = text(ContextKind::InvalidValue).unwrap_or_default();
        let allowed = match error.get(ContextKind::ValidValue) {
            Some(ContextValue::Strings(values)) if !values.is_empty() => {
                format!("allowed are {}", values.join(", "))
            }
            _ => error.source().map(ToString::to_string).unwrap_or_default(),
        };
        let origin = origins.get(&name);
        let place = origin.map_or_else(String::new, |origin| format!("; set in {origin}"));
        let link = if origin == Some(&Origin::Environment) && is_service_link(value) {
            "; Kubernetes sets such variables for its services; turn them off with \
            enableServiceLinks: false in the pod"
        } else {
            ""
        };
        let value = mask(&name, value);
        return format!("{name}={value}: {allowed} (variable {name}, flag {flag}{place}{link})");
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
    // An unexpected argument may be the second half of a password that contains a space.
    let unexpected = text(ContextKind::InvalidArg).or(text(ContextKind::InvalidSubcommand));
    if let (ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand, Some(argument)) =
        (error.kind(), unexpected)
        && !argument.starts_with('-')
    {
        let kinds = [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg];
        let suggestion = kinds.into_iter().find_map(|kind| match error.get(kind) {
            Some(ContextValue::String(name)) => Some(name.clone()),
            Some(ContextValue::Strings(names)) => names.first().cloned(),
            _ => None,
        });
        let hint = suggestion.map_or_else(String::new, |name| format!("; did you mean {name}?"));
        return format!(
            "the command line contains an unexpected argument, which is not shown because it may \
            be a secret{hint} (see --help)"
        );
    }
    let mut explained = error.to_string();
    if let Some(value) = text(ContextKind::InvalidValue).filter(|value| !value.is_empty()) {
        explained = explained.replace(value, "***");
    }
    explained.trim_start_matches("error: ").trim_end().to_owned()
}

/// Whether Kubernetes may have set the variable, as `NAME_PORT` for a service called `name`.
fn is_service_link(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use clap::Args;

    use super::*;
    use crate::settings::{duration, number};

    #[derive(Args, Debug)]
    struct Sample {
        #[arg(long, default_value = "100", value_parser = number(1..=1000_u32))]
        max_consumers: u32,
        #[arg(long, default_value = "3s", value_parser = duration(Duration::from_millis(1)..=Duration::from_secs(60)))]
        routine_interval: Duration,
        #[arg(long)]
        postgres_password: Option<String>,
        #[arg(long, value_parser = |text: &str| Err::<String, _>(format!("no URI, {} bytes", text.len())))]
        amqp_uri: Option<String>,
        #[arg(long, visible_alias = "status-api")]
        tester_endpoint: Option<String>,
        #[arg(long)]
        once: bool,
    }

    fn read(environment: &[(&str, &str)], arguments: &[&str]) -> Result<Sample, String> {
        let variable =
            |value: &str| Variable { value: Ok(value.to_owned()), origin: Origin::Environment };
        let variables =
            environment.iter().map(|(name, value)| ((*name).to_owned(), variable(value)));
        let mut variables = variables.collect();
        let arguments = std::iter::once("sample").chain(arguments.iter().copied());
        let command = Sample::augment_args(Command::new("sample"));
        unify_names(&command, &mut variables).map_err(|error| error.to_string())?;
        let environment = Environment { variables, dot_env: None, warnings: Vec::new() };
        match parse::<Sample>(command, &environment, arguments.map(str::to_owned)) {
            Ok(Parsed::Run(settings)) => Ok(settings.config),
            Ok(Parsed::Print(text)) => panic!("unexpected help: {text}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn flag_overrides_environment_overrides_default() {
        let environment = [("MAX_CONSUMERS", "7"), ("ROUTINE_INTERVAL", "500ms")];
        let sample = read(&environment, &["--max-consumers", "9"]).unwrap();
        assert_eq!(sample.max_consumers, 9);
        assert_eq!(sample.routine_interval, Duration::from_millis(500));
        assert_eq!(read(&[], &[]).unwrap().max_consumers, 100);
    }

    // Field case 5.2.
    #[test]
    fn a_setting_can_be_set_by_its_other_name() {
        let endpoint = |environment: &[(&str, &str)], arguments: &[&str]| {
            read(environment, arguments).map(|sample| sample.tester_endpoint.unwrap())
        };
        assert_eq!(endpoint(&[("STATUS_API", "b")], &[]).unwrap(), "b");
        assert_eq!(endpoint(&[("STATUS_API", "b")], &["--tester-endpoint=a"]).unwrap(), "a");
        assert_eq!(endpoint(&[("TESTER_ENDPOINT", "a")], &["--status-api=b"]).unwrap(), "b");
        assert_eq!(endpoint(&[("STATUS_API", ""), ("TESTER_ENDPOINT", "a")], &[]).unwrap(), "a");
        assert_eq!(endpoint(&[("STATUS_API", "a"), ("TESTER_ENDPOINT", "a")], &[]).unwrap(), "a");
        let error = endpoint(&[("STATUS_API", "b"), ("TESTER_ENDPOINT", "a")], &[]).unwrap_err();
        assert!(error.contains("STATUS_API (in the environment)"), "{error}");
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
    fn bad_value_is_reported_with_the_allowed_values() {
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
        assert!(error.starts_with("ROUTINE_INTERVAL=***: expected"), "{error}");
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
    fn value_and_its_file_together_are_rejected() {
        let both = [("POSTGRES_PASSWORD", "a"), ("POSTGRES_PASSWORD_FILE", "/b")];
        assert!(read(&both, &[]).unwrap_err().contains("are both set"));
    }

    /// Field case 6.5.
    #[test]
    fn a_file_without_permission_is_reported_with_owner_and_mode() {
        let path = std::env::temp_dir().join(format!("lastseen-mode-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        // Root can read every file, so the test makes the error itself.
        let reason = cannot_read(&path, &io::ErrorKind::PermissionDenied.into());
        std::fs::remove_file(&path).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let expected = format!("uid {uid} with mode 0600, and this process runs as uid {uid}");
        assert!(reason.contains(&expected) && reason.contains("chmod a+r"), "{reason}");
    }

    /// Field case 6.7.
    #[test]
    fn an_unexpected_argument_is_not_shown() {
        for arguments in [
            &["--postgres-password=my", "s3cret"][..],
            &["amqp://me:s3cret@host"],
            &["--once=s3cret"],
            &["--amqp-uri=amqp://me:12/s3cret@host"],
            &["--amqp-uri", "amqp://me:12/s3cret@host"],
        ] {
            let error = read(&[], arguments).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
        assert!(read(&[], &["--max-consumer=1"]).unwrap_err().contains("--max-consumers"));
    }

    /// Field case 6.6.
    #[test]
    fn an_error_explains_a_variable_that_kubernetes_set() {
        let error = read(&[("MAX_CONSUMERS", "tcp://10.0.0.7:80")], &[]).unwrap_err();
        assert!(error.contains("enableServiceLinks"), "{error}");
    }

    /// Field case 6.9.
    #[test]
    fn misspelt_name_is_reported_with_a_suggestion() {
        let command = Sample::augment_args(Command::new("sample"));
        let warnings = |name: &str| {
            let variable = Variable { value: Ok("1".to_owned()), origin: Origin::Environment };
            misspelled(&command, &Variables::from([(name.to_owned(), variable)])).concat()
        };
        for (name, intended) in [
            ("MAX_CONSUMER", "MAX_CONSUMERS"),
            ("max_consumers", "MAX_CONSUMERS"),
            ("MAX-CONSUMERS", "MAX_CONSUMERS"),
            ("AMQP_URL", "AMQP_URI"),
            ("POSTGRES_PASWORD_FILE", "POSTGRES_PASSWORD_FILE"),
            ("ROUTIEN_INTERVAL", "ROUTINE_INTERVAL"),
        ] {
            assert!(warnings(name).contains(&format!("did you mean {intended}?")), "{name}");
        }
        for name in
            ["MAX_CONSUMERS", "PATH", "PRODUCER_PORT", "POSTGRES_HOST", "APP_NAME", "ROUTINE_PORT"]
        {
            assert_eq!(warnings(name), "", "{name}");
        }
    }
}
