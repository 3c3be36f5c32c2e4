//! Idle connections that the server closes while a lookup is sent on them.
//!
//! An HTTP server may close an idle connection at any moment, even while a request is on its way.
//! The request then fails although neither the API nor the object is at fault. The client keeps
//! idle connections for less time than servers usually do. If a server closes one even earlier, the
//! client sends the lookup once more, on a new connection.
//!
//! Decision: docs/decisions/0030-when-is-a-lookup-sent-again-at-once.md

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Chain;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpInfo;
use parking_lot::Mutex;

/// How long an idle connection is kept: less than the shortest common limit of servers, 1 s.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_millis(500);
/// With more connections than this, those that can no longer be reused are removed.
const PRUNE_ABOVE: usize = 1_024;

/// The connections that have received a response, by local address.
#[derive(Default)]
pub(super) struct UsedConnections(Mutex<Used>);

#[derive(Default)]
struct Used {
    /// The time until which a request may fail because the connection was idle.
    until: HashMap<SocketAddr, Instant>,
    prune_above: usize,
}

impl UsedConnections {
    /// Records that the connection has received a response. `timeout` is the timeout of the next
    /// request on the connection.
    pub(super) fn record(&self, info: Option<&HttpInfo>, timeout: Duration) {
        let Some(info) = info else { return };
        let now = Instant::now();
        let Some(until) = now.checked_add(IDLE_TIMEOUT.saturating_add(timeout)) else { return };
        let used = &mut *self.0.lock();
        used.until.insert(info.local_addr(), until);
        if used.until.len() > used.prune_above.max(PRUNE_ABOVE) {
            used.until.retain(|_, until| *until > now);
            used.prune_above = used.until.len().saturating_mul(2);
        }
    }

    /// Whether the request failed because a reused connection ended before the first byte of the
    /// response.
    pub(super) fn ended_before_response(&self, error: &reqwest::Error) -> bool {
        if error.is_timeout() || error.is_connect() {
            return false;
        }
        let has_ended = Chain::new(error).any(|cause| {
            cause.downcast_ref::<hyper::Error>().is_some_and(|error| {
                error.is_incomplete_message() || error.is_canceled() || error.is_closed()
            }) || cause.downcast_ref::<std::io::Error>().is_some_and(|error| {
                use std::io::ErrorKind::{
                    BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof,
                };
                let kinds = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
                kinds.contains(&error.kind())
            })
        });
        has_ended
            && Chain::new(error)
                .find_map(|cause| cause.downcast_ref::<legacy::Error>()?.connect_info())
                .and_then(|connected| {
                    let mut extensions = http::Extensions::new();
                    connected.get_extras(&mut extensions);
                    extensions.get::<HttpInfo>().map(HttpInfo::local_addr)
                })
                .and_then(|local| self.0.lock().until.remove(&local))
                .is_some_and(|until| until > Instant::now())
    }
}
