//! The chat completions protocol: what goes to the upstream and what its answers mean
//! (<https://platform.openai.com/docs/api-reference/chat>), with OpenRouter's and other servers'
//! deviations. Pure: text in, types out.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::exchange::{Question, Usage};

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct ChatRequest<'a> {
    model: &'a str,
    messages: Vec<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The request body for a question: `model` and `system` are what a question that names none gets. A
/// streaming request asks for the usage chunk.
pub fn chat_request(asked: &Question, model: &str, system: Option<&str>, stream: bool) -> Vec<u8> {
    let system = asked.system.as_deref().or(system);
    let mut messages = Vec::with_capacity(2);
    messages.extend(system.map(|content| Message { role: "system", content }));
    messages.push(Message { role: "user", content: &asked.question });
    let request = ChatRequest {
        model: asked.model.as_deref().unwrap_or(model),
        messages,
        temperature: asked.temperature,
        max_tokens: asked.max_tokens,
        stream: stream.then_some(true),
        stream_options: stream.then_some(StreamOptions { include_usage: true }),
    };
    serde_json::to_vec(&request).unwrap_or_default()
}

/// What a whole answer says.
#[derive(Debug, PartialEq)]
pub struct Completion {
    pub answer: String,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
}

/// Reads the body of a 200. Errs with a text for people when it is no answer: not JSON, without
/// choices, or an `error` in place of one.
pub fn parse_completion(body: &[u8]) -> Result<Completion, String> {
    let answer: Answer = serde_json::from_slice(body).map_err(|e| format!("its answer is not a chat completion: {e}"))?;
    if let Some(error) = answer.error.filter(|e| !e.is_null()) {
        return Err(format!("it answered with an error: {}", error_words(&error)));
    }
    let choice = answer.choices.unwrap_or_default().into_iter().next().ok_or("its answer has no choices")?;
    let message = choice.message.ok_or("its answer's first choice has no message")?;
    Ok(Completion {
        answer: message.text(),
        model: answer.model.map(Cow::into_owned),
        finish_reason: choice.finish_reason.map(Cow::into_owned),
        usage: answer.usage.map(Usage::from),
    })
}

/// What one event of a stream says.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk {
    /// The piece of answer in it, often empty.
    pub delta: String,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    /// The chunk has no choice and brings only the usage.
    pub usage_only: bool,
}

/// Reads the data of one event that is not `[DONE]`. Errs with a text for people when it is an error
/// or no chunk.
pub fn parse_chunk(data: &[u8]) -> Result<Chunk, String> {
    let answer: Answer = serde_json::from_slice(data).map_err(|e| format!("an event of its stream is not a chunk: {e}"))?;
    if let Some(error) = answer.error.filter(|e| !e.is_null()) {
        return Err(format!("its stream broke off with an error: {}", error_words(&error)));
    }
    let usage = answer.usage.map(Usage::from);
    let mut chunk = Chunk { model: answer.model.map(Cow::into_owned), usage, ..Chunk::default() };
    let choices = answer.choices.unwrap_or_default();
    chunk.usage_only = choices.is_empty() && usage.is_some();
    // Further choices (`n` > 1) reach the client, and history keeps the first.
    for choice in choices.into_iter().filter(|choice| choice.index == 0) {
        if let Some(delta) = choice.delta {
            chunk.delta.push_str(&delta.text());
        }
        chunk.finish_reason = choice.finish_reason.map(Cow::into_owned).or(chunk.finish_reason);
    }
    Ok(chunk)
}

/// The words for people in the body of an error answer, at most 1,000 characters of them: the message
/// of an `error` in any of the usual shapes, or the start of whatever text it is.
pub fn error_text(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => error_words(value.get("error").filter(|e| !e.is_null()).unwrap_or(&value)),
        Err(_) => shorten(String::from_utf8_lossy(body).trim()),
    }
}

fn error_words(error: &Value) -> String {
    let text = ["message", "detail", "msg"].iter().find_map(|name| error.get(name)?.as_str());
    match text.or(error.as_str()) {
        Some(text) => shorten(text),
        None => shorten(&error.to_string()),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(1000).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(default)]
    usage: Option<Counts>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u64,
    #[serde(default)]
    message: Option<Words>,
    #[serde(default)]
    delta: Option<Words>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Words {
    #[serde(default)]
    content: Text,
    #[serde(default)]
    refusal: Text,
}

impl Words {
    fn text(self) -> String {
        if self.content.0.is_empty() { self.refusal.0 } else { self.content.0 }
    }
}

#[derive(Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: Option<u64>,
    #[serde(default)]
    completion_tokens: Option<u64>,
    #[serde(default)]
    total_tokens: Option<u64>,
}

