//! The limit of file descriptors: how many files and connections this process may open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that the HTTP servers leave free for files, the log, and connections to
/// dependencies.
const RESERVED: u64 = 64;
/// Connections that a server allows regardless of the limit.
const CONNECTIONS_MIN: usize = 8;

/// Raises the soft limit of open files to the hard limit, and returns the resulting limit. The
/// default soft limit is low only because of programs that use `select`; this program does not use
/// it.
pub(crate) fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // If this fails, the old limit applies, which `max_connections` reads.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    open_files()
}

fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The number of connections that a server may open, at most `wanted`. A server uses at most half
/// of the free descriptors, so that two servers fit into one process.
pub(crate) fn max_connections(wanted: usize) -> usize {
    let open_files = open_files();
    let connections = capped(wanted, open_files);
    if connections < wanted {
        tracing::info!(
            wanted,
            connections,
            open_files,
            "the limit of open files allows fewer connections than configured; to allow more, \
            raise it (ulimit -n, LimitNOFILE)"
        );
    }
    connections
}

fn capped(wanted: usize, open_files: u64) -> usize {
    let half = usize::try_from(open_files.saturating_sub(RESERVED) / 2).unwrap_or(usize::MAX);
    wanted.min(half.max(CONNECTIONS_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Field case 2.3
    #[test]
    fn connections_are_capped_by_the_limit_of_open_files() {
        assert_eq!(capped(10_000, 1 << 20), 10_000);
        assert_eq!(capped(10_000, u64::MAX), 10_000);
        assert_eq!(capped(10_000, 256), 96);
        assert_eq!(capped(64, 256), 64);
        assert_eq!(capped(10_000, 16), CONNECTIONS_MIN);
    }

    // Field case 2.3
    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let raised = raise_limit();
        assert_eq!(Some(raised), getrlimit(Resource::Nofile).maximum.or(Some(u64::MAX)));
    }
}
