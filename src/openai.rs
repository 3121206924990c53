//! The chat completions protocol: what goes to the upstream and what its answers mean
//! (<https://platform.openai.com/docs/api-reference/chat>), with OpenRouter's and other servers'
//! deviations. Pure: text in, types out.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::ApiError;
use crate::exchange::{Question, Usage, parse_json};

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

/// A chat request ready for the upstream, and what history wants to know of it.
#[derive(Debug)]
pub struct Chat {
    /// The JSON to send.
    pub body: Vec<u8>,
    pub model: String,
    pub question: String,
    pub stream: bool,
    /// We asked for the usage chunk and the client did not.
    pub added_usage: bool,
    /// The client's own stream options, where it gave some and ours were added.
    options: Option<String>,
    /// Models that were asked in vain.
    tried: Vec<String>,
}

impl Chat {
    /// The request for a question: `model` and `system` are what a question that names none gets.
    pub fn from_question(asked: Question, model: &str, system: Option<&str>, stream: bool) -> Chat {
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
        let body = serde_json::to_vec(&request).unwrap_or_default();
        let model = request.model.to_string();
        Chat { body, model, question: asked.question, stream, added_usage: stream, options: None, tried: Vec::new() }
    }

    /// A client's own request body, passed on as it is but for a `model` where it names none and the
    /// usage chunk of a stream, which is always asked for. The question is its last user message, of at
    /// most `max_chars` characters. Errs with `invalid_json` or `invalid_request`.
    pub fn from_body(body: &[u8], model: &str, max_chars: usize) -> Result<Chat, ApiError> {
        let Ok(fields) = serde_json::from_slice::<Fields>(body) else {
            parse_json(body)?;
            return Err(ApiError::invalid("body", "the body must be a JSON object"));
        };
        let messages: Vec<Fields> = fields.read("messages", "a list of messages")?.unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages must be a list that is not empty"));
        }
        let mut question = String::new();
        for message in &messages {
            let wrong = |_| ApiError::invalid("messages", "a message's role must be a string");
            let role: Option<String> = message.read("role", "").map_err(wrong)?;
            if role.as_deref() == Some("user") {
                question = message.read("content", "").unwrap_or_default().map_or_else(String::new, |text: Text| text.0);
            }
        }
        if question.len() > max_chars && question.chars().count() > max_chars {
            return Err(ApiError::invalid("messages", format!("the question is longer than {max_chars} characters")));
        }
        let stream = fields.read("stream", "true or false")?.unwrap_or(false);
        let asked_model: Option<String> = fields.read("model", "a string")?;
        let options: Option<Fields> = fields.read("stream_options", "an object")?;
        let usage: Option<bool> = match &options {
            Some(options) => options
                .read("include_usage", "")
                .map_err(|_| ApiError::invalid("stream_options", "stream_options.include_usage must be true or false"))?,
            None => None,
        };
        let added_usage = stream && usage != Some(true);
        let mut chat =
            Chat { body: body.to_vec(), model: String::new(), question, stream, added_usage, options: None, tried: Vec::new() };
        match asked_model.filter(|model| !model.trim().is_empty()) {
            Some(model) => chat.model = model,
            None => chat.set_model(model),
        }
        if added_usage {
            let theirs = fields.get("stream_options").filter(|_| options.is_some()).map(str::to_string);
            let ours = with_field(theirs.as_deref().unwrap_or("{}").as_bytes(), "include_usage", Some("true"));
            chat.body = with_field(&chat.body, "stream_options", Some(&String::from_utf8_lossy(&ours)));
            chat.options = theirs;
        }
        Ok(chat)
    }

    /// Turns to the next of the fallback models that was not asked yet; false: there is none.
    pub fn fall_back(&mut self, fallbacks: &[String]) -> bool {
        self.tried.push(self.model.clone());
        let next = fallbacks.iter().find(|model| !self.tried.contains(model));
        if let Some(model) = next {
            self.set_model(model);
        }
        next.is_some()
    }

    /// Asks another model the same.
    pub fn set_model(&mut self, model: &str) {
        self.body = with_field(&self.body, "model", Some(&Value::from(model).to_string()));
        self.model = model.to_string();
    }

    /// Takes the usage option out again, for a server that refuses it. False: it was not ours.
    pub fn drop_usage(&mut self) -> bool {
        let ours = std::mem::take(&mut self.added_usage);
        if ours {
            self.body = with_field(&self.body, "stream_options", self.options.as_deref());
        }
        ours
    }
}

