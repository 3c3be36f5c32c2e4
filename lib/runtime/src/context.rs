//! The context that a process passes to each of its roles.

use tokio_util::sync::CancellationToken;

use crate::{Health, Supervisor};

/// Connects a role to its process. Clones share everything.
#[derive(Clone, Default)]
pub struct Context {
    /// The registry of the dependencies of the role.
    pub health: Health,
    /// Cancelled when the drain begins.
    pub shutdown: CancellationToken,
    /// Supervises the tasks that the role cannot work without.
    pub supervisor: Supervisor,
}

impl Context {
    /// The context of one role in a process that runs several roles. The role gets its own
    /// [`Health`].
    #[must_use]
    pub fn role(&self, name: &'static str) -> Self {
        Self { health: self.health.role(name), ..self.clone() }
    }
}
