//! The front door against a real broker. One binary, because each takes seconds to link; the hostile
//! clients have another, because they would slow down these tests.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod accepted;
mod front_door;
mod limits;
mod outage;
mod refused;
mod signed;
mod spool;
mod wire;