/// The JSON object `body` with one field set to `value` (JSON) or taken out; all other fields keep
/// their place and their bytes.
fn with_field(body: &[u8], name: &str, value: Option<&str>) -> Vec<u8> {
    let Ok(Fields(fields)) = serde_json::from_slice::<Fields>(body) else { return body.to_vec() };
    let mut edited = Vec::with_capacity(body.len() + 64);
    edited.push(b'{');
    let kept = fields.iter().filter(|(field, _)| field != name).map(|(field, value)| (field.as_str(), value.get()));
    for (field, value) in kept.chain(value.map(|value| (name, value))) {
        if edited.len() > 1 {
            edited.push(b',');
        }
        edited.extend_from_slice(Value::from(field).to_string().as_bytes());
        edited.push(b':');
        edited.extend_from_slice(value.as_bytes());
    }
    edited.push(b'}');
    edited
}

/// An object's fields in their order, with the bytes of their values.
struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// The JSON of a field; of several of the same name the last.
    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(field, _)| field == name).map(|(_, value)| value.get())
    }

    /// The value of a field, `None` where it is not there or null. Errs with 422 saying what it must be.
    fn read<T: Deserialize<'a>>(&self, name: &str, kind: &str) -> Result<Option<T>, ApiError> {
        let Some(json) = self.get(name) else { return Ok(None) };
        serde_json::from_str(json).map_err(|_| ApiError::invalid(name, format!("{name} must be {kind}")))
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields<'de>, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// What a whole answer says.
#[derive(Debug, PartialEq)]
pub struct Completion {
    pub answer: String,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
}

/// Why what came is no answer.
#[derive(Debug, PartialEq)]
pub struct NoAnswer {
    /// For people.
    pub why: String,
    /// An error that may not be there the next time, by the code in it.
    pub passing: bool,
}

impl From<String> for NoAnswer {
    fn from(why: String) -> NoAnswer {
        NoAnswer { why, passing: false }
    }
}

impl NoAnswer {
    fn error(what: &str, error: &Value) -> NoAnswer {
        let code = &error["code"];
        let code = code.as_u64().or_else(|| code.as_str()?.parse().ok());
        NoAnswer { why: format!("{what}: {}", error_words(error)), passing: matches!(code, Some(408 | 429 | 500..=599)) }
    }
}

/// Reads the body of a 200. Errs when it is no answer: not JSON, without choices, or an `error` in place
/// of one.
pub fn parse_completion(body: &[u8]) -> Result<Completion, NoAnswer> {
    let answer: Answer = from_json(body).map_err(|e| format!("its answer is not a chat completion: {e}"))?;
    if let Some(error) = answer.error.filter(|e| !e.is_null()) {
        return Err(NoAnswer::error("it answered with an error", &error));
    }
    let choice = answer.choices.unwrap_or_default().into_iter().next().ok_or_else(|| "its answer has no choices".to_string())?;
    let mut message = choice.message.ok_or_else(|| "its answer's first choice has no message".to_string())?;
    let mut text = message.text();
    message.calls().append_to(&mut text);
    Ok(Completion {
        answer: text,
        model: answer.model.map(Cow::into_owned),
        finish_reason: choice.finish_reason.map(Cow::into_owned),
        usage: answer.usage.map(Usage::from),
    })
}

/// JSON is UTF-8 (RFC 8259, section 8.1), also in the fields that nobody here reads.
fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// Whether a body is a JSON object without an `error` in it, as every list and model is.
pub fn is_model_answer(body: &[u8]) -> bool {
    serde_json::from_slice::<Fields>(body).is_ok_and(|fields| fields.get("error").is_none_or(|error| error == "null"))
}

/// What one event of a stream says.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk {
    /// The piece of answer in it, often empty.
    pub delta: String,
    /// The pieces of tool calls in it.
    pub tool_calls: ToolCalls,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    /// The chunk has no choice and brings only the usage.
    pub usage_only: bool,
}

