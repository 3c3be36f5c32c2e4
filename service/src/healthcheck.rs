//! The command `healthcheck`: asks the service beside it whether it is ready, for images that have no
//! curl.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use crate::http::reachable;

/// What it is called on the command line.
pub(crate) const NAME: &str = "healthcheck";
pub(crate) const ABOUT: &str = "Ask the service that runs here with the same ADMIN_ADDR whether it is ready: 0 if it is, or 1, and why";

/// For each step. What asks for it gives up after some seconds as well, and then has no reason.
const TIMEOUT: Duration = Duration::from_secs(1);
/// An answer has some hundred bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// Prints what `/readyz` says on that admin address, and gives 0 if it is 200, else 1.
pub(crate) fn run(admin: SocketAddr) -> ExitCode {
    let (said, code) = match ask(admin) {
        Ok(Answer { ready: true, text }) => (text, ExitCode::SUCCESS),
        Ok(Answer { ready: false, text }) => (text, ExitCode::FAILURE),
        Err(error) => (format!("no answer at ADMIN_ADDR={admin}: {error}"), ExitCode::FAILURE),
    };
    // Whoever asked may have stopped reading; the code is the answer.
    let _ = writeln!(io::stdout(), "{}", said.trim_end());
    code
}

/// What `/readyz` says.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    ready: bool,
    /// The reason if it is not; else what it does without.
    text: String,
}

fn ask(admin: SocketAddr) -> io::Result<Answer> {
    let address = SocketAddr::new(reachable(admin.ip()), admin.port());
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).or_else(|error| {
        // A machine may have no IPv4.
        if admin.ip() != Ipv6Addr::UNSPECIFIED {
            return Err(error);
        }
        TcpStream::connect_timeout(&(Ipv6Addr::LOCALHOST, admin.port()).into(), TIMEOUT)
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // By HTTP/1.0 the answer comes in one piece, and then the connection ends.
    write!(stream, "GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no HTTP"))
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    // The reason of a problem is its `detail`.
    let problem = serde_json::from_str::<serde_json::Value>(body).ok();
    let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str());
    Some(Answer { ready: status == "200", text: detail.unwrap_or(body).to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_200_is_ready_and_a_problem_is_told_by_its_detail() {
        let answer = |text: &str| parse(text).map(|answer| (answer.ready, answer.text));
        let ready = "HTTP/1.0 200 OK\r\na: b\r\n\r\nready\nwithout broker: refused\n";
        let told = (true, "ready\nwithout broker: refused\n".to_owned());
        assert_eq!(answer(ready), Some(told));
        let problem = "HTTP/1.0 503 X\r\n\r\n{\"status\":503,\"detail\":\"database: refused\"}";
        assert_eq!(answer(problem), Some((false, "database: refused".to_owned())));
        let other = "HTTP/1.0 404 Not Found\r\n\r\nwho?";
        assert_eq!(answer(other), Some((false, "who?".to_owned())));
        assert_eq!(answer("SSH-2.0-OpenSSH\r\n\r\n"), None);
    }

    #[test]
    fn what_listens_everywhere_is_asked_here() {
        assert_eq!(reachable("0.0.0.0".parse().unwrap()).to_string(), "127.0.0.1");
        assert_eq!(reachable("::".parse().unwrap()).to_string(), "127.0.0.1");
        assert_eq!(reachable("10.0.0.7".parse().unwrap()).to_string(), "10.0.0.7");
    }
}
