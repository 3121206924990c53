//! `.env`: what it sets, and what is wrong with it, in words that repeat no secret. Knows the settings' names, not their rules.

use std::collections::HashMap;
use std::io::{ErrorKind, Read};

use super::SETTINGS;
use crate::error::StartError;

/// What `./.env` sets; nothing where there is none. Errs with one line that names the line at fault.
pub(super) fn read() -> Result<HashMap<String, String>, StartError> {
    let file = match std::fs::read_to_string(".env") {
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        read => read.map_err(|e| StartError::usage(format!(".env cannot be read: {e}")))?,
    };
    let mut known: Vec<String> = Vec::new();
    let (mut entry, mut place) = (String::new(), String::new());
    for (line, at) in file.lines().zip(1..) {
        let setting = setting_in(line);
        if entry.is_empty() {
            place = setting.map_or(format!(" line {at}"), |setting| format!(" line {at} ({setting})"));
        }
        entry.push_str(line);
        entry.push('\n');
        match dotenvy::from_read_iter(entry.as_bytes()).next() {
            None => {}
            // dotenvy takes what follows a quote that is open for a part of the value, also where that quote is in a comment.
            // Values that are not for us may have several lines, but nothing of ours may get lost in them.
            Some(Err(_)) if setting.is_some() => return Err(bad(&place, FORM)),
            Some(Err(_)) => continue,
            Some(Ok((name, _))) => {
                let is_set =
                    |name: &&str| known.iter().any(|known| known == name) || !name.is_empty() && std::env::var(name).is_ok();
                if variables(&entry).iter().all(is_set) {
                    known.push(name);
                } else if setting_of(&name).is_some() {
                    // Nothing would be put in its place, and half a secret is one that others may guess.
                    return Err(bad(&place, UNSET));
                } else {
                    // Half a value, too, where one of ours names it.
                    known.retain(|known| *known != name);
                }
            }
        }
        entry.clear();
    }
    let all: Result<HashMap<_, _>, _> = dotenvy::from_read_iter(file.as_bytes().chain(&b"\n"[..])).collect();
    all.ok().filter(|_| entry.is_empty()).ok_or_else(|| bad(&place, FORM))
}

fn bad(place: &str, rule: &str) -> StartError {
    StartError::usage(format!(".env:{place}: {rule}"))
}

fn setting_of(name: &str) -> Option<&'static str> {
    SETTINGS.iter().find(|setting| setting.0 == name).map(|setting| setting.0)
}

/// Which of our settings a line is to set.
fn setting_in(line: &str) -> Option<&'static str> {
    let (before, _) = line.split_once('=')?;
    match before.split_whitespace().collect::<Vec<_>>()[..] {
        [name] | ["export", name] => setting_of(name),
        _ => None,
    }
}

const FORM: &str = "cannot be read; a line is NAME=VALUE with all its quotes closed, those of a comment, too; a value with blanks, \
                    #, $, \\ or \" stands in single quotes, one with an apostrophe or a \\ at its end in double quotes, with a \\ \
                    before each $, \" and \\";

const UNSET: &str = "it names a variable that is not set, or one without braces (${NAME}) before a _, a blank, a \\ or a quote; a $ \
                     of its own stands in single quotes, or in double quotes behind a \\";

/// The names behind each `$` in an entry that another value takes the place of: not in single quotes, behind a backslash or
/// in a comment.
fn variables(entry: &str) -> Vec<&str> {
    let entry = entry.trim_end();
    let (mut single, mut double, mut before) = (false, false, '\0');
    let mut names = Vec::new();
    for (at, c) in entry.char_indices() {
        let is_escaped = before == '\\' && !single;
        match c {
            _ if is_escaped => {}
            '\'' if !double => single = !single,
            '"' if !single => double = !double,
            '#' if before.is_whitespace() && !single && !double => break,
            '$' if !single => {
                let rest = &entry[at + 1..];
                names.push(match rest.strip_prefix('{') {
                    Some(rest) => rest.split('}').next().unwrap_or_default(),
                    None => {
                        let (name, rest) = rest.split_at(rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len()));
                        // To dotenvy a name without braces ends there, and what follows means only itself; nobody means that.
                        if rest.starts_with(['_', '\\', '\'', '"', ' ', '\t']) { "" } else { name }
                    }
                });
            }
            _ => {}
        }
        before = if is_escaped { '\0' } else { c };
    }
    names
}
