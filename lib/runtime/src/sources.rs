//! The sources of settings: one clap struct per concern, filled from flags, a settings file, the
//! environment, `NAME_FILE` and `.env`.
//!
//! Every option that takes a value is also an environment variable: `--max-consumers` is
//! `MAX_CONSUMERS`. Sources have this precedence, from the highest: flag, settings file,
//! environment, `.env`, default. An empty variable counts as unset, because compose files pass
//! unset variables on as empty ones. `.env` is read from the working directory only, because a
//! `.env` in a parent directory may belong to another application.
//!
//! Decision: docs/decisions/0066-how-are-settings-read.md

mod explain;
mod flags;
mod variables;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Command;
use clap::error::ErrorKind;

use crate::secrets::{self, mask};
use crate::time_zone;

use explain::explain;
use flags::{
    FILE_FLAG, flag_name, flags_with_values, is_given, known_names, names_of, suggestion,
    values_of_flags, variable_name,
};
use variables::{
    Environment, Origin, Origins, Variable, Variables, entries_of_settings_file, environment,
    override_with, unify_names, value_of,
};

pub(crate) use variables::{SettingsError, read_file};

pub(crate) enum Parsed<C> {
    Run(Settings<C>),
    /// The flags contain `--help` or `--version`: print this text and exit with 0.
    Print(String),
}

/// The settings, and the values from which they were made.
pub(crate) struct Settings<C> {
    pub(crate) config: C,
    /// The values of the settings that a variable sets and no flag overrides.
    pub(crate) values: Values,
    pub(crate) ignored: IgnoredSettings,
    /// The `.env` that was read, and the settings that it set.
    pub(crate) dot_env: Option<(PathBuf, Vec<String>)>,
    /// The value of `TZ`, if a file sets it and the environment does not set the same value.
    pub(crate) time_zone: Option<String>,
}

/// Values by the names of their variables.
pub(crate) type Values = BTreeMap<String, String>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IgnoredSettings {
    /// Settings in the settings file that have no effect because a flag overrides them.
    pub(crate) overridden: Vec<String>,
    /// Names in the settings file that are not settings of this process.
    pub(crate) unknown: Vec<String>,
    /// Other warnings for the operator, in complete sentences.
    pub(crate) warnings: Vec<String>,
}

/// The sources of the settings of this process, which can be read repeatedly.
pub(crate) struct Sources {
    command: Command,
    program: String,
    flags: Vec<String>,
    file: Option<PathBuf>,
}

impl Sources {
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

    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Reads the settings from all sources. `content` is the content of the settings file.
    pub(crate) fn read<C: clap::FromArgMatches>(
        &self,
        content: &str,
    ) -> Result<Parsed<C>, SettingsError> {
        let mut environment = environment(&self.command)?;
        let path: Arc<Path> = self.file.as_deref().unwrap_or(Path::new("")).into();
        let mut in_file = entries_of_settings_file(&path, content, &mut environment.warnings)?;
        unify_names(&self.command, &mut in_file)?;
        override_with(&mut environment.variables, in_file.clone());
        let mut parsed = self.parse(environment)?;
        if let Parsed::Run(settings) = &mut parsed {
            self.note_ineffective(&in_file, settings);
        }
        Ok(parsed)
    }

    fn parse<C: clap::FromArgMatches>(
        &self,
        environment: Environment,
    ) -> Result<Parsed<C>, SettingsError> {
        let Environment { variables, dot_env, warnings } = environment;
        let mut ignored = IgnoredSettings { warnings, ..IgnoredSettings::default() };
        let time_zone = time_zone(&variables)?;
        let Self { command, program, flags, .. } = self;
        let (values, origins) = variable_values(command, &variables, flags, &mut ignored.warnings)?;
        for (name, value) in &values {
            check_urls(name, value, origins.get(name))?;
        }
        for (flag, value) in values_of_flags(command, flags) {
            check_urls(&variable_name(flag), value, None)?;
        }
        ignored.warnings.extend(misspelled(command, &variables));
        let dot_env = dot_env.map(|dot_env| {
            let is_dot_env =
                |origin: &Origin| matches!(origin, Origin::File { path, .. } if *path == dot_env);
            let names = origins.iter().filter(|(_, origin)| is_dot_env(origin));
            (dot_env.to_path_buf(), names.map(|(name, _)| name.clone()).collect())
        });
        let as_flags = values.iter().map(|(name, value)| format!("--{}={value}", flag_name(name)));
        let all = std::iter::once(program.clone()).chain(as_flags).chain(flags.iter().cloned());
        let matches = command.clone().try_get_matches_from(all);
        match matches.and_then(|matches| C::from_arg_matches(&matches)) {
            Ok(config) => Ok(Parsed::Run(Settings { config, values, ignored, dot_env, time_zone })),
            Err(error) => match error.kind() {
                ErrorKind::DisplayHelp
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
                | ErrorKind::DisplayVersion => Ok(Parsed::Print(error.to_string())),
                _ => Err(SettingsError(explain(&error, command, flags, &origins))),
            },
        }
    }

