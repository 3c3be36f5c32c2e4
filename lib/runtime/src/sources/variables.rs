//! Variables in the environment, in `.env` and in the settings file.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use clap::Command;

use super::flags::{FILE_FLAG, aliases, variable_name};
use crate::env_file::{self, Entry};
use crate::secrets;

const DOT_ENV: &str = ".env";

/// A setting that is not allowed. The text contains the variable, its value (masked where it may
/// hold a secret), its origin, and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SettingsError(pub(super) String);

#[derive(Clone, Debug)]
pub(super) struct Variable {
    /// The value, or the reason why it is malformed.
    pub(super) value: Result<String, &'static str>,
    pub(super) origin: Origin,
}

impl Variable {
    pub(super) fn in_file(path: &Arc<Path>, Entry { line, value, .. }: Entry) -> Self {
        Self { value, origin: Origin::File { path: Arc::clone(path), line } }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.value.as_ref().is_ok_and(String::is_empty)
    }
}

/// Where a variable was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Environment,
    File { path: Arc<Path>, line: usize },
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment => formatter.write_str("the environment"),
            Self::File { path, line } => write!(formatter, "{}, line {line}", path.display()),
        }
    }
}

pub(super) type Variables = BTreeMap<String, Variable>;

pub(super) type Origins = BTreeMap<String, Origin>;

/// The variables of the process and of `.env`, with warnings about `.env`.
pub(super) struct Environment {
    pub(super) variables: Variables,
    pub(super) dot_env: Option<Arc<Path>>,
    pub(super) warnings: Vec<String>,
}

/// Reads `.env` and overrides it with the environment variables.
pub(super) fn environment(command: &Command) -> Result<Environment, SettingsError> {
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

/// Parses the settings file. Unlike `.env`, it is not shared with other applications, so every line
/// must be valid.
pub(super) fn entries_of_settings_file(
    path: &Arc<Path>,
    content: &str,
    warnings: &mut Vec<String>,
) -> Result<Variables, SettingsError> {
    let mut variables = Variables::new();
    for entry in env_file::parse(content) {
        let location = || format!("{}, line {}", path.display(), entry.line);
        match (&entry.name, &entry.value) {
            (Some(name), Ok(_)) => {
                warnings.extend(warning_about(path, &entry));
                variables.insert(name.clone(), Variable::in_file(path, entry));
            }
            (Some(name), Err(problem)) => {
                return Err(SettingsError(format!("{}, {name}: {problem}", location())));
            }
            (None, Ok(_) | Err(_)) => {
                return Err(SettingsError(format!(
                    "{}: it is not of the form NAME=value",
                    location()
                )));
            }
        }
    }
    Ok(variables)
}

/// Within one source, replaces aliases of settings (`STATUS_API`) by their primary names
/// (`TESTER_ENDPOINT`).
pub(super) fn unify_names(
    command: &Command,
    variables: &mut Variables,
) -> Result<(), SettingsError> {
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

/// Overrides `variables` with those of a source of higher precedence. A `NAME_FILE` in that source
/// also replaces a `NAME`: for example, `POSTGRES_PASSWORD_FILE` in a container's environment
/// replaces `POSTGRES_PASSWORD` in `.env`.
pub(super) fn override_with(variables: &mut Variables, higher: Variables) {
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

/// The value of a setting and its origin, from the variable itself or from the file that
/// `NAME_FILE` names.
pub(super) fn value_of(
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

pub(super) fn warning_about(
    path: &Path,
    Entry { line, name, value, looks_expandable }: &Entry,
) -> Option<String> {
    let name = name.as_ref().map_or_else(String::new, |name| format!(", {name}"));
    let location = format!("{}, line {line}{name}", path.display());
    if let Err(problem) = value {
        return Some(format!("{location}: the line is skipped because {problem}"));
    }
    looks_expandable.then(|| {
        format!(
            "{location}: ${{…}} is used literally, because variables are not expanded; write it in \
            single quotes to silence this warning"
        )
    })
}

/// Reads the settings file.
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
pub(super) fn cannot_read(path: &Path, error: &io::Error) -> String {
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

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// Field case 6.5.
    #[test]
    fn a_file_without_permission_is_reported_with_owner_and_mode() {
        let path = std::env::temp_dir().join(format!("lastseen-mode-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        // Root can read every file, so the test constructs the error.
        let reason = cannot_read(&path, &io::ErrorKind::PermissionDenied.into());
        std::fs::remove_file(&path).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let expected = format!("uid {uid} with mode 0600, and this process runs as uid {uid}");
        assert!(reason.contains(&expected) && reason.contains("chmod a+r"), "{reason}");
    }
}
