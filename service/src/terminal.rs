//! The terminal on standard error, if there is one: the log above, and one status line below it.

use std::io::{self, IsTerminal as _};

use crate::log_output;

/// Erases what is right of the cursor.
pub(crate) const ERASE: &[u8] = b"\x1b[K";
/// What does not fit into the line goes to its last column instead of a line of its own.
const WRAP_OFF: &[u8] = b"\x1b[?7l";
const WRAP_ON: &[u8] = b"\x1b[?7h";

/// Whether standard error is a terminal.
#[must_use]
pub fn is_there() -> bool {
    io::stderr().is_terminal()
}

/// Shows `line` below the log, in place of the one before; what the terminal is too narrow for is left
/// out, since a second line would stay there. The cursor stays at its beginning, so that a log line
/// takes its place until it is shown again.
pub fn show_status(line: &str) {
    let drawn = [WRAP_OFF, line.as_bytes(), ERASE, WRAP_ON, b"\r"].concat();
    log_output::show(&drawn);
}