/// Reads the data of one event that is not `[DONE]`. Errs when it is an error or no chunk.
pub fn parse_chunk(data: &[u8]) -> Result<Chunk, NoAnswer> {
    let answer: Answer = from_json(data).map_err(|e| format!("an event of its stream is not a chunk: {e}"))?;
    if let Some(error) = answer.error.filter(|e| !e.is_null()) {
        return Err(NoAnswer::error("its stream broke off with an error", &error));
    }
    let usage = answer.usage.map(Usage::from);
    let mut chunk = Chunk { model: answer.model.map(Cow::into_owned), usage, ..Chunk::default() };
    let choices = answer.choices.unwrap_or_default();
    chunk.usage_only = choices.is_empty() && usage.is_some();
    // Further choices (`n` > 1) reach the client, and history keeps the first.
    for choice in choices.into_iter().filter(|choice| choice.index == 0) {
        if let Some(mut delta) = choice.delta {
            chunk.delta.push_str(&delta.text());
            chunk.tool_calls.add(delta.calls());
        }
        chunk.finish_reason = choice.finish_reason.map(Cow::into_owned).or(chunk.finish_reason);
    }
    Ok(chunk)
}

/// The words for people in the body of an error answer, of any length: the message of an `error` in any of the usual shapes, or the start of whatever text it is.
pub fn error_text(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => error_words(value.get("error").filter(|e| !e.is_null()).unwrap_or(&value)),
        Err(_) => one_line(String::from_utf8_lossy(body).trim()),
    }
}

