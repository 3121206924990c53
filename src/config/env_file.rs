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
    for (line, at) in file.lines().zip(1..) {
        let bad = |rule: &str| StartError::usage(format!(".env: line {at}{}: {rule}", setting_in(line)));
        // Each for itself: dotenvy takes what follows a quote that is open for a part of the value, also where that quote is in
        // a comment, and so loses settings without a word.
        let mut alone = dotenvy::from_read_iter(line.as_bytes().chain(&b"\n"[..]));
        let Some(set) = alone.next() else { continue };
        let (name, _) = set.map_err(|_| bad(FORM))?;
        let is_set = |name: &&str| known.iter().any(|known| known == name) || !name.is_empty() && std::env::var(name).is_ok();
        if variables(line).iter().all(is_set) {
            known.push(name);
        } else if SETTINGS.iter().any(|setting| setting.0 == name) {
            // Nothing would be put in its place, and half a secret is one that others may guess.
            return Err(bad(UNSET));
        } else {
            // Half a value, too, where one of ours names it.
            known.retain(|known| *known != name);
        }
    }
    let all: Result<HashMap<_, _>, _> = dotenvy::from_read_iter(file.as_bytes()).collect();
    all.map_err(|_| StartError::usage(format!(".env: {FORM}")))
}

const FORM: &str = "cannot be read; a line is NAME=VALUE with all its quotes closed, those of a comment, too; a value with blanks, \
                    #, $, \\ or \" stands in single quotes, one with an apostrophe or a \\ at its end in double quotes, with a \\ \
                    before each $, \" and \\";

const UNSET: &str = "it names a variable that is not set, or one without braces (${NAME}) before a _, a blank, a \\ or a quote; a $ \
                     of its own stands in single quotes, or in double quotes behind a \\";

/// Which of our settings a line sets, in brackets; nothing where it is none.
fn setting_in(line: &str) -> String {
    let name = line.split('=').next().and_then(|before| before.split_whitespace().last());
    let setting = SETTINGS.iter().find(|setting| Some(setting.0) == name);
    setting.map_or(String::new(), |setting| format!(" ({})", setting.0))
}

/// The names behind each `$` in a line that another value takes the place of: not in single quotes, behind a backslash or in a
/// comment.
fn variables(line: &str) -> Vec<&str> {
    let (mut single, mut double, mut before) = (false, false, '\0');
    let mut names = Vec::new();
    for (at, c) in line.char_indices() {
        let is_escaped = before == '\\' && !single;
        match c {
            _ if is_escaped => {}
            '\'' if !double => single = !single,
            '"' if !single => double = !double,
            '#' if before.is_whitespace() && !single && !double => break,
            '$' if !single => {
                let rest = &line[at + 1..];
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
