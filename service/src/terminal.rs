//! The terminal on standard error, if there is one. It shows the log and below it one status line.

use std::io::{self, IsTerminal as _};

use crate::log_output;

/// Erases the line to the right of the cursor.
pub(crate) const ERASE: &[u8] = b"\x1b[K";
/// Makes the terminal truncate a line that is too long instead of wrapping it.
const WRAP_OFF: &[u8] = b"\x1b[?7l";
const WRAP_ON: &[u8] = b"\x1b[?7h";

/// Whether standard error is a terminal.
#[must_use]
pub fn is_attached() -> bool {
    io::stderr().is_terminal()
}

/// Replaces the status line below the log. It is truncated to the width of the terminal, because a
/// wrapped second line could not be erased. The cursor stays at the line's start, so that the next
/// log line overwrites it.
pub fn show_status(line: &str) {
    let text = [WRAP_OFF, line.as_bytes(), ERASE, WRAP_ON, b"\r"].concat();
    log_output::write_text(&text);
}
