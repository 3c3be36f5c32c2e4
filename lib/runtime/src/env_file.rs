//! Reads all files that hold settings: `.env`, the settings file, and the files that `NAME_FILE`
//! names.
//!
//! | written | read as |
//! | --- | --- |
//! | `NAME=value`, `export NAME = value` | `value`, without surrounding blanks |
//! | `NAME=two words # why` | `two words`; `#` after a blank begins a comment |
//! | `NAME='it is $5 # all of it'` | literally everything between the quotes; may span lines |
//! | `NAME="a\nb \"c\""` | literally, except `\n` `\r` `\t` `\"` `\\` `\$`; may span lines |
//! | `NAME=pa$$w0rd`, `NAME=${OTHER}` | literally: variables are never expanded |
//!
//! A byte order mark, blank lines and lines that begin with `#` are skipped. CRLF ends a line as LF
//! does. No error contains a value.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::str::CharIndices;

/// Maximum size of a file; a larger one does not hold settings.
const BYTES_MAX: u64 = 1 << 20;

/// One line that is neither blank nor a comment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The line number, from 1. For a value that spans several lines, the number of its first line.
    pub(crate) line: usize,
    /// `None` if the line does not begin with `NAME=`.
    pub(crate) name: Option<String>,
    /// The value, or the reason why the line is malformed.
    pub(crate) value: Result<String, &'static str>,
    /// Whether the value contains `${` outside single quotes, where other programs expand
    /// variables.
    pub(crate) looks_expandable: bool,
}

/// Reads a complete file.
///
/// # Errors
/// When the file cannot be read, is too large, or is not UTF-8. The error quotes nothing from the
/// file.
pub(crate) fn read(path: &Path) -> io::Result<String> {
    let mut content = Vec::new();
    File::open(path)?.take(BYTES_MAX + 1).read_to_end(&mut content)?;
    if content.len() as u64 > BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {BYTES_MAX} bytes")));
    }
    decode(content).map_err(io::Error::other)
}

/// The value in a file that holds a single value and no name, without surrounding blanks and line
/// ends.
pub(crate) fn single_value(content: &str) -> &str {
    content.trim_matches(|letter: char| letter.is_ascii_whitespace() || letter == '\0')
}

/// The entries of the file, in order.
pub(crate) fn parse(content: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut rest = content;
    let mut line = 1;
    while !rest.is_empty() {
        let (entry, after) = next_entry(rest);
        let consumed = &rest[..rest.len() - after.len()];
        entries.extend(entry.map(|entry| Entry { line, ..entry }));
        line += consumed.matches('\n').count();
        rest = after;
    }
    entries
}

fn decode(content: Vec<u8>) -> Result<String, String> {
    let utf_16 = |name| Err(format!("it is {name}; save it as UTF-8"));
    match content.as_slice() {
        [0xff, 0xfe, ..] => return utf_16("UTF-16, little endian"),
        [0xfe, 0xff, ..] => return utf_16("UTF-16, big endian"),
        _ => {}
    }
    let text = String::from_utf8(content).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = valid.split(|byte| *byte == b'\n').count();
        format!("line {line} is not UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The entry in the first line of `text`, if there is one, and the text after the entry.
fn next_entry(text: &str) -> (Option<Entry>, &str) {
    let (this_line, after_line) = split_line(text);
    let trimmed = this_line.trim();
    if trimmed.is_empty() || trimmed.starts_with('#') {
        return (None, after_line);
    }
    let Some((name, _)) = this_line.split_once('=') else {
        return (Some(malformed(None, "it is not of the form NAME=value")), after_line);
    };
    let offset = name.len() + 1;
    let name = name.trim();
    let name = name
        .strip_prefix("export")
        .filter(|rest| rest.starts_with([' ', '\t']))
        .unwrap_or(name)
        .trim();
    if !is_name(name) {
        return (Some(malformed(None, "the text before = is not a valid name")), after_line);
    }
    let name = Some(name.to_owned());
    let value = text[offset..].trim_start_matches([' ', '\t']);
    let Some(quote) = value.chars().next().filter(|quote| matches!(quote, '\'' | '"')) else {
        let value = unquoted(&this_line[offset..]);
        let looks_expandable = value.contains("${");
        let value = Ok(value.to_owned());
        return (Some(Entry { line: 0, name, value, looks_expandable }), after_line);
    };
    let Some((inside, after_quote)) = quoted(&value[1..], quote) else {
        return (Some(malformed(name, "a quote is not closed")), after_line);
    };
    let (after_value, after) = split_line(after_quote);
    let is_comment =
        after_value.starts_with([' ', '\t']) && after_value.trim_start().starts_with('#');
    if !after_value.trim().is_empty() && !is_comment {
        return (Some(malformed(name, "there is text after the closing quote")), after_line);
    }
    let looks_expandable = quote == '"' && inside.contains("${");
    (Some(Entry { line: 0, name, value: Ok(inside), looks_expandable }), after)
}

fn malformed(name: Option<String>, problem: &'static str) -> Entry {
    Entry { line: 0, name, value: Err(problem), looks_expandable: false }
}

fn split_line(text: &str) -> (&str, &str) {
    let (line, after) = text.split_once('\n').unwrap_or((text, ""));
    (line.strip_suffix('\r').unwrap_or(line), after)
}

fn is_name(text: &str) -> bool {
    let mut letters = text.chars();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && letters.all(|letter| letter.is_ascii_alphanumeric() || "_.-".contains(letter))
}

/// The text before the comment, if there is one. A comment begins with a `#` at the start of the
/// text or after a blank.
fn unquoted(text: &str) -> &str {
    let is_comment = |at: usize| at == 0 || text[..at].ends_with([' ', '\t']);
    let end = text.match_indices('#').map(|(at, _)| at).find(|at| is_comment(*at));
    text[..end.unwrap_or(text.len())].trim()
}

/// The text up to the closing `quote`, with CRLF replaced by LF, and the text after it.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let mut inside = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            _ if letter == quote => return Some((inside, &text[at + 1..])),
            '\\' if quote == '"' => push_escaped(&mut inside, &mut letters)?,
            '\r' if text[at..].starts_with("\r\n") => {}
            _ => inside.push(letter),
        }
    }
    None
}

