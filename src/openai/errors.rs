//! Errors as upstreams tell them, with a status or in the midst of an answer: their words for people, and whether they may
//! go by.

use serde_json::Value;
use serde_json::value::RawValue;

use crate::config::MAX_ANSWER;

/// An error of more bytes is not read but as text.
const LARGE_ERROR: usize = 64 * 1024;

/// What a stream did in which an error came.
pub(super) const BROKEN_OFF: &str = "its stream broke off with an error";

/// Why what came is no answer.
#[derive(Debug, PartialEq)]
pub struct NoAnswer {
    /// For people.
    pub why: String,
    /// What it says itself, or what is wrong with that; empty where there is nothing more to say.
    pub words: String,
    /// An error that may not be there the next time, or with another model, by its code or type.
    pub passing: bool,
    /// An error that is the request's, by its code: it would be there again.
    pub refused: bool,
}

impl From<String> for NoAnswer {
    fn from(why: String) -> NoAnswer {
        NoAnswer { why, words: String::new(), passing: false, refused: false }
    }
}

impl NoAnswer {
    /// Something else than was asked for; `words` say what is wrong with it.
    pub(super) fn other(why: &str, words: String) -> NoAnswer {
        NoAnswer { words, ..why.to_string().into() }
    }

    /// Holds more than an answer may.
    pub fn too_large() -> NoAnswer {
        format!("its answer is larger than {MAX_ANSWER} bytes").into()
    }

    /// An event of a stream that is an error by its name; its data may be what the body of an error answer may be.
    // Not inlined: each stream waits with every page of stack that was used.
    #[inline(never)]
    pub fn event(data: &[u8]) -> NoAnswer {
        NoAnswer::by(BROKEN_OFF, bare(&readable(data)))
    }

    pub(super) fn error(what: &str, error: &[u8]) -> NoAnswer {
        NoAnswer::by(what, &readable(error))
    }

    fn by(what: &str, error: &Value) -> NoAnswer {
        let refused = code_of(error).is_some_and(|code| (400..=499).contains(&code) && !matches!(code, 408 | 409 | 429));
        NoAnswer { why: what.to_string(), words: error_words(error), passing: may_pass(error), refused }
    }
}

/// What other servers than OpenRouter say of an error that may not be there the next time.
const PASSING: [&str; 4] = ["server_error", "rate_limit_exceeded", "rate_limit_error", "overloaded_error"];

fn code_of(error: &Value) -> Option<u64> {
    let code = &error["code"];
    code.as_u64().or_else(|| code.as_str()?.parse().ok())
}

fn may_pass(error: &Value) -> bool {
    match code_of(error) {
        Some(code) => matches!(code, 404 | 408 | 429 | 500..=599),
        None => [&error["code"], &error["type"]].iter().any(|word| word.as_str().is_some_and(|word| PASSING.contains(&word))),
    }
}

/// Whether an `error` field says that there is one: some servers send it always.
fn is_error(error: &RawValue) -> bool {
    let text = error.get();
    let is_empty = |open: char, close: char| {
        let inner = text.strip_prefix(open).and_then(|text| text.strip_suffix(close));
        inner.is_some_and(|inner| inner.trim_ascii().is_empty())
    };
    !(matches!(text, "null" | "false") || is_empty('"', '"') || is_empty('{', '}') || is_empty('[', ']'))
}

/// Errs where an `error` field says that there is one; `what` its answer did.
pub(super) fn no_error(what: &str, error: Option<&RawValue>) -> Result<(), NoAnswer> {
    error.filter(|error| is_error(error)).map_or(Ok(()), |error| Err(NoAnswer::error(what, error.get().as_bytes())))
}

/// What the body of an error answer says: the words for people, of any length, which are the message of an `error` in any of
/// the usual shapes, or whatever text it is; and the field of the request that it blames.
pub fn error_told(body: &[u8]) -> (String, Option<String>) {
    let value = readable(body);
    let error = bare(&value);
    (error_words(error), error_param(error))
}

/// The error in the body of an error answer, where it has a frame without that.
fn bare(value: &Value) -> &Value {
    // Google's come in a list of one.
    let value = value.get(0).unwrap_or(value);
    value.get("error").filter(|error| !error.is_null() && **error != "").unwrap_or(value)
}

fn error_param(error: &Value) -> Option<String> {
    let param = error["param"].as_str()?;
    ((1..=200).contains(&param.len()) && !param.contains(char::is_control)).then(|| param.to_string())
}

