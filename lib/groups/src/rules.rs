//! The rules of a group: how much of it must be up.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How much of a group must be up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Need {
    /// Everything.
    All,
    /// At least one.
    Any,
    /// At least this number, which is at least 1.
    Count(u32),
    /// At least this percentage of the weight, from 1 to 100, rounded up.
    Percent(u8),
}

impl Need {
    /// Reads `all`, `any`, `N` or `N%`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if !text.ends_with(|last: char| last.is_ascii_alphanumeric() || last == '%') {
            return None;
        }
        match text {
            "all" => return Some(Self::All),
            "any" => return Some(Self::Any),
            _ if !text.starts_with(|first: char| first.is_ascii_digit()) => return None,
            _ => {}
        }
        let need = match text.strip_suffix('%') {
            Some(percent) => Self::Percent(percent.parse().ok()?),
            None => Self::Count(text.parse().ok()?),
        };
        need.is_valid().then_some(need)
    }

    pub(crate) fn is_valid(self) -> bool {
        match self {
            Self::All | Self::Any => true,
            Self::Count(count) => count > 0,
            Self::Percent(percent) => (1..=100).contains(&percent),
        }
    }

    /// The share that a group of this weight needs. It is at least 1 if the weight is.
    pub(crate) fn threshold(self, weight: u32) -> u32 {
        match self {
            Self::All => weight,
            Self::Any => 1,
            Self::Count(count) => count,
            Self::Percent(percent) => {
                let share = (u64::from(weight) * u64::from(percent)).div_ceil(100);
                u32::try_from(share).unwrap_or(u32::MAX)
            }
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => formatter.write_str("all"),
            Self::Any => formatter.write_str("any"),
            Self::Count(count) => write!(formatter, "{count}"),
            Self::Percent(percent) => write!(formatter, "{percent}%"),
        }
    }
}

/// The rules of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rules {
    /// The group is up if this much of it is up. The default is [`Need::All`].
    pub up: Need,
    /// Otherwise the group is degraded if this much of it is up. The default is [`Need::Any`].
    pub degraded: Need,
    /// How long a worse status must last before it is announced. The default is 0.
    pub hold: Duration,
}

impl Default for Rules {
    fn default() -> Self {
        Self { up: Need::All, degraded: Need::Any, hold: Duration::ZERO }
    }
}