fn push_escaped(inside: &mut String, letters: &mut CharIndices<'_>) -> Option<()> {
    let (_, letter) = letters.next()?;
    match letter {
        'n' => inside.push('\n'),
        'r' => inside.push('\r'),
        't' => inside.push('\t'),
        '"' | '\\' | '$' => inside.push(letter),
        _ => inside.extend(['\\', letter]),
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(content: &str) -> Vec<(usize, String, String)> {
        let entries = parse(content).into_iter();
        entries.map(|entry| (entry.line, entry.name.unwrap(), entry.value.unwrap())).collect()
    }

    #[track_caller]
    fn assert_value(line: &str, expected: &str) {
        assert_eq!(values(line), [(1, "NAME".to_owned(), expected.to_owned())], "{line:?}");
    }

    /// Field case 6.1.
    #[test]
    fn lines_are_read_as_the_table_says() {
        for line in [
            "NAME=value",
            "NAME=value \t",
            "NAME=value\r\n",
            "  NAME = value",
            "export NAME=value",
            "export\tNAME='value'",
            "NAME=\"value\" # why",
            "NAME=value # why",
        ] {
            assert_value(line, "value");
        }
        assert_value("NAME=two words", "two words");
        assert_value("NAME=a#b", "a#b");
        assert_value("NAME=#b", "");
        assert_value("NAME=", "");
        assert_value("NAME=''", "");
        assert_value("NAME=it's", "it's");
        assert_value("NAME=a=b", "a=b");
        assert_value("NAME='a \" # b'", "a \" # b");
        assert_value(r#"NAME="a\n\"\\\$\x""#, "a\n\"\\$\\x");
        assert_value("NAME='-----BEGIN\r\n-----END'\r\n", "-----BEGIN\n-----END");
    }

    /// Field case 6.2.
    #[test]
    fn variables_are_not_expanded() {
        for text in ["pa$$w0rd", "pa${HOME}", "$HOME", "`id`"] {
            assert_value(&format!("NAME={text}"), text);
            assert_value(&format!("NAME='{text}'"), text);
            assert_value(&format!("NAME=\"{text}\""), text);
        }
        assert!(parse("NAME=a${B}")[0].looks_expandable);
        assert!(!parse("NAME='a${B}'")[0].looks_expandable);
        assert!(!parse("NAME=pa$$w0rd")[0].looks_expandable);
    }

    /// Field case 6.1.
    #[test]
    fn malformed_line_is_reported_and_affects_no_other() {
        let content =
            "A=1\r\n\r\n# x\r\nno assignment\r\nB='x\ny'\n2 C=3\nD='never closed\nE=\"x\"y\nF=6";
        let read: Vec<_> = parse(content)
            .into_iter()
            .map(|entry| (entry.line, entry.name.unwrap_or_default(), entry.value.is_ok()))
            .collect();
        let expected = [
            (1, "A", true),
            (4, "", false),
            (5, "B", true),
            (7, "", false),
            (8, "D", false),
            (9, "E", false),
            (10, "F", true),
        ];
        assert_eq!(read, expected.map(|(line, name, ok)| (line, name.to_owned(), ok)));
    }

    /// Field case 6.1.
    #[test]
    fn a_byte_order_mark_is_skipped_and_other_encodings_are_named() {
        assert_eq!(decode(b"\xef\xbb\xbfA=1".to_vec()), Ok("A=1".to_owned()));
        assert!(decode(b"\xff\xfeA\0".to_vec()).unwrap_err().contains("UTF-16"));
        assert_eq!(decode(b"A=1\nB=\xff".to_vec()), Err("line 2 is not UTF-8".to_owned()));
    }

    #[test]
    fn single_value_loses_only_surrounding_blanks() {
        assert_eq!(single_value(" 'pa$$ #w0rd' \r\n"), "'pa$$ #w0rd'");
    }

    proptest! {
        /// Field case 6.1.
        #[test]
        fn a_quoted_value_reads_back_as_itself(value in "[^\r\0]*", eol in "(\n|\r\n)") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let content = format!("# x{eol}A=1{eol}NAME = \"{escaped}\" # x{eol}B=2");
            let read = values(&content);
            prop_assert_eq!(read.len(), 3);
            prop_assert_eq!(&read[1].2, &value);
            prop_assert_eq!(&read[2].2, "2");
            if !value.contains('\'') {
                prop_assert_eq!(&values(&format!("NAME='{value}'"))[0].2, &value);
            }
        }

        /// Field case 6.1.
        #[test]
        fn any_text_parses_with_ascending_line_numbers(content in "([ -~]|[\n\r'\"\\\\=#$\t€])*") {
            let lines: Vec<_> = parse(&content).into_iter().map(|entry| entry.line).collect();
            prop_assert!(lines.is_sorted());
            prop_assert!(lines.last().is_none_or(|last| *last <= content.matches('\n').count() + 1));
        }
    }
}
