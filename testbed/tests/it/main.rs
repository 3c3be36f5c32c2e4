//! The testbed itself, against real servers. One binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod eventually;
mod infrastructure;
mod process;
mod proxy;
mod shared_servers;
mod status_api;
