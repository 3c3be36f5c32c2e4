//! Where events are told and heard.

use std::fmt;
use std::sync::Arc;

use amqp::Access;
use lapin::types::ShortString;
use tokio::sync::broadcast;

use crate::Notice;

/// Batches that a subscriber of this process may be behind before it misses some.
const BEHIND_MAX: usize = 1_024;

/// Where events are told and heard: on a RabbitMQ, within this process, or nowhere. Clones of one are
/// the same place.
#[derive(Clone)]
pub struct Exchange(pub(crate) Place);

/// Shared by all who hear it.
pub(crate) type Sender = broadcast::Sender<Arc<Notice>>;

#[derive(Clone)]
pub(crate) enum Place {
    Nowhere,
    InProcess(Sender),
    Rabbit(Arc<Rabbit>),
}

/// A topic exchange.
pub(crate) struct Rabbit {
    pub(crate) access: Access,
    pub(crate) name: ShortString,
}

impl Exchange {
    /// Nobody hears anything.
    #[must_use]
    pub fn nowhere() -> Self {
        Self(Place::Nowhere)
    }

    /// A new one of this process.
    #[must_use]
    pub fn in_process() -> Self {
        Self(Place::InProcess(broadcast::Sender::new(BEHIND_MAX)))
    }

    /// The durable topic exchange that belongs to a queue of a RabbitMQ.
    #[must_use]
    pub fn on(access: Access, queue_name: &str) -> Self {
        let name = format!("{queue_name}.events").into();
        Self(Place::Rabbit(Arc::new(Rabbit { access, name })))
    }

    /// Whether anything that is told can be heard here.
    #[must_use]
    pub fn is_nowhere(&self) -> bool {
        matches!(self.0, Place::Nowhere)
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Nowhere => formatter.write_str("nowhere"),
            Place::InProcess(_) => formatter.write_str("this process"),
            Place::Rabbit(rabbit) => {
                write!(formatter, "{} at {:?}", rabbit.name, rabbit.access.uri)
            }
        }
    }
}
