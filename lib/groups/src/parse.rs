//! Reads the JSON definition of a tree.

mod json;
mod values;

use chrono::DateTime;
use json_event_parser::JsonEvent;

use crate::builder::{BuildError, Builder, Subject, prefix, quote};
use crate::kind::Weights;
use crate::rules::{Need, Rules};
use crate::tree::Tree;
use json::Json;

/// The definition is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{file}:{line}:{column}: {}{reason}", prefix(.path))]
pub struct DefinitionError {
    /// The name of the document.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// The path of the group, shortened if it is long. It is empty outside of groups.
    pub path: String,
    /// The field, and why it is invalid.
    pub reason: String,
}

/// Reads the documents of a definition: each is a group, or an array of groups. Together they form
/// one forest. The names of the documents are used in errors.
///
/// # Errors
///
/// If a document is not valid JSON, or the definition is invalid. The error gives the location.
pub fn parse<'a>(
    documents: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    weights: Weights,
) -> Result<Tree, DefinitionError> {
    let mut parser = Parser::default();
    for document in documents {
        parser.documents.push(document);
        if let Err(problem) = parser.read_document(document.1) {
            return Err(parser.located(problem));
        }
    }
    let builder = std::mem::take(&mut parser.builder);
    builder.finish(weights).map_err(|error| parser.located_build_error(error))
}

/// The open groups are a stack here and not in the call stack, because a chain may have a million
/// levels.
#[derive(Default)]
struct Parser<'a> {
    documents: Vec<(&'a str, &'a [u8])>,
    builder: Builder,
    open: Vec<OpenGroup>,
    /// Where the names, the rules with counts and the maintenance windows are, for errors that are
    /// found after the documents were read.
    names: Vec<Place>,
    counts: Vec<(Subject, Place)>,
    maintenance: Vec<Place>,
}

/// A place in a document: the number of the document, and the offset in bytes.
type Place = (u32, u32);

struct Problem {
    place: Place,
    path: String,
    reason: String,
}

struct OpenGroup {
    group: u32,
    /// One bit for each of [`FIELDS`].
    seen: u8,
    rules: Rules,
}

const FIELDS: [&str; 7] = ["name", "children", "objects", "up", "degraded", "for", "maintenance"];

impl<'a> Parser<'a> {
    fn read_document(&mut self, content: &'a [u8]) -> Result<(), Problem> {
        let json = &mut Json::new(content);
        if u32::try_from(content.len()).is_err() {
            return self.fail(json, "the document is longer than 4 GB");
        }
        let in_array = match self.next(json)? {
            JsonEvent::StartObject => {
                self.begin(json)?;
                false
            }
            JsonEvent::StartArray => true,
            _ => return self.fail(json, "expected a group or an array of groups"),
        };
        self.read_groups(json, in_array)?;
        // The JSON parser reports anything after the value.
        self.next(json).map(drop)
    }

    /// Reads groups, beginning within an array of groups or within the fields of a group.
    fn read_groups(&mut self, json: &mut Json<'a>, mut in_array: bool) -> Result<(), Problem> {
        let several = in_array;
        loop {
            match (self.next(json)?, in_array) {
                (JsonEvent::StartObject, true) => {
                    self.begin(json)?;
                    in_array = false;
                }
                (JsonEvent::EndArray, true) if self.open.is_empty() => return Ok(()),
                (JsonEvent::EndArray, true) => in_array = false,
                (JsonEvent::ObjectKey(key), false) => in_array = self.read_field(json, &key)?,
                (JsonEvent::EndObject, false) => {
                    self.end(json)?;
                    if self.open.is_empty() && !several {
                        return Ok(());
                    }
                    in_array = true;
                }
                _ => return self.fail(json, "expected a group, such as {\"name\": \"shop\"}"),
            }
        }
    }

