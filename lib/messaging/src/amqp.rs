//! Connections to RabbitMQ: parses the URI, opens a connection with a deadline for each step, and
//! reopens a session whenever it ends. The modules `queue` and `events` use the connections.

mod connection;
mod reconnect;
pub mod settings;
mod transport;
mod uri;

pub use connection::{ConnectError, Connection, connect};
pub(crate) use connection::{RPC_TIMEOUT, close, within_deadline};
pub use reconnect::backoff;
pub(crate) use reconnect::{Reconnector, STABLE_AFTER, SessionError};
pub use uri::{Access, AmqpUri, BrokerUrl};