    /// Adds the names in the settings file that have no effect to `settings.ignored`.
    fn note_ineffective<C>(&self, in_file: &Variables, settings: &mut Settings<C>) {
        let known = known_names(&self.command);
        for (name, variable) in in_file {
            if variable.is_empty() || name == time_zone::NAME {
                continue;
            }
            let base = name.strip_suffix("_FILE").unwrap_or(name);
            if !known.contains(base) {
                settings.ignored.unknown.push(name.clone());
            } else if !settings.values.contains_key(base) {
                settings.ignored.overridden.push(name.clone());
            }
        }
    }
}

/// The value of `TZ`, if a file sets it and the environment does not set the same value.
fn time_zone(variables: &Variables) -> Result<Option<String>, SettingsError> {
    let name = time_zone::NAME;
    let Some(Variable { value: Ok(zone), origin }) = variables.get(name) else { return Ok(None) };
    time_zone::check(zone).map_err(|allowed| {
        SettingsError(format!("{name}={}: {allowed} (set in {origin})", mask(name, zone)))
    })?;
    let is_new = !zone.is_empty() && std::env::var(name).as_ref() != Ok(zone);
    Ok(is_new.then(|| zone.clone()))
}

/// Returns the values of the settings of `command` that a variable sets and no flag overrides, and
/// the origin of each value.
fn variable_values(
    command: &Command,
    variables: &Variables,
    flags: &[String],
    warnings: &mut Vec<String>,
) -> Result<(Values, Origins), SettingsError> {
    let set = |name: &str| variables.get(name).filter(|variable| !variable.is_empty());
    let (mut values, mut origins) = (Values::new(), Origins::new());
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
            values.insert(name.clone(), value);
            origins.insert(name, origin);
        }
    }
    Ok((values, origins))
}

fn check_urls(name: &str, value: &str, origin: Option<&Origin>) -> Result<(), SettingsError> {
    secrets::check_urls(name, value).map_err(|reason| {
        let flag = flag_name(name);
        let set_in = origin.map_or_else(String::new, |origin| format!("; set in {origin}"));
        SettingsError(format!("{name}=***: {reason} (variable {name}, flag --{flag}{set_in})"))
    })
}

/// Returns a warning for each variable that is not a setting of `command`, but whose name resembles
/// one.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Args;

    use super::*;
    use crate::settings::{Check, Checked, duration, number};

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

    impl Check for Sample {
        fn check(&self) -> Result<(), String> {
            let Self { max_consumers, routine_interval, .. } = self;
            if *max_consumers == 999 {
                return Err(format!(
                    "MAX_CONSUMERS=999: too many for ROUTINE_INTERVAL={routine_interval:?}"
                ));
            }
            Ok(())
        }
    }

    fn read(environment: &[(&str, &str)], arguments: &[&str]) -> Result<Sample, String> {
        let variable =
            |value: &str| Variable { value: Ok(value.to_owned()), origin: Origin::Environment };
        let variables =
            environment.iter().map(|(name, value)| ((*name).to_owned(), variable(value)));
        let mut variables = variables.collect();
        let command = Sample::augment_args(Command::new("sample"));
        unify_names(&command, &mut variables).map_err(|error| error.to_string())?;
        let environment = Environment { variables, dot_env: None, warnings: Vec::new() };
        let flags = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let sources = Sources { command, program: "sample".to_owned(), flags, file: None };
        match sources.parse::<Checked<Sample>>(environment) {
            Ok(Parsed::Run(settings)) => Ok(settings.config.into_inner()),
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
        assert!(
            error.starts_with("MAX_CONSUMERS=0: expected a whole number from 1 to 1000"),
            "{error}"
        );
        let error = read(&[], &["--routine-interval=soon"]).unwrap_err();
        assert!(error.starts_with("ROUTINE_INTERVAL=soon: expected a duration"), "{error}");
    }

    #[test]
    fn error_of_several_settings_names_the_source_of_each() {
        let expected = |interval: &str, source: &str| {
            format!(
                "MAX_CONSUMERS=999: too many for ROUTINE_INTERVAL={interval} (MAX_CONSUMERS is set \
                 in the environment; ROUTINE_INTERVAL is {source})"
            )
        };
        let variable = ("MAX_CONSUMERS", "999");
        let error = read(&[variable], &["--routine-interval=5s"]).unwrap_err();
        assert_eq!(error, expected("5s", "set by the flag --routine-interval"));
        let error = read(&[variable], &[]).unwrap_err();
        assert_eq!(error, expected("3s", "not set"));
        let error = read(&[variable, ("ROUTINE_INTERVAL", "7s")], &[]).unwrap_err();
        assert_eq!(error, expected("7s", "set in the environment"));
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
