//! Which host names the viewer answers for.
//!
//! A web page of another site can have its own name resolve to this machine (DNS rebinding). The browser then lets it
//! read everything here, but sends that name as `Host`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use service::problem::Problem;

/// Suffixes of names that nobody can register in the public DNS.
const PRIVATE: [&str; 6] = [".localhost", ".local", ".internal", ".home.arpa", ".svc", ".test"];
const LOG_INTERVAL: Duration = Duration::from_mins(1);
/// The most of a refused name that is quoted; no name is longer.
const NAME_MAX: usize = 253;

/// A host name of `VIEWER_HOSTS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedHost {
    /// `*`: any name.
    Any,
    /// `*.example.com`: any name below it; the value begins with the dot.
    Below(String),
    /// This name.
    Name(String),
}

impl FromStr for AllowedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim().to_ascii_lowercase();
        if text == "*" {
            return Ok(Self::Any);
        }
        let (name, is_below) = text.strip_prefix("*.").map_or((&*text, false), |name| (name, true));
        let is_allowed =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        let is_name = !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(is_allowed);
        if !is_name {
            return Err(
                "expected host names without port, such as status.example.com, *.example.com or *"
                    .to_owned(),
            );
        }
        Ok(if is_below { Self::Below(format!(".{name}")) } else { Self::Name(name.to_owned()) })
    }
}

/// The names that are answered, and when a refusal was last logged.
#[derive(Clone)]
pub(crate) struct Hosts {
    allowed: Arc<[AllowedHost]>,
    refused: Arc<Mutex<Refused>>,
}

#[derive(Default)]
struct Refused {
    logged_at: Option<Instant>,
    since_then: u64,
}

impl Hosts {
    /// The host's own name is always allowed.
    pub(crate) fn new(allowed: &[AllowedHost]) -> Self {
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let own = own.and_then(|name| name.parse().ok());
        let allowed = allowed.iter().cloned().chain(own).collect();
        Self { allowed, refused: Arc::default() }
    }

    fn allows(&self, authority: &str) -> bool {
        let name = name_of(authority).to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let is_address = name.parse::<Ipv4Addr>().is_ok() || name.parse::<Ipv6Addr>().is_ok();
        // A name without a dot, such as localhost or the name of a Compose service, is none of the public DNS.
        let is_private = !name.contains('.') || PRIVATE.iter().any(|suffix| name.ends_with(suffix));
        is_address
            || is_private
            || self.allowed.iter().any(|allowed| match allowed {
                AllowedHost::Any => true,
                AllowedHost::Below(suffix) => name.ends_with(suffix),
                AllowedHost::Name(allowed) => name == allowed,
            })
    }

    fn log_refusal(&self, host: &str) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.since_then = refused.since_then.saturating_add(1);
        if refused.logged_at.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            return;
        }
        let requests = std::mem::take(&mut refused.since_then);
        refused.logged_at = Some(Instant::now());
        drop(refused);
        tracing::warn!(
            host,
            requests,
            "requests refused: the viewer does not answer for this host name; add it to VIEWER_HOSTS if it is yours"
        );
    }
}

/// Refuses a request with the name of another host: 421.
pub(crate) async fn refuse_others(
    State(hosts): State<Hosts>,
    request: Request,
    next: Next,
) -> Response {
    let authority = request.uri().authority().map(|authority| authority.as_str().to_owned());
    let header = request.headers().get(header::HOST);
    // Without a name it is no browser's request.
    let host = authority
        .or_else(|| header.map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned()))
        .filter(|host| !host.is_empty());
    match host {
        Some(host) if !hosts.allows(&host) => {
            let host: String = name_of(&host).chars().take(NAME_MAX).collect();
            hosts.log_refusal(&host);
            let detail = format!(
                "this viewer does not answer for the host name {host:?}; if the name is yours, add it to VIEWER_HOSTS"
            );
            Problem::new(StatusCode::MISDIRECTED_REQUEST, detail).into_response()
        }
        _ => next.run(request).await,
    }
}

/// The host of an authority, without user and port.
fn name_of(authority: &str) -> &str {
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address;
    }
    host.split_once(':').map_or(host, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Field case 7.6
    #[test]
    fn a_name_of_the_public_dns_is_refused_unless_it_is_allowed() {
        let hosts = |text: &str| {
            let allowed: Vec<AllowedHost> =
                text.split_terminator(',').map(|name| name.parse().unwrap()).collect();
            Hosts::new(&allowed)
        };
        for host in [
            "localhost:9080",
            "LOCALHOST",
            "127.0.0.1",
            "127.0.0.1:9080",
            "[::1]:9080",
            "[fe80::1]",
            "viewer:9080",
            "viewer.prod.svc",
            "viewer.prod.svc.cluster.local:9080",
            "me.local.",
            "app.localhost",
        ] {
            assert!(hosts("").allows(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "me@evil.example",
            "[::1].evil.example@evil.example",
            "evil.example.",
        ] {
            assert!(!hosts("").allows(host), "{host}");
            assert!(!hosts("example,status.example.com,*.example.org").allows(host), "{host}");
            assert!(hosts("*").allows(host), "{host}");
        }
        let some = hosts("Status.example.com,*.example.org");
        assert!(some.allows("status.EXAMPLE.com:443") && some.allows("a.b.example.org"));
        assert!(!some.allows("example.org") && !some.allows("x.status.example.com"));
        for text in ["", "*.", "a b", "https://a.example", "a.example:80", "*a.example"] {
            assert!(text.parse::<AllowedHost>().is_err(), "{text}");
        }
    }
}
