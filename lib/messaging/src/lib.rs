//! All messaging of Lastseen: the [`queue`] of object ids between producer and consumer, and the
//! [`events`] about committed changes. Each has two backends: RabbitMQ, over connections of
//! [`amqp`], and one that needs no server.

pub mod amqp;
pub mod events;
pub mod queue;
