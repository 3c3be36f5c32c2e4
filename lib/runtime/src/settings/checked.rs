//! Checks across the values of several settings.

use std::ops::Deref;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, FromArgMatches};

/// Settings whose values must also be consistent with one another.
pub trait Check {
    /// Checks that the values are consistent.
    ///
    /// # Errors
    /// The variables that are inconsistent, with their values and what is allowed.
    fn check(&self) -> Result<(), String>;

    /// Whether the command that the user runs uses these settings.
    #[must_use]
    fn is_used(_: &ArgMatches) -> bool {
        true
    }
}

/// Settings that were parsed and are consistent.
///
/// clap validates one value at a time. This type reports an inconsistency between several values as
/// a settings error too.
#[derive(Clone, Debug)]
pub struct Checked<T>(T);

impl<T> Checked<T> {
    /// The settings themselves.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Checked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: FromArgMatches + Check> FromArgMatches for Checked<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let settings = T::from_arg_matches(matches)?;
        match settings.check() {
            Err(reason) if T::is_used(matches) => {
                Err(clap::Error::raw(ErrorKind::ValueValidation, reason))
            }
            Ok(()) | Err(_) => Ok(Self(settings)),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<T: Args + Check> Args for Checked<T> {
    fn augment_args(command: clap::Command) -> clap::Command {
        T::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        T::augment_args_for_update(command)
    }
}
