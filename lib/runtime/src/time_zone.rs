//! `TZ`, the C library's variable for the time zone, which applies to the times in the log.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

pub(crate) const NAME: &str = "TZ";

/// The directories in which chrono, which formats the times in the log, searches for time zones.
const DIRECTORIES: [&str; 4] =
    ["/usr/share/zoneinfo", "/share/zoneinfo", "/etc/zoneinfo", "/usr/share/lib/zoneinfo"];

/// Rejects names that are certainly not a time zone. On a machine without zone data, every name
/// passes.
pub(crate) fn check(zone: &str) -> Result<(), String> {
    check_in(zone, DIRECTORIES.iter().map(Path::new).filter(|directory| directory.is_dir()))
}

fn check_in<'a>(zone: &str, directories: impl IntoIterator<Item = &'a Path>) -> Result<(), String> {
    let name = zone.strip_prefix(':').unwrap_or(zone);
    let mut directories = directories.into_iter().peekable();
    if name.is_empty()
        || name == "UTC"
        || is_posix(name)
        || directories.peek().is_none()
        || directories.any(|directory| directory.join(name).is_file())
    {
        return Ok(());
    }
    Err("expected a time zone of this machine, such as UTC or Europe/Berlin".to_owned())
}

/// Restarts the program in this process (`exec`) with `TZ` set to `zone`. The C library reads `TZ`
/// from the environment, which a running process cannot change safely.
///
/// Returns only if the restart fails, with the error.
pub(crate) fn apply(zone: &str) -> std::io::Error {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_else(|| OsString::from("lastseen"));
    let executable = match std::env::current_exe() {
        Ok(executable) => executable,
        Err(error) => return error,
    };
    Command::new(executable).arg0(program).args(arguments).env(NAME, zone).exec()
}

/// Whether the zone has POSIX form, such as `CET-1CEST` or `<+03>-3`: a name of at least three
/// letters, and an offset.
fn is_posix(zone: &str) -> bool {
    let offset = match zone.strip_prefix('<') {
        Some(quoted) => quoted.split_once('>').map_or("", |(_, offset)| offset),
        None => zone.trim_start_matches(|letter: char| letter.is_ascii_alphabetic()),
    };
    let name_length = zone.len() - offset.len();
    name_length >= 3
        && offset.trim_start_matches(['+', '-']).starts_with(|digit: char| digit.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 6.9.
    #[test]
    fn a_time_zone_that_does_not_exist_is_rejected() {
        let directory = std::env::temp_dir().join(format!("lastseen-zones-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("Europe")).unwrap();
        std::fs::write(directory.join("Europe/Berlin"), "").unwrap();
        let is_rejected = |zone| check_in(zone, [directory.as_path()]).is_err();
        let good =
            ["UTC", "", ":UTC", "Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3", "UTC+3", "<+03>-3"];
        let bad = ["Mars/Base", "Europe", "+3", "CE-1", "utcc", "<+03>"];
        let (good, bad) = (good.map(is_rejected), bad.map(is_rejected));
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!((good, bad), ([false; 7], [true; 6]));
        assert_eq!(check_in("Mars/Base", []), Ok(()));
    }
}
