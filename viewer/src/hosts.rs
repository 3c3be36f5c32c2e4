//! Rejects requests whose host name is not the viewer's.
//!
//! The name of another site may resolve to this machine (DNS rebinding). The browser then lets that
//! site's pages read everything from the viewer, but sends that site's name as `Host`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use runtime::LogLimiter;
use runtime::problem::Problem;

/// Suffixes of names that cannot be registered in the public DNS.
const PRIVATE_SUFFIXES: [&str; 6] =
    [".localhost", ".local", ".internal", ".home.arpa", ".svc", ".test"];
const LOG_INTERVAL: Duration = Duration::from_mins(1);
/// The maximum length of a host name; a longer one is cut in logs and responses.
const NAME_MAX: usize = 253;

/// A host name of `VIEWER_HOSTS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedHost {
    /// `*`: any name.
    Any,
    /// `*.example.com`: any name with the suffix `.example.com`, which is the value.
    Below(String),
    /// Exactly this name.
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

#[derive(Clone)]
pub(crate) struct Hosts {
    allowed: Arc<[AllowedHost]>,
    rejections: Arc<LogLimiter>,
}

impl Hosts {
    /// Also allows this machine's own name.
    pub(crate) fn new(allowed: &[AllowedHost]) -> Self {
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let own = own.and_then(|name| name.parse().ok());
        let allowed = allowed.iter().cloned().chain(own).collect();
        Self { allowed, rejections: Arc::new(LogLimiter::new(LOG_INTERVAL)) }
    }

    fn allows(&self, authority: &str) -> bool {
        let name = name_of(authority).to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let is_address = name.parse::<Ipv4Addr>().is_ok() || name.parse::<Ipv6Addr>().is_ok();
        // The public DNS has no names without a dot, such as localhost or a Compose service.
        let is_private =
            !name.contains('.') || PRIVATE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        is_address
            || is_private
            || self.allowed.iter().any(|allowed| match allowed {
                AllowedHost::Any => true,
                AllowedHost::Below(suffix) => name.ends_with(suffix),
                AllowedHost::Name(allowed) => name == allowed,
            })
    }
}

/// Answers 421 to a request whose host name is not allowed.
pub(crate) async fn reject_unknown_hosts(
    State(hosts): State<Hosts>,
    request: Request,
    next: Next,
) -> Response {
    let authority = request.uri().authority().map(|authority| authority.as_str().to_owned());
    let header = request.headers().get(header::HOST);
    // Browsers always send a host name, so a request without one is allowed.
    let host = authority
        .or_else(|| header.map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned()))
        .filter(|host| !host.is_empty());
    match host {
        Some(host) if !hosts.allows(&host) => {
            let host: String = name_of(&host).chars().take(NAME_MAX).collect();
            if let Some(requests) = hosts.rejections.count() {
                tracing::warn!(
                    host,
                    requests,
                    "requests rejected because of their host name; if it is the viewer's, add it to VIEWER_HOSTS"
                );
            }
            let detail = format!(
                "the host name {host:?} is not allowed; if it is the viewer's, add it to VIEWER_HOSTS"
            );
            Problem::new(StatusCode::MISDIRECTED_REQUEST, detail).into_response()
        }
        _ => next.run(request).await,
    }
}

/// The host name in an authority, without user and port.
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
    fn public_host_name_is_rejected_unless_allowed() {
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