/// An error as it is, or where it is no JSON, large, or too deep to be read its text, as far as anybody reads that.
fn readable(error: &[u8]) -> Value {
    let error = &error[..error.len().min(LARGE_ERROR)];
    serde_json::from_slice(error).unwrap_or_else(|_| String::from_utf8_lossy(error).trim().into())
}

/// What people read of an error, and of the error behind it where a router tells that of another server
/// (<https://openrouter.ai/docs/api/reference/errors-and-debugging>).
fn error_words(error: &Value) -> String {
    let metadata = &error["metadata"];
    let behind = match &metadata["raw"] {
        Value::Null => None,
        Value::String(raw) => Some(error_told(raw.as_bytes()).0),
        raw => Some(words(bare(raw))),
    };
    let provider = metadata["provider_name"].as_str().filter(|_| behind.is_some()).map(one_line);
    let reasons = metadata["reasons"].as_array().map(|reasons| one_line(&Value::from(reasons.as_slice()).to_string()));
    let all = [Some(words(error)), provider, behind, reasons].into_iter().flatten().filter(|words| !words.is_empty());
    all.collect::<Vec<_>>().join(": ")
}

/// What people read of it alone; its code, where that is a word, by which programs tell it from others, or the type where
/// the code is but a number.
fn words(error: &Value) -> String {
    let text = ["message", "detail", "msg"].iter().find_map(|name| error.get(name)?.as_str());
    match text.or(error.as_str()) {
        Some(text) => {
            let word = if error["code"].is_number() { &error["type"] } else { &error["code"] };
            let says_more = |word: &&str| word.contains(|c: char| !c.is_ascii_digit()) && !text.contains(word);
            match word.as_str().filter(says_more) {
                Some(word) => one_line(&format!("{text} ({word})")),
                None => one_line(text),
            }
        }
        None => one_line(&error.to_string()),
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::parse_completion;

    #[test]
    fn of_a_large_or_deep_error_the_beginning_is_kept() {
        let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
        for error in [format!(r#"{{"message":"Overfull","a":[{}0]}}"#, "[0],".repeat(LARGE_ERROR)), deep] {
            let e = parse_completion(format!(r#"{{"error":{error}}}"#).as_bytes()).expect_err("an error");
            assert!(e.words.contains(&error[..20]) && e.words.len() < 2 * LARGE_ERROR, "{:.100}", e.words);
        }
    }

    #[test]
    fn errors_are_found_in_every_usual_shape() {
        for (body, param) in [
            (&br#"{"error":{"message":"a","param":"p"}}"#[..], Some("p")),
            (br#"[{"error":{"param":"p"}}]"#, Some("p")),
            (br#"{"object":"error","message":"a","param":"p"}"#, Some("p")),
            (br#"{"error":{"param":"p\nq"}}"#, None),
            (br#"{"error":{"param":["p"]}}"#, None),
            (br#"{"error":"a"}"#, None),
            (b"a", None),
        ] {
            assert_eq!(error_told(body).1.as_deref(), param);
        }
        for (body, text) in [
            (&br#"{"error":{"message":"a","code":"x"}}"#[..], "a (x)"),
            (br#"{"error":{"message":"too long: x","code":"x"}}"#, "too long: x"),
            (br#"{"error":{"message":"a","code":"400","type":"t"}}"#, "a"),
            (br#"{"error":{"message":"a","code":400,"type":"exceed_context_size_error"}}"#, "a (exceed_context_size_error)"),
            (br#"{"error":"b"}"#, "b"),
            (br#"[{"error":{"message":"l"}}]"#, "l"),
            (br#"{"detail":"c"}"#, "c"),
            (br#"{"msg":"d"}"#, "d"),
            (b"bad gateway\n", "bad gateway"),
            (br#"{"error":{"code":7}}"#, r#"{"code":7}"#),
            (br#"{"error":{"message":"a","code":400,"metadata":{"raw":"{\"error\":{\"message\":\"b\"}}","provider_name":"P"}}}"#, "a: P: b"),
            (br#"{"error":{"message":"a","metadata":{"raw":{"detail":"b"}}}}"#, "a: b"),
            (br#"{"error":{"message":"a","metadata":{"raw":"b\nc","provider_name":"P"}}}"#, "a: P: b c"),
            (br#"{"error":{"message":"a","metadata":{"raw":"","provider_name":"P","reasons":["b"]}}}"#, "a: P: [\"b\"]"),
        ] {
            assert_eq!(error_told(body).0, text);
        }
    }
}
