//! The flags of a command and the variables that set them.

use std::collections::BTreeSet;

use clap::{ArgAction, Command};

use crate::time_zone;

/// The option that names the settings file.
pub(super) const FILE_FLAG: &str = "lastseen-config";

pub(super) fn variable_name(flag: &str) -> String {
    flag.to_uppercase().replace('-', "_")
}

pub(super) fn flag_name(variable: &str) -> String {
    variable.to_lowercase().replace('_', "-")
}

/// The names of all variables that are settings of `command`.
pub(super) fn known_names(command: &Command) -> BTreeSet<String> {
    let names = flags_with_values(command).chain([FILE_FLAG]).map(variable_name);
    let aliases = aliases(command).map(|(alias, _)| alias);
    names.chain(aliases).chain([time_zone::NAME.to_owned()]).collect()
}

/// The variables that are aliases of settings, each with the setting's primary name.
pub(super) fn aliases(command: &Command) -> impl Iterator<Item = (String, String)> {
    flags_with_values(command).flat_map(move |flag| {
        let others = names_of(command, flag).filter(move |name| *name != flag);
        others.map(move |other| (variable_name(other), variable_name(flag)))
    })
}

/// The name of a flag and its aliases.
pub(super) fn names_of<'a>(command: &'a Command, flag: &'a str) -> impl Iterator<Item = &'a str> {
    let option = command.get_arguments().find(|option| option.get_long() == Some(flag));
    let aliases = option.and_then(clap::Arg::get_all_aliases).unwrap_or_default();
    std::iter::once(flag).chain(aliases)
}

/// The flags that a variable can set: those that take a value, except the one that names the
/// settings file.
pub(super) fn flags_with_values(command: &Command) -> impl Iterator<Item = &str> {
    let options = command.get_arguments();
    let with_values =
        options.filter(|option| matches!(option.get_action(), ArgAction::Set | ArgAction::Append));
    with_values.filter_map(clap::Arg::get_long).filter(|flag| *flag != FILE_FLAG)
}

/// The value of each flag in `flags` that a variable can also set, including flags after the name
/// of a subcommand.
pub(super) fn values_of_flags<'a>(
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
pub(super) fn is_given(flag: &str, flags: &[String]) -> bool {
    flags.iter().any(|argument| {
        argument
            .strip_prefix("--")
            .and_then(|argument| argument.strip_prefix(flag))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// The name in `known` that `name` probably misspells: at most one letter in five differs, and at
/// most two letters in total.
pub(super) fn suggestion<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let normal = name.to_uppercase().replace(['-', '.'], "_");
    let distances = known.iter().map(|known| (strsim::osa_distance(&normal, known), *known));
    let (distance, nearest) = distances.min()?;
    (distance <= (nearest.len() / 5).min(2)).then_some(nearest)
}
