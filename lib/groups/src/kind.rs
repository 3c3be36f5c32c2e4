//! The kinds of objects, their weights, and the statuses of groups.

use std::str::FromStr;

/// The status of a group, ordered from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// The share of the group that is up satisfies its rule `up`.
    Up,
    /// The share satisfies the rule `degraded`, but not the rule `up`.
    Degraded,
    /// The share satisfies neither rule.
    Down,
}

impl Status {
    /// The name in APIs, events and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Degraded => "degraded",
            Self::Down => "down",
        }
    }
}

/// What was last observed of an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fact {
    /// It was seen recently.
    Online,
    /// It was seen, but most of its TTL has passed.
    Late,
    /// It was never seen.
    #[default]
    NeverSeen,
    /// Its last message became a dead letter.
    GivenUp,
    /// It was seen, but its TTL has passed.
    Gone,
}

/// The kind of an object: its fact, unless the object is not seen and in maintenance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Seen recently.
    Online,
    /// Seen, but most of its TTL has passed.
    Late,
    /// In maintenance, and not seen within its TTL.
    Maintenance,
    /// Never seen.
    NeverSeen,
    /// Its last message became a dead letter.
    GivenUp,
    /// Seen, but its TTL has passed.
    Gone,
}

impl Kind {
    /// All kinds, in the order of counts and weights.
    pub const ALL: [Self; 6] =
        [Self::Online, Self::Late, Self::Maintenance, Self::NeverSeen, Self::GivenUp, Self::Gone];

    /// The name in APIs, events and `GROUPS_WEIGHTS`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Late => "late",
            Self::Maintenance => "maintenance",
            Self::NeverSeen => "never_seen",
            Self::GivenUp => "given_up",
            Self::Gone => "gone",
        }
    }

    pub(crate) fn of(fact: Fact, in_maintenance: bool) -> Self {
        match fact {
            Fact::Online => Self::Online,
            Fact::Late => Self::Late,
            _ if in_maintenance => Self::Maintenance,
            Fact::NeverSeen => Self::NeverSeen,
            Fact::GivenUp => Self::GivenUp,
            Fact::Gone => Self::Gone,
        }
    }
}

/// The weight of each kind, in the order of [`Kind::ALL`]. An object of a kind with weight 0 counts
/// as up. Any other weight says how much such an object contributes to the cause of a bad status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights([u32; 6]);

impl Weights {
    /// The weight of one object of the kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> u32 {
        self.0[kind as usize]
    }

    /// Whether objects of the kind count as up.
    #[must_use]
    pub fn counts_as_up(&self, kind: Kind) -> bool {
        self.of(kind) == 0
    }

    pub(crate) fn burden(&self, counts: &[u32; 6]) -> u64 {
        counts.iter().zip(self.0).map(|(&count, weight)| u64::from(count) * u64::from(weight)).sum()
    }

    pub(crate) fn up(&self, counts: &[u32; 6]) -> u32 {
        counts.iter().zip(self.0).filter(|&(_, weight)| weight == 0).map(|(&count, _)| count).sum()
    }
}

impl Default for Weights {
    fn default() -> Self {
        Self([0, 0, 0, 1, 2, 3])
    }
}

/// The text is not a list of weights.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// An entry is not KIND=WEIGHT.
    #[error(
        "cannot read the weight {0:?}: expected KIND=WEIGHT, such as gone=3, where KIND is online, \
         late, maintenance, never_seen, given_up or gone, and WEIGHT is 0 to 1000"
    )]
    Entry(String),
    /// A kind has two weights.
    #[error("{0} has two weights; expected one")]
    Repeated(&'static str),
    /// Online objects must count as up.
    #[error("the weight of online is {0}; expected 0, because an online object counts as up")]
    Online(u32),
}

const MAX_WEIGHT: u32 = 1000;

impl FromStr for Weights {
    type Err = WeightsError;

    /// Reads `gone=3,late=1`. Kinds that are not in the list keep their default.
    fn from_str(text: &str) -> Result<Self, WeightsError> {
        let mut weights = Self::default();
        let mut given = [false; 6];
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let parsed = entry.split_once('=').and_then(|(name, weight)| {
                let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name.trim())?;
                let weight = weight.trim().parse().ok().filter(|&weight| weight <= MAX_WEIGHT)?;
                Some((kind, weight))
            });
            let (kind, weight) =
                parsed.ok_or_else(|| WeightsError::Entry(entry.chars().take(40).collect()))?;
            if std::mem::replace(&mut given[kind as usize], true) {
                return Err(WeightsError::Repeated(kind.name()));
            }
            weights.0[kind as usize] = weight;
        }
        match weights.of(Kind::Online) {
            0 => Ok(weights),
            weight => Err(WeightsError::Online(weight)),
        }
    }
}
