//! JSON events, and where they are in the document.

use json_event_parser::{JsonEvent, LowLevelJsonParser, LowLevelJsonParserResult};

use crate::definition::MAX_GROUPS;

/// Each group opens an object in an array. The rest is for maintenance windows.
const MAX_NESTING: usize = 2 * MAX_GROUPS as usize + 16;

/// Reads the events of one document.
pub(super) struct Json<'a> {
    content: &'a [u8],
    /// Where the last event ended.
    end: usize,
    /// Where the last event was looked for: where the one before it ended, or where an error is.
    start: usize,
    parser: LowLevelJsonParser,
}

impl<'a> Json<'a> {
    pub(super) fn new(content: &'a [u8]) -> Self {
        let parser = LowLevelJsonParser::new().with_max_stack_size(MAX_NESTING);
        Self { content, end: 0, start: 0, parser }
    }

    /// Reads the next event. An error says why the document is not JSON.
    pub(super) fn next(&mut self) -> Result<JsonEvent<'a>, String> {
        self.start = self.end;
        let rest = self.content.get(self.end..).unwrap_or_default();
        let LowLevelJsonParserResult { event, consumed_bytes } = self.parser.parse_next(rest, true);
        self.end += consumed_bytes;
        match event {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => {
                self.start = usize::try_from(error.location().start.offset).unwrap_or(self.start);
                Err(format!("invalid JSON: {}", bounded(error.message())))
            }
            None => Err("invalid JSON: it ends too early".to_owned()),
        }
    }

    /// Where the last event starts.
    pub(super) fn token_start(&self) -> usize {
        let separators = |byte: &&u8| b" \t\r\n,:\xEF\xBB\xBF".contains(byte);
        let rest = self.content.get(self.start..).unwrap_or_default();
        self.start + rest.iter().take_while(separators).count()
    }
}

/// The message of the JSON parser, bounded and on one line.
fn bounded(message: &str) -> String {
    let mut short: String = message.chars().take(120).flat_map(char::escape_debug).collect();
    if message.chars().nth(120).is_some() {
        short.push('…');
    }
    short
}

/// The line and the column (in characters) of an offset, both from 1.
pub(super) fn line_and_column(content: &[u8], offset: usize) -> (usize, usize) {
    let before = &content[..offset.min(content.len())];
    let before = before.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(before);
    let (mut line, mut line_start) = (1, 0);
    for (place, _) in before.iter().enumerate().filter(|&(_, &byte)| byte == b'\n') {
        (line, line_start) = (line + 1, place + 1);
    }
    let column = before[line_start..].iter().filter(|&&byte| byte & 0xC0 != 0x80).count() + 1;
    (line, column)
}