    fn begin(&mut self, json: &Json<'a>) -> Result<(), Problem> {
        self.built(json, Builder::begin)?;
        self.names.push(self.place(json));
        let group = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.open.push(OpenGroup { group, seen: 0, rules: Rules::default() });
        Ok(())
    }

    fn end(&mut self, json: &Json<'a>) -> Result<(), Problem> {
        if let Some(OpenGroup { rules, .. }) = self.open.pop() {
            self.built(json, |builder| builder.rules(rules))?;
        }
        self.built(json, Builder::end)
    }

    /// Returns whether the value of the field is an array of groups, which is read next.
    fn read_field(&mut self, json: &mut Json<'a>, key: &str) -> Result<bool, Problem> {
        let Some(field) = FIELDS.iter().position(|&field| field == key) else {
            let reason = format!("unknown field {}; allowed are {}", quote(key), FIELDS.join(", "));
            return self.fail(json, reason);
        };
        if let Some(open) = self.open.last_mut() {
            if open.seen & (1 << field) != 0 {
                let fields = FIELDS.join(", ");
                let reason = format!("repeated field {key}; allowed once are {fields}");
                return self.fail(json, reason);
            }
            open.seen |= 1 << field;
        }
        match key {
            "objects" => self.read_ranges(json, key, |parser, json, (first, last)| {
                parser.built(json, |builder| builder.objects(first, last))
            })?,
            "maintenance" => self.read_maintenance(json)?,
            _ => match (key, self.next(json)?) {
                ("children", JsonEvent::StartArray) => return Ok(true),
                ("children", _) => return self.fail(json, "children: expected an array of groups"),
                ("name", JsonEvent::String(name)) => {
                    if let (Some(open), place) = (self.open.last(), self.place(json)) {
                        self.names[open.group as usize - 1] = place;
                    }
                    self.built(json, |builder| builder.name(&name))?;
                }
                ("name", _) => return self.fail(json, "name: expected a string"),
                (_, value) => self.read_rule(json, key, &value)?,
            },
        }
        Ok(false)
    }

    fn read_rule(
        &mut self,
        json: &Json<'a>,
        key: &str,
        value: &JsonEvent<'a>,
    ) -> Result<(), Problem> {
        let rule = values::rule(key, value).or_else(|reason| self.fail(json, reason))?;
        let place = self.place(json);
        let Some(open) = self.open.last_mut() else { return Ok(()) };
        let subject = match rule {
            values::Rule::Up(need) => {
                open.rules.up = need;
                (need, Subject::Up(open.group))
            }
            values::Rule::Degraded(need) => {
                open.rules.degraded = need;
                (need, Subject::Degraded(open.group))
            }
            values::Rule::Hold(hold) => {
                open.rules.hold = hold;
                return Ok(());
            }
        };
        if let (Need::Count(_), subject) = subject {
            self.counts.push((subject, place));
        }
        Ok(())
    }

    /// Reads ids and ranges, and passes the ends of each to `each`.
    fn read_ranges(
        &mut self,
        json: &mut Json<'a>,
        field: &str,
        mut each: impl FnMut(&mut Self, &Json<'a>, (i64, i64)) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        if self.next(json)? != JsonEvent::StartArray {
            let reason = format!("{field}: expected an array such as [42, \"100-199\"]");
            return self.fail(json, reason);
        }
        loop {
            match self.next(json)? {
                JsonEvent::EndArray => return Ok(()),
                value => match values::range(&value) {
                    Ok(range) => each(self, json, range)?,
                    Err(reason) => return self.fail(json, format!("{field}: {reason}")),
                },
            }
        }
    }

    fn read_maintenance(&mut self, json: &mut Json<'a>) -> Result<(), Problem> {
        const EXPECTED: &str = "maintenance: expected an array of windows such as \
                                [{\"until\": \"2030-01-01T00:00:00Z\", \"objects\": [42]}]";
        if self.next(json)? != JsonEvent::StartArray {
            return self.fail(json, EXPECTED);
        }
        loop {
            match self.next(json)? {
                JsonEvent::EndArray => return Ok(()),
                JsonEvent::StartObject => self.read_window(json)?,
                _ => return self.fail(json, EXPECTED),
            }
        }
    }

