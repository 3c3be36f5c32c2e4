//! Names and paths of groups, and how errors quote them.

pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 100 && name.chars().nth(100).is_some() {
        return Err("expected 1 to 100 characters");
    }
    if name == "." || name == ".." || name.contains(|one: char| one == '/' || one.is_control()) {
        return Err("expected a name without / and control characters, and other than . and ..");
    }
    if name.starts_with(char::is_whitespace) || name.ends_with(char::is_whitespace) {
        return Err("expected a name without blanks at its start and end");
    }
    Ok(())
}

/// The path of a group. If it has more than six segments, without those in the middle.
pub(super) fn short_path<'a>(group: u32, parents: &[u32], name: impl Fn(u32) -> &'a str) -> String {
    let ancestors = std::iter::successors(Some(group), |&group| Some(parents[group as usize]));
    let groups: Vec<_> = ancestors.take_while(|&group| group > 0).collect();
    let omitted = 3..groups.len().saturating_sub(3);
    let segment = |(place, &group): (usize, &u32)| match name(group) {
        _ if omitted.len() > 1 && place == omitted.start => Some("…"),
        _ if omitted.len() > 1 && omitted.contains(&place) => None,
        "" => Some("(no name)"),
        name => Some(name),
    };
    let mut segments: Vec<_> = groups.iter().enumerate().filter_map(segment).collect();
    segments.reverse();
    segments.join("/")
}

/// The path as the start of an error.
pub(crate) fn prefix(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("{path}: ") }
}

/// Quotes a part of the input for an error: bounded, and on one line.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().nth(40).is_some() {
        quoted.push('…');
    }
    format!("\"{quoted}\"")
}
