//! Tests of the queue on a real RabbitMQ and in a file.

mod amqp;
mod cluster;
mod conformance;
mod file;
mod permissions;
mod policies;
mod shards;
mod starvation;
mod test_queue;
mod tls;