fn error_words(error: &Value) -> String {
    let text = ["message", "detail", "msg"].iter().find_map(|name| error.get(name)?.as_str());
    match text.or(error.as_str()) {
        Some(text) => one_line(text),
        None => one_line(&error.to_string()),
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
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
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
    /// How a single call looked before there were tools.
    #[serde(default)]
    function_call: Option<ToolFunction>,
}

impl Words {
    fn calls(&mut self) -> ToolCalls {
        let older = self.function_call.take().map(|function| ToolCall { function: Some(function), ..ToolCall::default() });
        ToolCalls(self.tool_calls.take().unwrap_or_default().into_iter().chain(older).collect())
    }

    fn text(&mut self) -> String {
        let words = if self.content.0.is_empty() { &mut self.refusal } else { &mut self.content };
        std::mem::take(&mut words.0)
    }
}

/// A call of a tool, or in a stream a piece of one: pieces of the same index belong together.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
struct ToolCall {
    #[serde(default)]
    index: usize,
    #[serde(default)]
    id: Option<String>,
    /// `custom` is the same of a tool without a schema.
    #[serde(default, alias = "custom")]
    function: Option<ToolFunction>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
struct ToolFunction {
    #[serde(default)]
    name: Option<String>,
    #[serde(default, alias = "input")]
    arguments: Option<String>,
}

/// The tool calls of an answer as they come together.
#[derive(Debug, Default, PartialEq)]
pub struct ToolCalls(Vec<ToolCall>);

impl ToolCalls {
    /// No model calls more tools at once; an index beyond is not believed.
    const MOST: usize = 128;

    /// Adds the pieces that a chunk brought.
    pub fn add(&mut self, pieces: ToolCalls) {
        for piece in pieces.0.into_iter().filter(|piece| piece.index < Self::MOST) {
            while self.0.len() <= piece.index {
                self.0.push(ToolCall { index: self.0.len(), ..ToolCall::default() });
            }
            let call = &mut self.0[piece.index];
            call.id = call.id.take().or(piece.id);
            let Some(function) = piece.function else { continue };
            let known = call.function.get_or_insert_default();
            known.name = known.name.take().or(function.name);
            known.arguments.get_or_insert_default().push_str(&function.arguments.unwrap_or_default());
        }
    }

    /// Bytes of arguments so far.
    pub fn len(&self) -> usize {
        self.0.iter().filter_map(|call| call.function.as_ref()?.arguments.as_ref()).map(String::len).sum()
    }

    /// What history keeps: after the words of the answer a line of JSON, `{"tool_calls":[...]}`.
    pub fn append_to(&self, answer: &mut String) {
        if self.0.is_empty() {
            return;
        }
        let calls: Vec<Value> = self.0.iter().map(ToolCall::to_json).collect();
        if !answer.is_empty() {
            answer.push('\n');
        }
        answer.push_str(&serde_json::json!({ "tool_calls": calls }).to_string());
    }
}

impl ToolCall {
    fn to_json(&self) -> Value {
        let function = self.function.clone().unwrap_or_default();
        serde_json::json!({"id": self.id, "name": function.name, "arguments": function.arguments})
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
        let chat = Chat::from_question(asked, "m", Some("s"), true);
        assert_eq!(
            String::from_utf8(chat.body).expect("UTF-8"),
            r#"{"model":"m","messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}],"temperature":0.2,"stream":true,"stream_options":{"include_usage":true}}"#
        );
    }

    #[test]
    fn a_clients_own_body_is_passed_on_as_it_is() {
        let body = br#"{ "seed": 1.50, "messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"},{"type":"text","text":"b"}]},{"role":"tool","content":"c"}],"model":"x" }"#;
        let mut chat = Chat::from_body(body, "m", 10).expect("a chat request");
        assert_eq!((chat.body.as_slice(), chat.question.as_str(), chat.model.as_str()), (&body[..], "ab", "x"));
        chat.set_model("y");
        assert!(String::from_utf8_lossy(&chat.body).starts_with(r#"{"seed":1.50,"messages":["#));
        let mut chat =
            Chat::from_body(br#"{"messages":[{"role":"user","content":"a"}],"stream":true}"#, "m", 10).expect("a chat request");
        assert_eq!(
            String::from_utf8_lossy(&chat.body),
            r#"{"messages":[{"role":"user","content":"a"}],"stream":true,"model":"m","stream_options":{"include_usage":true}}"#
        );
        assert!(chat.drop_usage() && !chat.drop_usage());
        assert!(!String::from_utf8_lossy(&chat.body).contains("stream_options"));
    }

    #[test]
    fn what_is_not_utf8_is_no_json_also_where_nobody_reads_it() {
        let chunk = b"{\"id\":\"\xff\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}";
        assert!(parse_chunk(chunk).is_err_and(|no| no.why.contains("utf-8")));
        assert!(parse_chunk(&chunk.map(|b| if b == 0xff { b'x' } else { b })).is_ok());
    }

    #[test]
    fn what_is_no_chat_request_is_refused() {
        for (body, status) in [
            ("{", 400),
            ("[]", 422),
            ("{}", 422),
            (r#"{"messages":[]}"#, 422),
            (r#"{"messages":[{"role":"user"}],"stream":"yes"}"#, 422),
            (r#"{"messages":[{"role":"user","content":"12345678901"}]}"#, 422),
        ] {
            assert_eq!(Chat::from_body(body.as_bytes(), "m", 10).expect_err("refused").code.status(), status, "{body}");
        }
    }

    #[test]
    fn tool_calls_come_together_from_their_pieces() {
        let mut calls = ToolCalls::default();
        for data in [
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c1","function":{"name":"f","arguments":""}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\""}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":":1}"}}]}}]}"#,
        ] {
            calls.add(parse_chunk(data.as_bytes()).expect("a chunk").tool_calls);
        }
        let mut answer = String::new();
        calls.append_to(&mut answer);
        assert_eq!(answer, r#"{"tool_calls":[{"arguments":"{\"a\":1}","id":"c1","name":"f"}]}"#);
    }

    #[test]
    fn a_completion_may_have_parts_a_refusal_or_nothing_to_say() {
        for (message, answer) in [
            (r#"{"content":"Paris"}"#, "Paris"),
            (r#"{"content":[{"type":"text","text":"Pa"},{"type":"text","text":"ris"}]}"#, "Paris"),
            (r#"{"content":null,"refusal":"No."}"#, "No."),
            (r#"{"content":null,"tool_calls":[]}"#, ""),
            (
                r#"{"content":null,"tool_calls":[{"id":"c","function":{"name":"f","arguments":"{}"}}]}"#,
                r#"{"tool_calls":[{"arguments":"{}","id":"c","name":"f"}]}"#,
            ),
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
            assert!(e.why.contains(why), "{e:?}");
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
        let e = e.expect_err("an error");
        assert!(e.why.contains("slow down") && e.passing);
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
