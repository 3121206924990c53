//! A question as a client may ask it, and the question/answer pair as it is kept. Text to types and
//! back; no clock, no network, no disk.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{ApiError, Code};
use crate::json::each_field;

const FIELDS: [&str; 5] = ["question", "model", "system", "temperature", "max_tokens"];

const TEMPERATURE: &str = "a number from 0 to 2";
const MAX_TOKENS: &str = "a whole number from 1 to 2147483647";

/// The body of `POST /api/ask` and `POST /api/streaming`, checked.
#[derive(Debug, Default, PartialEq)]
pub struct Question {
    pub question: String,
    pub model: Option<String>,
    pub system: Option<String>,
    pub temperature: Option<f64>,
    pub max_tokens: Option<u64>,
}

impl Question {
    /// Reads a JSON object of at most `max_chars` characters of question. Errs with `invalid_json` for
    /// what is not UTF-8 JSON, else with `invalid_request` naming the field.
    pub fn parse(body: &[u8], max_chars: usize) -> Result<Question, ApiError> {
        let mut fields = [None; FIELDS.len()];
        let mut unknown: Option<String> = None;
        each_field(body, |name, value| match FIELDS.iter().position(|field| *field == name) {
            Some(place) => fields[place] = Some(value),
            None => drop(unknown.get_or_insert_with(|| name.chars().take(64).collect())),
        })
        .map_err(|e| no_object(body, e))?;
        if let Some(unknown) = unknown {
            let text = format!("unknown field {unknown:?}; known are {}", FIELDS.join(", "));
            return Err(ApiError::invalid(&unknown, text));
        }
        let [question, model, system, temperature, max_tokens] = fields;
        let question: Option<String> = read(question, "question", "a string")?;
        let question = question.ok_or_else(|| ApiError::invalid("question", "question is missing"))?;
        if question.trim().is_empty() {
            return Err(ApiError::invalid("question", "question is blank"));
        }
        if is_longer(&question, max_chars) {
            return Err(ApiError::invalid(
                "question",
                format!("question is longer than {max_chars} characters (MAX_QUESTION_CHARS)"),
            ));
        }
        let model: Option<String> = read(model, "model", "a string")?;
        if model.as_ref().is_some_and(|model| model.trim().is_empty()) {
            return Err(ApiError::invalid("model", "model is blank"));
        }
        let temperature: Option<f64> = read(temperature, "temperature", TEMPERATURE)?;
        if temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature)) {
            return Err(ApiError::invalid("temperature", format!("temperature must be {TEMPERATURE}")));
        }
        // In JSON 64.0 is a whole number, too.
        let max_tokens: Option<f64> = read(max_tokens, "max_tokens", MAX_TOKENS)?;
        if max_tokens.is_some_and(|n| n.fract() != 0.0 || !(1.0..=f64::from(i32::MAX)).contains(&n)) {
            return Err(ApiError::invalid("max_tokens", format!("max_tokens must be {MAX_TOKENS}")));
        }
        let system = read(system, "system", "a string")?;
        Ok(Question { question, model, system, temperature, max_tokens: max_tokens.map(|n| n as u64) })
    }
}

/// A text has more than so many characters. Bytes bound them from above, so most texts need no count.
pub fn is_longer(text: &str, max_chars: usize) -> bool {
    text.len() > max_chars && text.chars().count() > max_chars
}

/// A field's value, `None` where it is not there or null. Errs with 422 saying what it must be, or with 400 where its text
/// is none.
pub fn read<'a, T: Deserialize<'a>>(json: Option<&'a RawValue>, name: &str, kind: &str) -> Result<Option<T>, ApiError> {
    let Some(json) = json else { return Ok(None) };
    let json = json.get();
    serde_json::from_str(json).map_err(|e| match e.is_data() || !json.starts_with('"') {
        // Also a number beyond every range: it is JSON.
        true => ApiError::invalid(name, format!("{name} must be {kind}")),
        false => ApiError::new(Code::INVALID_JSON, format!("the body is not JSON: {name}: {e} of its value")),
    })
}

/// Why the fields of a body cannot be read: it is not JSON, where `e` says so or what follows, or no object.
pub fn no_object(body: &[u8], e: serde_json::Error) -> ApiError {
    let not_json = if e.is_data() { serde_json::from_slice::<&RawValue>(body).err() } else { Some(e) };
    let Some(e) = not_json else { return ApiError::invalid("body", "the body must be a JSON object") };
    let cause = match std::str::from_utf8(body) {
        _ if body.is_empty() => "the body is empty; send a JSON object".to_string(),
        Err(e) => format!("the body is not UTF-8: {e}"),
        Ok(_) => format!("the body is not JSON: {e}"),
    };
    ApiError::new(Code::INVALID_JSON, cause)
}

/// Tokens as the LLM counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
}

/// One question with its answer; as JSON it has the shape of `/api/ask` and `/api/history`.
#[derive(Debug, Default, Serialize)]
pub struct Pair {
    /// Its row's; 0 before it has one.
    pub id: i64,
    /// Name of the client's key; empty where the pair was read, by that key.
    #[serde(skip)]
    pub key: Arc<str>,
    pub question: String,
    pub answer: String,
    /// The model that answered, in the upstream's words.
    pub model: String,
    /// The upstream's word, or `client_gone`, `upstream_error` or `shutting_down` for a stream cut short.
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    /// From the request's first byte to the answer's last.
    pub latency_ms: u64,
    /// RFC 3339, UTC, milliseconds.
    pub created_at: String,
}

/// Bytes of a text in JSON (RFC 8259, section 7), but for its quotes: six for some characters, two for others.
pub fn size_in_json(text: &str) -> usize {
    // Without branches, so that many bytes are looked at together: texts are long.
    let size = |byte| {
        let (escaped, control) = (matches!(byte, b'"' | b'\\'), byte < 0x20);
        let short = matches!(byte, b'\n' | b'\r' | b'\t' | 0x08 | 0x0c);
        1 + usize::from(escaped) + 5 * usize::from(control) - 4 * usize::from(short)
    };
    text.bytes().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_in_json_is_that_of_the_json() {
        let text: String = (0..=0x250).filter_map(char::from_u32).collect();
        assert_eq!(size_in_json(&text), serde_json::to_string(&text).expect("JSON").len() - 2);
    }

    fn refused(body: &str) -> (&'static str, Option<String>) {
        match Question::parse(body.as_bytes(), 10) {
            Ok(asked) => panic!("accepted: {asked:?}"),
            Err(e) => (e.code.name(), e.param.map(String::from)),
        }
    }

    #[test]
    fn only_the_question_is_required() {
        let asked = Question::parse(br#"{"question":"\u0000 hi","model":null}"#, 10).expect("accepted");
        assert_eq!(asked.question, "\0 hi");
        assert_eq!(asked.model, None);
        let asked = Question::parse(br#"{"question":"a","max_tokens":64.0}"#, 10).expect("accepted");
        assert_eq!(asked.max_tokens, Some(64));
    }

    #[test]
    fn of_several_mistakes_an_unknown_field_is_named_before_a_wrong_one() {
        for (body, param) in [
            (r#"{"question":1,"z":0,"a":[[0]]}"#, "z"),
            (r#"{"temperature":3,"question":1}"#, "question"),
            (r#"{"question":1,"question":"a","model":0,"model":null,"zz":0}"#, "zz"),
        ] {
            assert_eq!(refused(body), ("invalid_request", Some(param.to_string())), "{body}");
        }
    }
}
