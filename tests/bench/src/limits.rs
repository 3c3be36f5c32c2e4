//! The limits: the plainest programs that do the same as our services. They handle only success.

mod amqp;
mod fetch;
mod publish;
mod upsert;

pub(crate) use fetch::fetch;
pub(crate) use publish::{publish, publish_by_lapin, publish_in_a_window};
pub(crate) use upsert::upsert;
