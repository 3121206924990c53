//! `.env`: what it sets, and what is wrong with it, in words that repeat no secret. Knows the settings' names, not their rules.

use std::collections::HashMap;
use std::io::ErrorKind;

use super::SETTINGS;
use crate::error::StartError;

/// What `./.env` sets; nothing where there is none. Errs with one line that names the line at fault.
pub(super) fn read() -> Result<HashMap<String, String>, StartError> {
    let file = match std::fs::read_to_string(".env") {
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        read => read.map_err(|e| StartError::usage(format!(".env cannot be read: {e}")))?,
    };
    no_unset_variable(&file)?;
    let lines: Result<HashMap<_, _>, _> = dotenvy::from_read_iter(file.as_bytes()).collect();
    lines.map_err(|e| StartError::usage(trouble(&e, &file)))
}

/// Which of our settings a line of `.env` sets.
fn setting_in(line: &str) -> Option<&'static str> {
    let name = name_in(line);
    SETTINGS.iter().find(|setting| Some(setting.0) == name).map(|setting| setting.0)
}

fn name_in(line: &str) -> Option<&str> {
    line.split_once('=').map(|(name, _)| name.trim().trim_start_matches("export ").trim())
}

/// Errs where one of our settings in `.env` names a variable that is not set, or whose name is read in part: nothing would be
/// put in its place, and half a secret is one that others may guess.
fn no_unset_variable(text: &str) -> Result<(), StartError> {
    let mut known: Vec<&str> = Vec::new();
    for (line, at) in text.lines().zip(1..) {
        let is_set = |name: &&str| known.contains(name) || !name.is_empty() && std::env::var_os(name).is_some();
        match (variables(line).iter().all(is_set), setting_in(line)) {
            (true, _) => known.extend(name_in(line)),
            (false, Some(setting)) => {
                let rule = "it names a variable that is not set, or one with a _ in its name without braces (${A_NAME}); a $ of \
                            its own stands in single quotes, or in double quotes behind a \\";
                return Err(StartError::usage(format!(".env: line {at} ({setting}): {rule}")));
            }
            // Half a value, too, where one of ours names it.
            (false, None) => {}
        }
    }
    Ok(())
}

/// The names behind each `$` in a line of `.env` that another value takes the place of: not in single quotes, behind a
/// backslash or in a comment.
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
                        // To dotenvy a name without braces ends there; nobody means that.
                        if rest.starts_with('_') { "" } else { name }
                    }
                });
            }
            _ => {}
        }
        before = if is_escaped { '\0' } else { c };
    }
    names
}

/// What is wrong with `.env`, whose text this is, without repeating any of it, since secrets stand there.
fn trouble(e: &dotenvy::Error, text: &str) -> String {
    let dotenvy::Error::LineParse(line, _) = e else { return ".env cannot be read; each line is NAME=VALUE".to_string() };
    let end = line.lines().next().unwrap_or_default();
    // Of a line with a name there is only the value.
    let found = text.lines().zip(1..).find(|(line, _)| !end.is_empty() && line.trim_end().ends_with(end));
    let which = found
        .map_or(String::new(), |(line, at)| setting_in(line).map_or(format!(" {at}"), |setting| format!(" {at} ({setting})")));
    format!(
        ".env: line{which} cannot be read; a line is NAME=VALUE, and a value with blanks, #, $, \\ or \" stands in single quotes, \
         one with an apostrophe in double quotes, with a \\ before each $, \" and \\"
    )
}
