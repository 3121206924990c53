//! A question as a client may ask it, and the question/answer pair as it is kept. Text to types and
//! back; no clock, no network, no disk.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{ApiError, Code};

const FIELDS: [&str; 5] = ["question", "model", "system", "temperature", "max_tokens"];

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
        let Value::Object(fields) = parse_json(body)? else {
            return Err(ApiError::invalid("body", "the body must be a JSON object"));
        };
        let (mut asked, mut question) = (Question::default(), None);
        let must = |name: &str, be: &str| ApiError::invalid(name, format!("{name} must be {be}"));
        for (name, value) in fields {
            match (name.as_str(), value) {
                ("question", Value::String(text)) => question = Some(text),
                ("question", _) => return Err(must("question", "a string")),
                ("model" | "system" | "temperature" | "max_tokens", Value::Null) => {}
                ("model", Value::String(text)) if !text.trim().is_empty() => asked.model = Some(text),
                ("model", _) => return Err(must("model", "a string that is not blank")),
                ("system", Value::String(text)) => asked.system = Some(text),
                ("system", _) => return Err(must("system", "a string")),
                ("temperature", value) => {
                    let temperature = value.as_f64().filter(|t| (0.0..=2.0).contains(t));
                    asked.temperature = Some(temperature.ok_or_else(|| must("temperature", "a number from 0 to 2"))?);
                }
                ("max_tokens", value) => {
                    // In JSON 64.0 is a whole number, too.
                    let whole = |n: f64| (n.fract() == 0.0 && n >= 0.0).then_some(n as u64);
                    let tokens = value.as_u64().or_else(|| value.as_f64().and_then(whole));
                    let tokens = tokens.filter(|n| (1..=i32::MAX as u64).contains(n));
                    asked.max_tokens = Some(tokens.ok_or_else(|| must("max_tokens", "a whole number from 1 to 2147483647"))?);
                }
                (unknown, _) => {
                    let shown: String = unknown.chars().take(64).collect();
                    let text = format!("unknown field {shown:?}; known are {}", FIELDS.join(", "));
                    return Err(ApiError::invalid(&shown, text));
                }
            }
        }
        asked.question = question.ok_or_else(|| ApiError::invalid("question", "question is missing"))?;
        if asked.question.trim().is_empty() {
            return Err(ApiError::invalid("question", "question is blank"));
        }
        if is_longer(&asked.question, max_chars) {
            return Err(ApiError::invalid("question", format!("question is longer than {max_chars} characters")));
        }
        Ok(asked)
    }
}

/// A text has more than so many characters. Bytes bound them from above, so most texts need no count.
pub fn is_longer(text: &str, max_chars: usize) -> bool {
    text.len() > max_chars && text.chars().count() > max_chars
}

/// The body as JSON, in so far as a question can use it: an object has the fields of one and the first
/// other name, and lists and objects in it are empty. Errs with `invalid_json`, which says where reading
/// stopped.
pub fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = Outline { fields: true }.deserialize(&mut json).and_then(|value| json.end().map(|()| value));
    value.map_err(|e| {
        let cause = match std::str::from_utf8(body) {
            _ if body.is_empty() => "the body is empty; send a JSON object".to_string(),
            Err(e) => format!("the body is not UTF-8: {e}"),
            Ok(_) => format!("the body is not JSON: {e}"),
        };
        ApiError::new(Code::INVALID_JSON, cause)
    })
}

/// Reads all of a value as `Value` does, and keeps what is of no use out of the memory, where it would take
/// fifty times its bytes.
struct Outline {
    /// An object's fields are wanted.
    fields: bool,
}

impl<'de> DeserializeSeed<'de> for Outline {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Outline {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        while list.next_element_seed(Outline { fields: false })?.is_some() {}
        Ok(Value::Array(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        if !self.fields {
            while map.next_key::<IgnoredAny>()?.is_some() {
                map.next_value_seed(Outline { fields: false })?;
            }
            return Ok(fields.into());
        }
        let mut unknown: Option<String> = None;
        while let Some(name) = map.next_key::<String>()? {
            let value = map.next_value_seed(Outline { fields: false })?;
            if FIELDS.contains(&&*name) {
                fields.insert(name, value);
            } else if unknown.as_ref().is_none_or(|first| name < *first) {
                unknown = Some(name);
            }
        }
        fields.extend(unknown.map(|name| (name, Value::Null)));
        Ok(fields.into())
    }
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
    fn of_several_mistakes_the_first_by_name_is_named() {
        for (body, param) in [
            (r#"{"z":0,"b":0,"question":1,"a":[[0]]}"#, "a"),
            (r#"{"z":0,"question":1,"temperature":3}"#, "question"),
            (r#"{"system":{"a":0},"r":0,"question":"a","s":0}"#, "r"),
            (r#"{"question":1,"question":"a","model":0,"model":null,"zz":0}"#, "zz"),
        ] {
            assert_eq!(refused(body), ("invalid_request", Some(param.to_string())), "{body}");
        }
    }

    #[test]
    fn what_is_not_kept_is_held_to_the_same_rules() {
        let nested = |depth| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        for json in [
            r#"{"a":"\ud800"}"#,
            r#"{"a":["\ud800"]}"#,
            r#"{"\ud800":1}"#,
            r#"{"a":{"\ud800":1}}"#,
            r#"{"a":{1:1}}"#,
            r#"{"a":[1e999]}"#,
            r#"{"a":[01]}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1 2]}"#,
            r#"{"a":{"b":1,}}"#,
            r#"{"a":{"b"}}"#,
            "{\"a\":\"\n\"}",
            r#"{"a":[nul]}"#,
            r#"{"a":[null,true,-1,0.5,"x",{"y":[]}]}"#,
            r#"{} x"#,
            r#"[[0],{"a":0}]"#,
            r#""x""#,
            &nested(126),
            &nested(127),
            &nested(100_000),
        ] {
            let whole = serde_json::from_str::<Value>(json);
            let cause = whole.map(|_| ()).map_err(|e| format!("the body is not JSON: {e}"));
            assert_eq!(parse_json(json.as_bytes()).map(|_| ()).map_err(|e| e.message), cause, "{json:.100}");
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
            assert_eq!(e.code, Code::INVALID_JSON);
        }
    }
}
