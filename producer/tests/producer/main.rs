//! The front door against a real broker. One binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod accepted;
mod front_door;
mod hostile;
mod limits;
mod outage;
mod refused;
mod signed;
mod spool;
mod wire;
