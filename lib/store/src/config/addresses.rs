//! The settings `POSTGRES_HOST` and `POSTGRES_PORT`, which may list several servers.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, FromArgMatches};

use crate::postgres::ServerWarnings;

const HOST: &str = "localhost";
const PORT: u16 = 5432;

/// Hosts and ports of the servers, at least one.
#[derive(Clone, Debug)]
pub struct Addresses {
    list: Vec<(String, u16)>,
    warnings: ServerWarnings,
}

impl Addresses {
    fn new(list: Vec<(String, u16)>) -> Self {
        let warnings = ServerWarnings::of_servers(list.len());
        Self { list, warnings }
    }

    pub(super) fn warnings(&self) -> ServerWarnings {
        self.warnings.clone()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u16)> {
        self.list.iter().map(|(host, port)| (host.as_str(), *port))
    }
}

impl Default for Addresses {
    fn default() -> Self {
        Self::new(vec![(HOST.to_owned(), PORT)])
    }
}

/// The settings from which clap builds [`Addresses`].
#[derive(Args)]
struct Lists {
    /// Host name or address of the server; or those of several servers of one database, separated
    /// by commas
    #[arg(long, default_value = HOST)]
    postgres_host: Hosts,
    /// Port of the server, or of all servers; or one for each, separated by commas
    #[arg(long, default_value_t = Ports(vec![PORT]))]
    postgres_port: Ports,
}

impl TryFrom<Lists> for Addresses {
    type Error = String;

    fn try_from(lists: Lists) -> Result<Self, Self::Error> {
        let (Hosts(hosts), Ports(ports)) = (&lists.postgres_host, &lists.postgres_port);
        match ports.as_slice() {
            &[port] => Ok(Self::new(hosts.iter().map(|host| (host.clone(), port)).collect())),
            ports if ports.len() == hosts.len() => {
                Ok(Self::new(hosts.iter().cloned().zip(ports.iter().copied()).collect()))
            }
            _ => Err(format!(
                "POSTGRES_PORT={}: expected one port for all hosts, or as many ports as there are \
                 hosts in POSTGRES_HOST={}",
                lists.postgres_port,
                hosts.join(",")
            )),
        }
    }
}

impl FromArgMatches for Addresses {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let invalid = |reason| clap::Error::raw(ErrorKind::ValueValidation, reason);
        Lists::from_arg_matches(matches)?.try_into().map_err(invalid)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Addresses {
    fn augment_args(command: clap::Command) -> clap::Command {
        Lists::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Lists::augment_args_for_update(command)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hosts(Vec<String>);

impl FromStr for Hosts {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hosts: Option<_> = text.split(',').map(host).collect();
        hosts.map(Self).ok_or(
            "expected a host name or an address, or several separated by commas, without ports: \
             these belong in POSTGRES_PORT",
        )
    }
}

/// Accepts an IPv6 address also in brackets, without which sqlx expects it.
fn host(text: &str) -> Option<String> {
    let text = text.trim();
    let unbracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let host = unbracketed.unwrap_or(text);
    // An interface may follow an address, as in `fe80::1%eth0`.
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    let is_valid = if unbracketed.is_some() || host.contains(':') {
        address.parse::<Ipv6Addr>().is_ok()
    } else {
        // An @ would mean that the text contains a user and, perhaps, a password.
        !host.is_empty() && !host.contains('@')
    };
    is_valid.then(|| host.to_owned())
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Ports(Vec<u16>);

impl FromStr for Ports {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ports: Option<_> = text.split(',').map(port).collect();
        ports.map(Self).ok_or(
            "expected a port from 1 to 65535, several separated by commas, or tcp://ADDRESS:PORT \
             as Kubernetes sets it",
        )
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<String> = self.0.iter().map(u16::to_string).collect();
        formatter.write_str(&ports.join(","))
    }
}

/// Parses a port, or `tcp://ADDRESS:PORT`: Kubernetes sets `POSTGRES_PORT` to that in every pod if
/// a service is called `postgres`.
fn port(text: &str) -> Option<u16> {
    let text = text.trim();
    let digits = match text.strip_prefix("tcp://") {
        Some(address) => address.rsplit_once(':')?.1,
        None => text,
    };
    digits.parse().ok().filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        addresses: Addresses,
    }

    fn parse(host: &str, port: &str) -> Result<Vec<(String, u16)>, String> {
        let flags = [format!("--postgres-host={host}"), format!("--postgres-port={port}")];
        let cli = Cli::try_parse_from(std::iter::once("x".to_owned()).chain(flags));
        cli.map(|cli| cli.addresses.list).map_err(|error| error.to_string())
    }

    #[test]
    fn several_servers_share_one_port_or_have_one_each() {
        let addresses = |list: &[(&str, u16)]| {
            Ok(list.iter().map(|(host, port)| ((*host).to_owned(), *port)).collect())
        };
        assert_eq!(parse("a", "1"), addresses(&[("a", 1)]));
        assert_eq!(parse("a,b", "1"), addresses(&[("a", 1), ("b", 1)]));
        assert_eq!(
            parse("a, [::1],fe80::1%eth0", "1, 2,tcp://[fd00::12]:3"),
            addresses(&[("a", 1), ("::1", 2), ("fe80::1%eth0", 3)])
        );
        assert_eq!(parse("/run/postgresql", "1"), addresses(&[("/run/postgresql", 1)]));
    }

    #[test]
    fn unusable_lists_are_rejected_with_what_is_allowed() {
        for hosts in ["a,", ",a", "a,,b", "a:5432", "[a]", "[::1]:5432", "me@a"] {
            let error = parse(hosts, "1").unwrap_err();
            assert!(error.contains("expected a host name or an address, or several"), "{error}");
        }
        for (hosts, ports) in [("a", "1,2"), ("a,b,c", "1,2")] {
            let error = parse(hosts, ports).unwrap_err();
            let expected =
                "expected one port for all hosts, or as many ports as there are hosts in";
            let expected = format!("POSTGRES_PORT={ports}: {expected} POSTGRES_HOST={hosts}");
            assert!(error.contains(&expected), "{error}");
        }
    }

    /// Field case 6.6.
    #[test]
    fn port_is_read_from_a_kubernetes_service_link() {
        assert_eq!(port("5433"), Some(5433));
        assert_eq!(port("tcp://10.96.0.12:5432"), Some(5432));
        assert_eq!(port("tcp://[fd00::12]:5432"), Some(5432));
        for text in
            ["", "0", "65536", "-1", "tcp://10.96.0.12", "tcp://10.96.0.12:", "udp://10.96.0.12:53"]
        {
            let error = parse("a", text).unwrap_err();
            assert!(error.contains("expected a port from 1 to 65535"), "{text}: {error}");
        }
    }
}
