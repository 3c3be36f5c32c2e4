//! How many files and connections this process may open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that no server may use: files, the log, and connections to broker, database and peers.
const RESERVED: u64 = 64;
/// Connections that a server has in any case.
const LEAST: usize = 8;

/// Raises the soft limit of open files to the hard one. The soft one is low by default for the sake of
/// programs that use `select`, and this is none. Gives the limit that holds now.
pub(crate) fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // If it fails, the old limit holds, and the servers take that into account.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    open_files()
}

fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many of `wanted` connections a server may have. No server takes more than half of what the limit of
/// open files leaves, so that two of one process leave each other room.
pub(crate) fn affordable(wanted: usize) -> usize {
    let open_files = open_files();
    let connections = share(wanted, open_files);
    if connections < wanted {
        tracing::info!(
            wanted,
            connections,
            open_files,
            "the limit of open files allows fewer connections than the settings: raise it (ulimit -n, LimitNOFILE)"
        );
    }
    connections
}

fn share(wanted: usize, open_files: u64) -> usize {
    let half = usize::try_from(open_files.saturating_sub(RESERVED) / 2).unwrap_or(usize::MAX);
    wanted.min(half.max(LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Field case 2.3
    #[test]
    fn connections_are_capped_by_the_limit_of_open_files() {
        assert_eq!(share(10_000, 1 << 20), 10_000);
        assert_eq!(share(10_000, u64::MAX), 10_000);
        assert_eq!(share(10_000, 256), 96);
        assert_eq!(share(64, 256), 64);
        assert_eq!(share(10_000, 16), LEAST);
    }

    // Field case 2.3
    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let raised = raise_limit();
        assert_eq!(Some(raised), getrlimit(Resource::Nofile).maximum.or(Some(u64::MAX)));
    }
}
