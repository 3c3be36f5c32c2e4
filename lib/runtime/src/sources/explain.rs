//! Explains errors of clap: names the variable instead of only the flag.

use std::error::Error as _;

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::flags::{flag_name, is_given, known_names, names_of, variable_name};
use super::variables::{Origin, Origins};
use crate::secrets::mask;

/// Rewrites clap's error in terms of the variable: its name, value, origin, and what is allowed.
pub(super) fn explain(
    error: &clap::Error,
    command: &Command,
    flags: &[String],
    origins: &Origins,
) -> String {
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
        let set_in = origin.map_or_else(String::new, |origin| format!("; set in {origin}"));
        let hint = if origin == Some(&Origin::Environment) && is_service_link(value) {
            "; Kubernetes sets such variables for its services; turn them off with \
            enableServiceLinks: false in the pod"
        } else {
            ""
        };
        let value = mask(&name, value);
        return format!("{name}={value}: {allowed} (variable {name}, flag {flag}{set_in}{hint})");
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
    let explained = explained.trim_start_matches("error: ").trim_end();
    match sources_of_named(explained, command, flags, origins) {
        Some(sources) if error.kind() == ErrorKind::ValueValidation => {
            format!("{explained} ({sources})")
        }
        _ => explained.to_owned(),
    }
}

/// The sources of all settings that a text names, which is the error of several settings together;
/// `None` if it names none.
fn sources_of_named(
    text: &str,
    command: &Command,
    flags: &[String],
    origins: &Origins,
) -> Option<String> {
    let known = known_names(command);
    let mut names = Vec::new();
    for word in text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_') {
        if known.contains(word) && !names.contains(&word) {
            names.push(word);
        }
    }
    let source = |name: &str| {
        let flag = flag_name(name);
        match origins.get(name) {
            Some(origin) => format!("{name} is set in {origin}"),
            None if names_of(command, &flag).any(|flag| is_given(flag, flags)) => {
                format!("{name} is set by the flag --{flag}")
            }
            None => format!("{name} is not set"),
        }
    };
    let sources: Vec<_> = names.into_iter().map(source).collect();
    (!sources.is_empty()).then(|| sources.join("; "))
}

/// Whether Kubernetes may have set the variable: for a service called `name`, it sets `NAME_PORT`
/// to such a URL in every pod.
fn is_service_link(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}
