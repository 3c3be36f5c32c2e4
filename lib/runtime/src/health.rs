//! Readiness: which dependencies a service has, and whether each is available.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

/// The status of a dependency or a component: `Ok` while it works; otherwise the reason why it does
/// not work, worded for an operator.
pub type Status = Result<(), String>;

/// The dependencies of a service and their status.
///
/// The component that talks to a dependency updates the status of that dependency; `/readyz` only
/// reads the status.
#[derive(Clone, Default)]
pub struct Health {
    registry: Arc<Mutex<Registry>>,
    /// Shared by all roles of the process.
    draining: Arc<AtomicBool>,
}

#[derive(Default)]
struct Registry {
    required: Vec<Dependency>,
    optional: Vec<Dependency>,
    roles: Vec<Role>,
    is_complete: bool,
}

struct Dependency {
    name: &'static str,
    status: watch::Receiver<Status>,
}

struct Role {
    name: &'static str,
    health: Health,
}

/// A reason why the service is not ready, with the name of the dependency or role that causes it.
/// The name is `None` while registration is unfinished.
type Missing = (Option<&'static str>, String);

impl Health {
    /// Registers a dependency without which the service is not ready.
    pub fn add_required(&self, name: &'static str, status: watch::Receiver<Status>) {
        self.registry.lock().required.push(Dependency { name, status });
    }

    /// Registers a dependency without which the service stays ready. While the dependency is away,
    /// `/readyz` reports that.
    pub fn add_optional(&self, name: &'static str, status: watch::Receiver<Status>) {
        self.registry.lock().optional.push(Dependency { name, status });
    }

    /// Registers a role of a process that runs several roles, and returns the health of that role.
    /// The role registers its own dependencies there. The process is ready only while each role is
    /// ready.
    #[must_use]
    pub fn role(&self, name: &'static str) -> Self {
        let health = Self { registry: Arc::default(), draining: Arc::clone(&self.draining) };
        self.registry.lock().roles.push(Role { name, health: health.clone() });
        health
    }

    /// Ends the registration of dependencies and roles. Until then, the service counts as starting
    /// and is not ready.
    pub fn finish_registration(&self) {
        self.registry.lock().is_complete = true;
    }

    /// Marks the process and each of its roles as not ready, permanently, so that load balancers
    /// send requests elsewhere.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether load balancers should send new requests to this process.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.missing_required().is_empty()
    }

    /// Each required dependency that is away, with the reason. For a dependency of a role, the name
    /// is the role's, and the reason begins with the dependency's name.
    #[must_use]
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        let missing = self.missing_required().into_iter();
        missing.map(|(name, reason)| (name.unwrap_or("service"), reason)).collect()
    }

    /// Each optional dependency that is away, with the reason.
    #[must_use]
    pub fn missing_optional(&self) -> Vec<(&'static str, String)> {
        let registry = self.registry.lock();
        let own = registry.optional.iter().filter_map(Dependency::missing);
        let own = own.filter_map(|(name, reason)| Some((name?, reason)));
        let of_roles = registry.roles.iter().flat_map(|role| role.health.missing_optional());
        own.chain(of_roles).collect()
    }

    /// Each role and whether it is ready. A process without registered roles is one role called
    /// `name`.
    pub(crate) fn roles(&self, name: &'static str) -> Vec<(&'static str, bool)> {
        let is_ready = |health: &Self| health.missing_required().is_empty();
        let registry = self.registry.lock();
        if registry.roles.is_empty() {
            drop(registry);
            return vec![(name, is_ready(self))];
        }
        registry.roles.iter().map(|role| (role.name, is_ready(&role.health))).collect()
    }

    fn missing_required(&self) -> Vec<Missing> {
        let registry = self.registry.lock();
        let starting = (!registry.is_complete).then(|| (None, "starting".to_owned()));
        let own = registry.required.iter().filter_map(Dependency::missing);
        let of_roles = registry.roles.iter().flat_map(Role::missing);
        starting.into_iter().chain(own).chain(of_roles).collect()
    }
}

impl Dependency {
    fn missing(&self) -> Option<Missing> {
        // The component that talks to the dependency holds the sender, so a closed channel means
        // that the component has ended.
        let reason = match self.status.has_changed() {
            Err(_) => "the component that connects to it has stopped".to_owned(),
            Ok(_) => self.status.borrow().clone().err()?,
        };
        Some((Some(self.name), reason))
    }
}

impl Role {
    fn missing(&self) -> impl Iterator<Item = Missing> {
        self.health.missing_required().into_iter().map(|(dependency, reason)| match dependency {
            Some(dependency) => (Some(self.name), format!("{dependency}: {reason}")),
            None => (Some(self.name), reason),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependency_is_missing_while_away_or_unmonitored() {
        let health = Health::default();
        assert_eq!(health.missing(), [("service", "starting".to_owned())]);
        health.finish_registration();
        assert!(health.missing().is_empty());
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        health.add_required("broker", watched);
        assert_eq!(health.missing(), [("broker", "refused".to_owned())]);
        status.send(Ok(())).unwrap();
        assert!(health.missing().is_empty());
        drop(status);
        assert_eq!(health.missing().len(), 1);
    }

    #[test]
    fn process_misses_the_dependencies_of_its_roles() {
        let process = Health::default();
        let (producer, consumer) = (process.role("producer"), process.role("consumer"));
        process.finish_registration();
        producer.finish_registration();
        consumer.finish_registration();
        assert!(process.missing().is_empty());
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        consumer.add_required("database", watched);
        assert_eq!(process.missing(), [("consumer", "database: refused".to_owned())]);
        assert_eq!(consumer.missing(), [("database", "refused".to_owned())]);
        assert!(producer.missing().is_empty());
        status.send(Ok(())).unwrap();
        assert!(process.missing().is_empty());
    }

    #[test]
    fn process_without_registered_roles_is_one_role() {
        let process = Health::default();
        assert_eq!(process.roles("lastseen"), [("lastseen", false)]);
        process.finish_registration();
        assert_eq!(process.roles("lastseen"), [("lastseen", true)]);
        let (producer, consumer) = (process.role("producer"), process.role("consumer"));
        producer.finish_registration();
        let roles = || process.roles("lastseen");
        assert_eq!(roles(), [("producer", true), ("consumer", false)]);
        consumer.finish_registration();
        assert_eq!(roles(), [("producer", true), ("consumer", true)]);
    }

    #[test]
    fn draining_process_and_its_roles_are_not_ready() {
        let process = Health::default();
        let role = process.role("producer");
        process.finish_registration();
        role.finish_registration();
        assert!(process.is_ready() && role.is_ready());
        process.drain();
        assert!(!process.is_ready() && !role.is_ready());
    }

    #[test]
    fn optional_dependency_is_reported_without_ending_readiness() {
        let process = Health::default();
        let producer = process.role("producer");
        process.finish_registration();
        producer.finish_registration();
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        producer.add_optional("broker", watched);
        assert!(process.missing().is_empty());
        assert_eq!(process.missing_optional(), [("broker", "refused".to_owned())]);
        status.send(Ok(())).unwrap();
        assert!(process.missing_optional().is_empty());
    }

    #[test]
    fn process_and_role_are_starting_until_registration_ends() {
        let process = Health::default();
        let role = process.role("consumer");
        let starting = |name| (name, "starting".to_owned());
        assert_eq!(process.missing(), [starting("service"), starting("consumer")]);
        process.finish_registration();
        assert_eq!(process.missing(), [starting("consumer")]);
        role.finish_registration();
        assert!(process.missing().is_empty());
    }
}
