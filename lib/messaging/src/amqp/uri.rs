//! The setting `AMQP_URI`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use lapin::uri::{AMQPAuthority, AMQPUri};
use runtime::settings::{ServerList, split_urls};
use runtime::{LogLimiter, Unusable};
use sqlite_file::Location;

use super::connection::ConnectError;

const EXPECTED: &str = "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, amqps://…, several hosts \
    or URIs of one cluster separated by commas, or sqlite:PATH, without : or ? in PATH";
/// The minimum time between two warnings about one node.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// The broker that `AMQP_URI` names. `Debug` and the errors leave out the user and the password.
#[derive(Clone)]
pub enum BrokerUrl {
    /// RabbitMQ.
    Amqp(AmqpUri),
    /// A queue in a file.
    Sqlite(Location),
}

impl BrokerUrl {
    /// The file at `path`, which is created when it is first opened.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self::Sqlite(Location::new(path))
    }
}

impl FromStr for BrokerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match Location::from_url(text) {
            Some(location) => Ok(Self::Sqlite(location)),
            None => text.parse().map(Self::Amqp),
        }
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Amqp(uri) => uri.fmt(formatter),
            Self::Sqlite(location) => location.fmt(formatter),
        }
    }
}

/// How to connect to RabbitMQ.
#[derive(Clone, Debug)]
pub struct Access {
    /// The address, virtual host, user and password.
    pub uri: AmqpUri,
    /// PEM certificates of authorities to trust in addition to the system's.
    pub authorities: Option<String>,
}

/// The nodes of a RabbitMQ cluster, at least one. All have the same virtual host. `Debug` leaves
/// out the users and the passwords.
#[derive(Clone)]
pub struct AmqpUri(pub(crate) Vec<Node>);

/// One node of the list.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) uri: AMQPUri,
    /// Limits the warnings about this node. All connections of the process share it.
    warnings: Arc<LogLimiter>,
}

impl Node {
    fn new(uri: AMQPUri) -> Self {
        Self { uri, warnings: Arc::new(LogLimiter::new(WARNING_INTERVAL)) }
    }

    /// Logs that this node cannot be used although another one is connected.
    pub(crate) fn warn_unusable(&self, reason: &Unusable<ConnectError>) {
        if self.warnings.count().is_some() {
            let AMQPAuthority { host, port, .. } = &self.uri.authority;
            tracing::warn!(
                node = %format_args!("{host}:{port}"),
                %reason,
                "a listed RabbitMQ node cannot be used; connected to another one"
            );
        }
    }
}

impl FromStr for AmqpUri {
    type Err = String;

    /// Parses `amqp://USER:PASSWORD@HOST:PORT,HOST:PORT/VHOST` or a list of URIs. An error says
    /// which part is not allowed, without its text.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uris: Vec<_> = split_urls(text).collect();
        let mut nodes: Vec<AMQPUri> = Vec::new();
        for (position, uri) in uris.iter().enumerate() {
            let parsed = parse_uri(uri, uris.len() > 1).and_then(|parsed| {
                // Two nodes would otherwise get different queues.
                let vhosts = (nodes.first().map(|node| &node.vhost), &parsed[0].vhost);
                match vhosts {
                    (Some(first), vhost) if first != vhost => {
                        Err("the virtual host is not that of the first URI, but all nodes must \
                             have the same one"
                            .to_owned())
                    }
                    _ => Ok(parsed),
                }
            });
            nodes.extend(parsed.map_err(|reason| match uris.len() {
                1 => format!("{reason}; {EXPECTED}"),
                count => format!("URI {} of {count}: {reason}; {EXPECTED}", position + 1),
            })?);
        }
        Ok(Self(nodes.into_iter().map(Node::new).collect()))
    }
}

/// Parses `amqp://USER:PASSWORD@HOST:PORT,HOST:PORT/VHOST` into one URI for each host, at least
/// one.
fn parse_uri(uri: &str, is_in_list: bool) -> Result<Vec<AMQPUri>, String> {
    let list = ServerList::of(uri).filter(|list| ["amqp", "amqps"].contains(&list.scheme));
    let list = list.ok_or("the text does not start with amqp:// or amqps://")?;
    // A comma in a virtual host is written %2C, so this one separates hosts or URIs.
    if list.path.contains(',') || list.query.contains(',') {
        return Err("a comma follows the virtual host without a URI after it: list all hosts \
                    before the virtual host, or list whole URIs; write a comma in the virtual \
                    host as %2C"
            .to_owned());
    }
    list.check()?;
    if is_in_list && list.hosts == [""] {
        return Err("the host is empty".to_owned());
    }
    let parse = |(position, host): (usize, &&str)| {
        let mut node = list.parse(position, parse_node)?;
        // lapin's parser replaces an IPv6 address by `localhost`.
        if let Some(end) = host.find(']') {
            host[..=end].clone_into(&mut node.authority.host);
        }
        Ok(node)
    };
    list.hosts.iter().enumerate().map(parse).collect()
}

fn parse_node(uri: &str) -> Option<AMQPUri> {
    let mut uri: AMQPUri = uri.parse().ok()?;
    // Operators reuse the settings of the Go services, whose client reads a bare trailing slash as
    // the default vhost.
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    // With the broker's default, a dead peer is noticed only after two minutes.
    uri.query.heartbeat.get_or_insert(5);
    // Small frames save memory, because lapin buffers 64 of them for each connection. Messages are
    // below 1 KiB.
    uri.query.frame_max.get_or_insert(16 * 1024);
    Some(uri)
}

