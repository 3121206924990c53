//! A question as a client may ask it, and the question/answer pair as it is kept. Text to types and
//! back; no clock, no network, no disk.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::error::{ApiError, Code};

/// The body of `POST /api/ask` and `POST /api/streaming`, checked.
#[derive(Debug, PartialEq)]
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
        let Value::Object(fields) = parse_json(body)? else {
            return Err(ApiError::invalid("body", "the body must be a JSON object"));
        };
        let mut asked = Question { question: String::new(), model: None, system: None, temperature: None, max_tokens: None };
        let mut has_question = false;
        for (name, value) in fields {
            match (name.as_str(), value) {
                ("question", Value::String(text)) => {
                    has_question = true;
                    asked.question = text;
                }
                ("question", _) => return Err(ApiError::invalid("question", "question must be a string")),
                ("model" | "system" | "temperature" | "max_tokens", Value::Null) => {}
                ("model", Value::String(text)) if !text.trim().is_empty() => asked.model = Some(text),
                ("model", _) => return Err(ApiError::invalid("model", "model must be a string that is not blank")),
                ("system", Value::String(text)) => asked.system = Some(text),
                ("system", _) => return Err(ApiError::invalid("system", "system must be a string")),
                ("temperature", value) => {
                    let temperature = value.as_f64().filter(|t| (0.0..=2.0).contains(t));
                    asked.temperature = Some(
                        temperature
                            .ok_or_else(|| ApiError::invalid("temperature", "temperature must be a number from 0 to 2"))?,
                    );
                }
                ("max_tokens", value) => {
                    // In JSON 64.0 is a whole number, too.
                    let whole = |n: f64| (n.fract() == 0.0 && n >= 0.0).then_some(n as u64);
                    let tokens =
                        value.as_u64().or_else(|| value.as_f64().and_then(whole)).filter(|n| (1..=i32::MAX as u64).contains(n));
                    asked.max_tokens = Some(tokens.ok_or_else(|| {
                        ApiError::invalid("max_tokens", "max_tokens must be a whole number from 1 to 2147483647")
                    })?);
                }
                (unknown, _) => {
                    let shown: String = unknown.chars().take(64).collect();
                    return Err(ApiError::invalid(
                        &shown,
                        format!("unknown field {shown:?}; known are question, model, system, temperature, max_tokens"),
                    ));
                }
            }
        }
        if !has_question {
            return Err(ApiError::invalid("question", "question is missing"));
        }
        if asked.question.trim().is_empty() {
            return Err(ApiError::invalid("question", "question is blank"));
        }
        // Bytes bound characters from above, so most questions need no count.
        if asked.question.len() > max_chars && asked.question.chars().count() > max_chars {
            return Err(ApiError::invalid("question", format!("question is longer than {max_chars} characters")));
        }
        Ok(asked)
    }
}

/// The body as JSON; errs with `invalid_json`, which says where reading stopped.
pub fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|e| {
        let cause = match std::str::from_utf8(body) {
            _ if body.is_empty() => "the body is empty; send a JSON object".to_string(),
            Err(e) => format!("the body is not UTF-8: {e}"),
            Ok(_) => format!("the body is not JSON: {e}"),
        };
        ApiError::new(Code::InvalidJson, cause)
    })
}

/// Tokens as the LLM counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
}

/// One question with its answer, ready to be stored.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Name of the client's key.
    pub key: Arc<str>,
    pub question: String,
    pub answer: String,
    /// The model that answered, in the upstream's words.
    pub model: String,
    /// The upstream's word, or `client_gone` or `upstream_error` for a stream cut short.
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    /// From the request's first byte to the answer's last.
    pub latency_ms: u64,
    /// RFC 3339, UTC, milliseconds.
    pub created_at: String,
}

/// A stored pair, in the shape of `/api/ask` and `/api/history`.
#[derive(Debug, Serialize)]
pub struct Exchange {
    pub id: i64,
    pub question: String,
    pub answer: String,
    pub model: String,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    pub latency_ms: u64,
    pub created_at: String,
}

impl Exchange {
    /// The pair under the id that its row has.
    pub fn new(id: i64, pair: Pair) -> Exchange {
        Exchange {
            id,
            question: pair.question,
            answer: pair.answer,
            model: pair.model,
            finish_reason: pair.finish_reason,
            usage: pair.usage,
            latency_ms: pair.latency_ms,
            created_at: pair.created_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> (&'static str, Option<String>) {
        match Question::parse(body.as_bytes(), 10) {
            Ok(asked) => panic!("accepted: {asked:?}"),
            Err(e) => (e.code.name(), e.param),
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
    fn every_bad_field_is_named() {
        for (body, param) in [
            (r#"[]"#, "body"),
            (r#"{}"#, "question"),
            (r#"{"question":" \n"}"#, "question"),
            (r#"{"question":1}"#, "question"),
            (r#"{"question":"12345678901"}"#, "question"),
            (r#"{"question":"a","model":" "}"#, "model"),
            (r#"{"question":"a","system":[]}"#, "system"),
            (r#"{"question":"a","temperature":2.1}"#, "temperature"),
            (r#"{"question":"a","temperature":"1"}"#, "temperature"),
            (r#"{"question":"a","max_tokens":0}"#, "max_tokens"),
            (r#"{"question":"a","max_tokens":1.5}"#, "max_tokens"),
            (r#"{"question":"a","modle":"x"}"#, "modle"),
        ] {
            assert_eq!(refused(body), ("invalid_request", Some(param.to_string())), "{body}");
        }
    }

    #[test]
    fn characters_are_counted_not_bytes() {
        assert!(Question::parse(r#"{"question":"вопросвопр"}"#.as_bytes(), 10).is_ok());
    }

    #[test]
    fn what_is_not_json_says_so() {
        for body in [&b""[..], b"{", b"\xff", br#"{"question":"\ud800"}"#] {
            let e = Question::parse(body, 10).expect_err("refused");
            assert_eq!(e.code, Code::InvalidJson);
        }
    }
}
