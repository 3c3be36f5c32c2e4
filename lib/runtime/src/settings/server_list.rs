//! URLs that may list several servers.

/// The parts of `SCHEME://USER:PASSWORD@HOST:PORT,HOST:PORT/PATH?QUERY`.
#[derive(Debug, PartialEq, Eq)]
pub struct ServerList<'a> {
    /// The text before `://`.
    pub scheme: &'a str,
    /// The user and the password with the `@` after them; empty if there are none.
    pub user: &'a str,
    /// Each server's host and, if the URL contains it, port. At least one.
    pub hosts: Vec<&'a str>,
    /// The path from its `/`; may be empty.
    pub path: &'a str,
    /// The text after the `?`, without a fragment; may be empty.
    pub query: &'a str,
}

impl<'a> ServerList<'a> {
    /// Splits the URL; `None` if the text is not a URL.
    #[must_use]
    pub fn of(url: &'a str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
        let (authority, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (user, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let hosts = hosts.split(',').map(str::trim).collect();
        Some(Self { scheme, user, hosts, path, query })
    }

    /// Checks the ports, and that no server of a list is empty.
    ///
    /// # Errors
    /// The server that is not allowed, and the reason. A malformed URL may have a part of the
    /// password in the place of a host, so the text does not contain the host.
    pub fn check(&self) -> Result<(), String> {
        for (position, host) in self.hosts.iter().enumerate() {
            let name = self.name(position);
            if self.hosts.len() > 1 && (host.is_empty() || host.starts_with(':')) {
                return Err(format!("{name} is empty: add it, or remove the comma"));
            }
            let after_address = host.rfind(']').map_or(*host, |end| &host[end + 1..]);
            let Some((before, port)) = after_address.split_once(':') else { continue };
            if port.contains(':') {
                return Err(format!(
                    "{name} contains more than one colon: write an IPv6 address in brackets"
                ));
            }
            let is_number = port.parse::<u16>().is_ok_and(|port| port > 0);
            let is_default = port.is_empty() && !before.is_empty();
            if !is_number && !is_default {
                return Err(format!("the port of {name} is not a number from 1 to 65535"));
            }
        }
        Ok(())
    }

    /// The server at this position, as errors name it: `host 2 of 3`.
    #[must_use]
    pub fn name(&self, position: usize) -> String {
        match self.hosts.len() {
            1 => "the host".to_owned(),
            count => format!("host {} of {count}", position + 1),
        }
    }

    /// Parses the URL of the server at this position, part by part, to find the invalid part.
    ///
    /// # Errors
    /// The invalid part.
    pub fn parse<T>(
        &self,
        position: usize,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<T, String> {
        let Self { scheme, user, path, query, .. } = self;
        let host = self.hosts.get(position).copied().unwrap_or_default();
        let name = self.name(position);
        let invalid_host = || format!("{name} is not a host name or an address");
        parse(&format!("{scheme}://{host}")).ok_or_else(invalid_host)?;
        parse(&format!("{scheme}://{user}{host}"))
            .ok_or("the user or the password is not percent-encoded UTF-8")?;
        parse(&format!("{scheme}://{user}{host}{path}"))
            .ok_or("the path after the host is not percent-encoded UTF-8")?;
        let whole = parse(&format!("{scheme}://{user}{host}{path}?{query}"));
        Ok(whole.ok_or("a parameter after the ? has a value that is not allowed")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_is_split_into_its_servers() {
        let list = ServerList::of("x://u:p,q@a:1, [::1]:2,c/d?e=f#g").unwrap();
        let hosts = vec!["a:1", "[::1]:2", "c"];
        let expected = ServerList { scheme: "x", user: "u:p,q@", hosts, path: "/d", query: "e=f" };
        assert_eq!(list, expected);
        assert_eq!(list.check(), Ok(()));
        assert_eq!(ServerList::of("x://a?b=/c").unwrap().query, "b=/c");
        assert_eq!(ServerList::of("a:1"), None);
    }

    #[test]
    fn error_names_the_server() {
        for (url, expected) in [
            ("x://a,b:99999", "the port of host 2 of 2 is not a number from 1 to 65535"),
            ("x://a:0", "the port of the host is not a number from 1 to 65535"),
            ("x://a,[::1]:x", "the port of host 2 of 2 is not a number from 1 to 65535"),
            ("x://a,,b", "host 2 of 3 is empty: add it, or remove the comma"),
            ("x://a,/b", "host 2 of 2 is empty: add it, or remove the comma"),
            ("x://::1", "the host contains more than one colon: write an IPv6 address in brackets"),
        ] {
            assert_eq!(ServerList::of(url).unwrap().check(), Err(expected.to_owned()), "{url}");
        }
    }
}
