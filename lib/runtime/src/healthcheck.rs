//! The command `healthcheck`, which checks whether a running service is ready. It exists for
//! container images without curl.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use crate::http::reachable_ip;

pub(crate) const NAME: &str = "healthcheck";
pub(crate) const ABOUT: &str = "Check whether the service at ADMIN_ADDR is ready: exit with 0, or \
                                print the reason and exit with 1";

/// The time limit of each step. It is shorter than the usual time limit of a container's health
/// check, so that this command can print the reason before it is killed.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Size limit of the response, which usually has a few hundred bytes.
const RESPONSE_BYTES_MAX: u64 = 64 << 10;

/// Prints the response of `/readyz` at the address `admin`. Returns 0 if its status is 200, else 1.
pub(crate) fn run(admin: SocketAddr) -> ExitCode {
    let (text, code) = match get_readyz(admin) {
        Ok(Readiness { is_ready: true, text }) => (text, ExitCode::SUCCESS),
        Ok(Readiness { is_ready: false, text }) => (text, ExitCode::FAILURE),
        Err(error) => (format!("no answer at ADMIN_ADDR={admin}: {error}"), ExitCode::FAILURE),
    };
    // Fails if the caller no longer reads the output; the exit code is the result.
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
    code
}

/// The response of `/readyz`.
#[derive(Debug, PartialEq, Eq)]
struct Readiness {
    is_ready: bool,
    /// The reason why the service is not ready; or if the service is ready, the optional
    /// dependencies that are away.
    text: String,
}

fn get_readyz(admin: SocketAddr) -> io::Result<Readiness> {
    let address = SocketAddr::new(reachable_ip(admin.ip()), admin.port());
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).or_else(|error| {
        // The machine may have no IPv4.
        if admin.ip() != Ipv6Addr::UNSPECIFIED {
            return Err(error);
        }
        TcpStream::connect_timeout(&(Ipv6Addr::LOCALHOST, admin.port()).into(), TIMEOUT)
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0, so that the response is not chunked and the server closes the connection after it.
    write!(stream, "GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut response = String::new();
    stream.take(RESPONSE_BYTES_MAX).read_to_string(&mut response)?;
    parse(&response)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP response"))
}

fn parse(response: &str) -> Option<Readiness> {
    let (head, body) = response.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    // A problem document has the reason in its `detail`.
    let problem = serde_json::from_str::<serde_json::Value>(body).ok();
    let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str());
    Some(Readiness { is_ready: status == "200", text: detail.unwrap_or(body).to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_status_200_is_ready_and_a_problem_shows_its_detail() {
        let parsed = |text: &str| parse(text).map(|parsed| (parsed.is_ready, parsed.text));
        let ready = "HTTP/1.0 200 OK\r\na: b\r\n\r\nready\nwithout broker: refused\n";
        let expected = (true, "ready\nwithout broker: refused\n".to_owned());
        assert_eq!(parsed(ready), Some(expected));
        let problem = "HTTP/1.0 503 X\r\n\r\n{\"status\":503,\"detail\":\"database: refused\"}";
        assert_eq!(parsed(problem), Some((false, "database: refused".to_owned())));
        let other = "HTTP/1.0 404 Not Found\r\n\r\nno page";
        assert_eq!(parsed(other), Some((false, "no page".to_owned())));
        assert_eq!(parsed("SSH-2.0-OpenSSH\r\n\r\n"), None);
    }

    #[test]
    fn unspecified_address_is_reached_by_loopback() {
        assert_eq!(reachable_ip("0.0.0.0".parse().unwrap()).to_string(), "127.0.0.1");
        assert_eq!(reachable_ip("::".parse().unwrap()).to_string(), "127.0.0.1");
        assert_eq!(reachable_ip("10.0.0.7".parse().unwrap()).to_string(), "10.0.0.7");
    }
}
