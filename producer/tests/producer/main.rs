//! Tests the producer with a real broker. They are one binary, because linking each takes seconds.
//! Hostile clients have another binary, because they would slow down these tests.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod accepted;
mod harness;
mod limits;
mod outage;
mod refused;
mod signed;
mod spool;
mod wire;