    fn read_window(&mut self, json: &mut Json<'a>) -> Result<(), Problem> {
        let start = self.place(json);
        let (mut until, mut objects) = (None, None);
        while let JsonEvent::ObjectKey(key) = self.next(json)? {
            match &*key {
                "until" if until.is_none() => until = Some(self.read_time(json)?),
                "objects" if objects.is_none() => {
                    let mut ranges = Vec::new();
                    self.read_ranges(json, "maintenance", |parser, json, range| {
                        ranges.push((parser.place(json), Some(range)));
                        Ok(())
                    })?;
                    objects = Some(ranges);
                }
                _ => {
                    let key = quote(&key);
                    let reason = format!(
                        "maintenance: unknown or repeated field {key}; allowed are until, objects"
                    );
                    return self.fail(json, reason);
                }
            }
        }
        let Some(until) = until else { return self.fail(json, "maintenance: until is missing") };
        for (place, range) in objects.unwrap_or_else(|| vec![(start, None)]) {
            self.maintenance.push(place);
            self.built(json, |builder| builder.maintenance(until, range))?;
        }
        Ok(())
    }

    fn read_time(&mut self, json: &mut Json<'a>) -> Result<u64, Problem> {
        let value = self.next(json)?;
        let time = match &value {
            JsonEvent::String(text) => DateTime::parse_from_rfc3339(text).ok(),
            _ => None,
        };
        let micros = time.and_then(|time| u64::try_from(time.timestamp_micros()).ok());
        micros.map_or_else(
            || {
                let value = values::shown(&value);
                self.fail(
                    json,
                    format!(
                        "maintenance: expected a time such as 2030-01-01T00:00:00Z, not {value}"
                    ),
                )
            },
            Ok,
        )
    }

    fn next(&self, json: &mut Json<'a>) -> Result<JsonEvent<'a>, Problem> {
        json.next().or_else(|reason| self.fail(json, reason))
    }

    /// Calls the builder. What it rejects is at the current place.
    fn built(
        &mut self,
        json: &Json<'a>,
        call: impl FnOnce(&mut Builder) -> Result<(), BuildError>,
    ) -> Result<(), Problem> {
        call(&mut self.builder).or_else(|error| self.fail(json, error.reason))
    }

    fn place(&self, json: &Json<'a>) -> Place {
        (last_index(self.documents.len()), u32::try_from(json.token_start()).unwrap_or(u32::MAX))
    }

    fn fail<T>(&self, json: &Json<'a>, reason: impl Into<String>) -> Result<T, Problem> {
        let path = self.builder.open_path();
        Err(Problem { place: self.place(json), path, reason: reason.into() })
    }

    fn located_build_error(&self, error: BuildError) -> DefinitionError {
        let BuildError { path, reason, subject } = error;
        let place = match subject {
            Subject::LastCall => None,
            Subject::Name(group) => self.names.get(group as usize - 1),
            Subject::Maintenance(number) => self.maintenance.get(number),
            Subject::Up(_) | Subject::Degraded(_) => {
                self.counts.iter().find(|(counted, _)| *counted == subject).map(|(_, place)| place)
            }
        };
        let place = place.copied().unwrap_or_default();
        self.located(Problem { place, path, reason })
    }

    fn located(&self, problem: Problem) -> DefinitionError {
        let Problem { place: (document, offset), path, reason } = problem;
        let (file, content) = self.documents.get(document as usize).copied().unwrap_or_default();
        let (line, column) = json::line_and_column(content, offset as usize);
        DefinitionError { file: file.to_owned(), line, column, path, reason }
    }
}

fn last_index(length: usize) -> u32 {
    u32::try_from(length.saturating_sub(1)).unwrap_or(u32::MAX)
}
