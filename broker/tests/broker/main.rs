//! Tests of the queue on a real RabbitMQ and in a file.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod amqp;
mod cluster;
mod conformance;
mod file;
mod permissions;
mod policies;
mod starvation;
mod test_queue;
mod tls;