impl From<Counts> for Usage {
    fn from(counts: Counts) -> Usage {
        let prompt_tokens = counts.prompt_tokens.unwrap_or(0);
        let completion_tokens = counts.completion_tokens.unwrap_or(0);
        let total_tokens = counts.total_tokens.unwrap_or(prompt_tokens.saturating_add(completion_tokens));
        Usage { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// Content: a string, null, or a list of parts whose texts count. Anything else is no text.
#[derive(Default)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
        deserializer.deserialize_any(TextVisitor).map(Text)
    }
}

struct TextVisitor;

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    text: Text,
}

impl<'de> Visitor<'de> for TextVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, null or a list of parts")
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_string())
    }

    fn visit_unit<E>(self) -> Result<String, E> {
        Ok(String::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<String, A::Error> {
        let mut text = String::new();
        while let Some(part) = parts.next_element::<Part>()? {
            text.push_str(&part.text.0);
        }
        Ok(text)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(String::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_carries_what_was_asked_and_the_defaults() {
        let asked = Question { question: "q".into(), model: None, system: None, temperature: Some(0.2), max_tokens: None };
        let body = String::from_utf8(chat_request(&asked, "m", Some("s"), true)).expect("UTF-8");
        assert_eq!(
            body,
            r#"{"model":"m","messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}],"temperature":0.2,"stream":true,"stream_options":{"include_usage":true}}"#
        );
    }

    #[test]
    fn a_completion_may_have_parts_a_refusal_or_nothing_to_say() {
        for (message, answer) in [
            (r#"{"content":"Paris"}"#, "Paris"),
            (r#"{"content":[{"type":"text","text":"Pa"},{"type":"text","text":"ris"}]}"#, "Paris"),
            (r#"{"content":null,"refusal":"No."}"#, "No."),
            (r#"{"content":null,"tool_calls":[]}"#, ""),
        ] {
            let body = format!(r#"{{"choices":[{{"message":{message},"finish_reason":"stop"}}],"error":null}}"#);
            assert_eq!(parse_completion(body.as_bytes()).expect("an answer").answer, answer);
        }
    }

    #[test]
    fn what_is_no_answer_says_why() {
        for (body, why) in [
            ("<html>", "not a chat completion"),
            (r#"{"id":1}"#, "no choices"),
            (r#"{"choices":[]}"#, "no choices"),
            (r#"{"choices":[{}]}"#, "no message"),
            (r#"{"error":{"code":502,"message":"Provider down"}}"#, "Provider down"),
        ] {
            let e = parse_completion(body.as_bytes()).expect_err("no answer");
            assert!(e.contains(why), "{e}");
        }
    }

    #[test]
    fn chunks_of_all_kinds() {
        let chunk = parse_chunk(
            br#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null},{"index":1,"delta":{"content":"b"}}]}"#,
        );
        assert_eq!(chunk.expect("a chunk").delta, "a");
        let chunk = parse_chunk(br#"{"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}"#).expect("a chunk");
        assert!(chunk.usage_only);
        assert_eq!(chunk.usage.map(|u| u.total_tokens), Some(5));
        assert_eq!(parse_chunk(br#"{"id":"x"}"#), Ok(Chunk::default()));
        let e = parse_chunk(br#"{"error":{"code":429,"message":"slow down"},"choices":[{"finish_reason":"error"}]}"#);
        assert!(e.expect_err("an error").contains("slow down"));
    }

    #[test]
    fn errors_are_found_in_every_usual_shape() {
        for (body, text) in [
            (&br#"{"error":{"message":"a","code":"x"}}"#[..], "a"),
            (br#"{"error":"b"}"#, "b"),
            (br#"{"detail":"c"}"#, "c"),
            (b"bad gateway\n", "bad gateway"),
            (br#"{"error":{"code":7}}"#, r#"{"code":7}"#),
        ] {
            assert_eq!(error_text(body), text);
        }
    }
}