impl fmt::Debug for AmqpUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, Node { uri, .. }) in self.0.iter().enumerate() {
            let AMQPUri { scheme, authority, vhost, .. } = uri;
            let comma = if position == 0 { "" } else { "," };
            write!(
                formatter,
                "{comma}{scheme}://***@{}:{}/{vhost}",
                authority.host, authority.port
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<BrokerUrl, String> {
        text.parse()
    }

    fn uris(text: &str) -> Vec<AMQPUri> {
        let AmqpUri(nodes) = text.parse().unwrap();
        nodes.into_iter().map(|node| node.uri).collect()
    }

    #[test]
    fn scheme_selects_the_backend() {
        assert!(matches!(parse("sqlite:data/queue.db"), Ok(BrokerUrl::Sqlite(_))));
        assert!(matches!(parse("amqp://host"), Ok(BrokerUrl::Amqp(_))));
        assert!(parse("sqlite::memory:").is_err());
    }

    #[test]
    fn debug_text_and_error_hide_the_password() {
        let url = parse("amqp://me:s3cret@host:5671/x").unwrap();
        assert_eq!(format!("{url:?}"), "amqp://***@host:5671/x");
        assert!(!parse("http://me:s3cret@host").unwrap_err().contains("s3cret"));
    }

    #[test]
    fn trailing_slash_means_the_default_vhost() {
        for text in ["amqp://a:b@host:5672/", "amqp://a:b@host:5672/%2f", "amqp://a:b@host:5672"] {
            assert_eq!(text.parse::<AmqpUri>().unwrap().0[0].uri.vhost, "/", "{text}");
        }
        assert_eq!("amqp://a:b@host/team".parse::<AmqpUri>().unwrap().0[0].uri.vhost, "team");
    }

    #[test]
    fn heartbeat_defaults_to_five_seconds() {
        assert_eq!("amqp://host".parse::<AmqpUri>().unwrap().0[0].uri.query.heartbeat, Some(5));
        let own = "amqp://host/x?heartbeat=30".parse::<AmqpUri>().unwrap();
        assert_eq!(own.0[0].uri.query.heartbeat, Some(30));
    }

    #[test]
    fn hosts_and_uris_can_be_listed() {
        for text in [
            "amqp://u:p@a,b:5673,[::1]:5674/v?heartbeat=30",
            "amqp://u:p@a/v?heartbeat=30,amqp://u:p@b:5673/v?heartbeat=30,amqp://u:p@[::1]:5674/v?heartbeat=30",
            "amqp://u:p@a, b:5673/v?heartbeat=30, amqp://u:p@[::1]:5674/v?heartbeat=30",
        ] {
            let nodes = uris(text);
            let address = |node: &AMQPUri| (node.authority.host.clone(), node.authority.port);
            let addresses: Vec<_> = nodes.iter().map(address).collect();
            let expected = [("a", 5672), ("b", 5673), ("[::1]", 5674)];
            assert_eq!(addresses, expected.map(|(host, port)| (host.to_owned(), port)), "{text}");
            for node in nodes {
                assert_eq!(node.authority.userinfo.password, "p", "{text}");
                assert_eq!((node.vhost.as_str(), node.query.heartbeat), ("v", Some(30)), "{text}");
            }
        }
    }

    #[test]
    fn comma_in_the_password_separates_no_hosts() {
        let nodes = uris("amqp://u:p,q@a,b/v");
        assert_eq!(nodes.len(), 2);
        assert!(nodes.iter().all(|node| node.authority.userinfo.password == "p,q"));
    }

    #[test]
    fn error_says_which_part_of_a_list_is_not_allowed() {
        for (text, reason) in [
            ("amqp://a,amqp://b/other", "URI 2 of 2: the virtual host is not that of the first"),
            ("amqp://u:p@a,/v", "host 2 of 2 is empty"),
            ("amqp://,a/v", "host 1 of 2 is empty"),
            ("amqp://a,,b/v", "host 2 of 3 is empty"),
            ("amqp://a,b:port/v", "the port of host 2 of 2 is not a number from 1 to 65535"),
            ("amqp://a:99999", "the port of the host is not a number from 1 to 65535"),
            ("amqp://a,b/v,amqp://c,d:0/v", "URI 2 of 2: the port of host 2 of 2 is not a number"),
            ("amqp://a,b c/v", "host 2 of 2 is not a host name or an address"),
            ("amqp://a/v,", "a comma follows the virtual host"),
            ("amqp://a/v,b:5673", "a comma follows the virtual host"),
            ("amqp://a,amqp://", "URI 2 of 2: the host is empty"),
            ("amqp://a/v,http://b/v", "URI 2 of 2: the text does not start with amqp:// or"),
            ("a:5672", "the text does not start with amqp:// or amqps://"),
            ("amqp://u:%ff@a", "the user or the password is not percent-encoded UTF-8"),
            ("amqp://a/%ff", "the path after the host is not percent-encoded UTF-8"),
            ("amqp://a?heartbeat=5s", "a parameter after the ? has a value that is not allowed"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(reason), "{text}: {error}");
            assert!(error.ends_with(EXPECTED), "{text}: {error}");
        }
    }
}
