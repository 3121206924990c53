//! The chat completions protocol: what goes to the upstream and what its answers mean
//! (<https://platform.openai.com/docs/api-reference/chat>), with OpenRouter's and other servers'
//! deviations. Pure: text in, types out.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode_str;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::config::MAX_ANSWER;
use crate::error::ApiError;
use crate::exchange::{Question, Usage, is_longer, parse_json, size_in_json};
use crate::json::{EachField, Few, MOST_PARTS, Wish, Words, each_field, object, wished};

/// An error of more bytes is not kept as a whole, only its words.
const LARGE_ERROR: usize = 64 * 1024;

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
    stream_options: Option<Value>,
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
            stream_options: stream.then(|| json!({"include_usage": true})),
        };
        let body = serde_json::to_vec(&request).unwrap_or_default();
        let model = request.model.to_string();
        Chat { body, model, question: asked.question, stream, added_usage: stream, options: None, tried: Vec::new() }
    }

    /// A client's own request body, passed on as it is but for a `model` where it names none and the
    /// usage chunk of a stream, which is always asked for. The question is its last user message, of at
    /// most `max_chars` characters. Errs with `invalid_json` or `invalid_request`.
    pub fn from_body(body: &[u8], model: &str, max_chars: usize) -> Result<Chat, ApiError> {
        let (mut messages, mut stream, mut asked_model, mut options) = (None, None, None, None);
        let fields = each_field(body, |name, value| match name {
            "messages" => messages = Some(value),
            "stream" => stream = Some(value),
            "model" => asked_model = Some(value),
            "stream_options" => options = Some(value),
            _ => {}
        });
        if fields.is_err() {
            parse_json(body)?;
            return Err(ApiError::invalid("body", "the body must be a JSON object"));
        }
        let (mut any, mut wrong_role, mut question) = (false, false, None);
        if let Some(messages) = messages.filter(|messages| messages.get() != "null") {
            let list = each_message(messages, |message| {
                any = true;
                match read::<Words>(message.role, "role", "a string") {
                    Ok(Some(Words(role))) if role == "user" => question = message.content,
                    Ok(_) => {}
                    Err(_) => wrong_role = true,
                }
            });
            list.map_err(|_| ApiError::invalid("messages", "messages must be a list of messages"))?;
        }
        if !any {
            return Err(ApiError::invalid("messages", "messages must be a list that is not empty"));
        }
        if wrong_role {
            return Err(ApiError::invalid("messages", "a message's role must be a string"));
        }
        let question = question.map(|content| text_of(content.get(), "\n").into_owned()).unwrap_or_default();
        if is_longer(&question, max_chars) {
            return Err(ApiError::invalid("messages", format!("the question is longer than {max_chars} characters")));
        }
        let stream = read(stream, "stream", "true or false")?.unwrap_or(false);
        let asked_model: Option<String> = read(asked_model, "model", "a string")?;
        let options = options.map(RawValue::get).filter(|options| *options != "null");
        let mut usage = None;
        if let Some(options) = options {
            each_field(options.as_bytes(), |name, value| {
                if name == "include_usage" {
                    usage = Some(value);
                }
            })
            .map_err(|_| ApiError::invalid("stream_options", "stream_options must be an object"))?;
        }
        let usage: Option<bool> = read(usage, "", "")
            .map_err(|_| ApiError::invalid("stream_options", "stream_options.include_usage must be true or false"))?;
        let added_usage = stream && usage != Some(true);
        let mut chat =
            Chat { body: body.to_vec(), model: String::new(), question, stream, added_usage, options: None, tried: Vec::new() };
        match asked_model.filter(|model| !model.trim().is_empty()) {
            Some(model) => chat.model = model,
            None => chat.set_model(model),
        }
        if added_usage {
            let theirs = options.map(str::to_string);
            let ours = with_field(theirs.as_deref().unwrap_or("{}").as_bytes(), "include_usage", Some("true"));
            chat.body = with_field(&chat.body, "stream_options", Some(&String::from_utf8_lossy(&ours)));
            chat.options = theirs;
        }
        Ok(chat)
    }

    /// Another model than the one that was asked for first is asked now.
    pub fn has_fallen_back(&self) -> bool {
        !self.tried.is_empty()
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
    fn set_model(&mut self, model: &str) {
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
    let mut edited = Vec::with_capacity(body.len() + 64);
    edited.push(b'{');
    let mut write = |field: &str, value: &str| {
        if edited.len() > 1 {
            edited.push(b',');
        }
        edited.extend_from_slice(Value::from(field).to_string().as_bytes());
        edited.push(b':');
        edited.extend_from_slice(value.as_bytes());
    };
    let fields = each_field(body, |field, value| {
        if field != name {
            write(field, value.get());
        }
    });
    if fields.is_err() {
        return body.to_vec();
    }
    if let Some(value) = value {
        write(name, value);
    }
    edited.push(b'}');
    edited
}

/// A field's value, `None` where it is not there or null. Errs with 422 saying what it must be.
fn read<'a, T: Deserialize<'a>>(json: Option<&'a RawValue>, name: &str, kind: &str) -> Result<Option<T>, ApiError> {
    let Some(json) = json else { return Ok(None) };
    serde_json::from_str(json.get()).map_err(|_| ApiError::invalid(name, format!("{name} must be {kind}")))
}

/// What is read of a message of a request.
#[derive(Default)]
pub struct Sent<'a> {
    pub role: Option<&'a RawValue>,
    pub content: Option<&'a RawValue>,
    pub tool_calls: Option<&'a RawValue>,
}

/// Shows every message of a list.
pub fn each_message<'a>(list: &'a RawValue, see: impl FnMut(Sent<'a>)) -> serde_json::Result<()> {
    serde_json::Deserializer::from_str(list.get()).deserialize_seq(EachMessage(see))
}

struct EachMessage<F>(F);

impl<'de, F: FnMut(Sent<'de>)> Visitor<'de> for EachMessage<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of messages")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        loop {
            let mut sent = Sent::default();
            let message = EachField(|name: &str, value: &'de RawValue| match name {
                "role" => sent.role = Some(value),
                "content" => sent.content = Some(value),
                "tool_calls" => sent.tool_calls = Some(value),
                _ => {}
            });
            if list.next_element_seed(message)?.is_none() {
                return Ok(());
            }
            (self.0)(sent);
        }
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
    /// An error that may not be there the next time, or with another model, by the code in it.
    pub passing: bool,
}

impl From<String> for NoAnswer {
    fn from(why: String) -> NoAnswer {
        NoAnswer { why, passing: false }
    }
}

impl NoAnswer {
    /// Holds more than an answer may.
    pub fn too_large() -> NoAnswer {
        format!("its answer is larger than {MAX_ANSWER} bytes").into()
    }

    fn error(what: &str, error: &str) -> NoAnswer {
        let error = &readable(error);
        let code = &error["code"];
        let code = code.as_u64().or_else(|| code.as_str()?.parse().ok());
        NoAnswer { why: format!("{what}: {}", error_words(error)), passing: matches!(code, Some(404 | 408 | 429 | 500..=599)) }
    }
}

/// Reads the body of a 200. Errs when it is no answer: not JSON, without choices, or an `error` in place
/// of one.
pub fn parse_completion(body: &[u8]) -> Result<Completion, NoAnswer> {
    let answer: Answer = from_json(body).map_err(|e| format!("its answer is not a chat completion: {e}"))?;
    answer.no_error("it answered with an error", body)?;
    let mut choices = answer.choices.map_or_else(Vec::new, |Few(choices)| choices);
    if choices.is_empty() {
        return Err("its answer has no choices".to_string().into());
    }
    let choice = choices.swap_remove(choices.iter().position(Choice::is_first).unwrap_or(0));
    no_error("it answered with an error", choice.error)?;
    let mut message = choice.message.ok_or_else(|| "its answer's first choice has no message".to_string())?;
    let mut text = message.text().into_owned();
    let mut calls = ToolCalls::default();
    message.calls(&mut calls);
    if text.len() + calls.size() > MAX_ANSWER {
        return Err(NoAnswer::too_large());
    }
    calls.append_to(&mut text);
    Ok(Completion {
        answer: text,
        model: answer.model.map(|Words(model)| model.into_owned()),
        finish_reason: reason(choice.finish_reason).map(Cow::into_owned),
        usage: usage(answer.usage),
    })
}

/// JSON is UTF-8 (RFC 8259, section 8.1), also in the fields that nobody here reads.
fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// Whether an `error` field says that there is one: some servers send it always.
fn is_error(error: &RawValue) -> bool {
    !matches!(error.get(), "null" | "false" | "\"\"" | "{}" | "[]")
}

/// Errs where an `error` field says that there is one; `what` its answer did.
fn no_error(what: &str, error: Option<&RawValue>) -> Result<(), NoAnswer> {
    error.filter(|error| is_error(error)).map_or(Ok(()), |error| Err(NoAnswer::error(what, error.get())))
}

/// The model whose name stands in a path, in which clients may encode any byte (RFC 3986, section 2.1); `None`: none can
/// have that name.
pub fn model_in_path(name: &str) -> Option<String> {
    let name = percent_decode_str(name).decode_utf8().ok()?;
    // What servers may take for a part of another path.
    let odd = |c: char| c.is_control() || "\\?#%".contains(c);
    let sane = (1..=200).contains(&name.len()) && !name.contains(odd);
    (sane && name.split('/').all(|step| !matches!(step, "" | "." | ".."))).then(|| name.into_owned())
}

/// Whether a body is a JSON object without an `error` in it, as every list and model is.
pub fn is_model_answer(body: &[u8]) -> bool {
    let mut fine = true;
    let fields = each_field(body, |name, value| {
        if name == "error" {
            fine = !is_error(value);
        }
    });
    fields.is_ok() && fine
}

/// What one event of a stream says, in its own bytes where they are the text.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk<'a> {
    /// The piece of answer in it, often empty.
    pub delta: Cow<'a, str>,
    /// The pieces of tool calls in it.
    pub tool_calls: ToolCalls,
    pub model: Option<Cow<'a, str>>,
    pub finish_reason: Option<Cow<'a, str>>,
    /// Of further choices (`n` > 1), which reach the client and not the history: which, and whether it is finished.
    pub others: Vec<(u64, bool)>,
    pub usage: Option<Usage>,
    /// Without one it is a frame around the answer: the usage, what a filter says, or nothing we know.
    pub has_choice: bool,
}

/// An empty finish reason is none: some servers send it in every chunk.
fn reason(given: Option<Words>) -> Option<Cow<str>> {
    given.map(|Words(reason)| reason).filter(|reason| !reason.is_empty())
}

/// Reads the data of one event that is not `[DONE]`. Errs when it is an error or no chunk.
pub fn parse_chunk(data: &[u8]) -> Result<Chunk<'_>, NoAnswer> {
    let answer: Answer = from_json(data).map_err(|e| format!("an event of its stream is not a chunk: {e}"))?;
    answer.no_error("its stream broke off with an error", data)?;
    let usage = usage(answer.usage);
    let mut chunk = Chunk { model: answer.model.map(|Words(model)| model), usage, ..Chunk::default() };
    let choices = answer.choices.map_or_else(Vec::new, |Few(choices)| choices);
    chunk.has_choice = !choices.is_empty();
    for choice in choices {
        if let Some(index) = choice.index.filter(|index| *index > 0) {
            chunk.others.push((index, reason(choice.finish_reason).is_some()));
            continue;
        }
        no_error("its stream broke off with an error", choice.error)?;
        if let Some(mut delta) = choice.delta {
            chunk.delta += delta.text();
            delta.calls(&mut chunk.tool_calls);
        }
        chunk.finish_reason = reason(choice.finish_reason).or(chunk.finish_reason);
    }
    Ok(chunk)
}

/// The words for people in the body of an error answer, of any length: the message of an `error` in any of the usual
/// shapes, or whatever text it is.
pub fn error_text(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        // Google's come in a list of one.
        Ok(value) => {
            let value = value.get(0).unwrap_or(&value);
            error_words(value.get("error").filter(|error| !error.is_null() && **error != "").unwrap_or(value))
        }
        Err(_) => one_line(String::from_utf8_lossy(body).trim()),
    }
}

/// The field of the request that an error answer blames.
pub fn error_param(body: &[u8]) -> Option<String> {
    let param = serde_json::from_slice::<Value>(body).ok()?["error"]["param"].as_str().map(one_line)?;
    (1..=200).contains(&param.len()).then_some(param)
}

/// An error as it is, or what people and we read of it where it is large.
fn readable(json: &str) -> Value {
    let part = |json: &str| -> Option<Value> {
        if json.len() <= LARGE_ERROR {
            return serde_json::from_str(json).ok();
        }
        let Words(text) = serde_json::from_str(json).ok()?;
        Some(text.chars().take(LARGE_ERROR).collect::<String>().into())
    };
    if let Some(error) = part(json) {
        return error;
    }
    let mut fields = serde_json::Map::new();
    // What is no object has no fields.
    let _ = each_field(json.as_bytes(), |name, value| {
        if let ("code" | "message" | "detail" | "msg", Some(value)) = (name, part(value.get())) {
            fields.insert(name.to_string(), value);
        }
    });
    if fields.is_empty() { format!("{} bytes without a message", json.len()).into() } else { fields.into() }
}

/// What people read of an error; its code, where that is a word, by which programs tell it from others.
fn error_words(error: &Value) -> String {
    let text = ["message", "detail", "msg"].iter().find_map(|name| error.get(name)?.as_str());
    match text.or(error.as_str()) {
        Some(text) => match error.get("code").and_then(Value::as_str).filter(|code| !code.is_empty() && !text.contains(code)) {
            Some(code) => one_line(&format!("{text} ({code})")),
            None => one_line(text),
        },
        None => one_line(&error.to_string()),
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[derive(Default)]
struct Answer<'a> {
    model: Option<Words<'a>>,
    choices: Option<Few<Choice<'a>>>,
    usage: Option<Counts>,
    error: Option<&'a RawValue>,
    object: Option<Words<'a>>,
}

object!(Answer<'de> { choices, error } wishes { model, usage, object });

impl Answer<'_> {
    /// Errs where it is an error or has one, by what `json` says; `what` its sender did.
    fn no_error(&self, what: &str, json: &[u8]) -> Result<(), NoAnswer> {
        no_error(what, self.error)?;
        // Another form of it, without a frame.
        let is_error = self.choices.is_none() && self.object.as_ref().is_some_and(|Words(object)| object == "error");
        if is_error { Err(NoAnswer::error(what, &String::from_utf8_lossy(json))) } else { Ok(()) }
    }
}

#[derive(Default)]
struct Choice<'a> {
    index: Option<u64>,
    message: Option<Said<'a>>,
    delta: Option<Said<'a>>,
    finish_reason: Option<Words<'a>>,
    /// OpenRouter's, of a provider that failed.
    error: Option<&'a RawValue>,
}

object!(Choice<'de> { message, delta, error } wishes { index, finish_reason });

impl Choice<'_> {
    fn is_first(&self) -> bool {
        self.index.is_none_or(|index| index == 0)
    }
}

#[derive(Default)]
struct Said<'a> {
    content: Text<'a>,
    refusal: Text<'a>,
    tool_calls: Option<Few<Wish<ToolCall>>>,
    /// How a single call looked before there were tools.
    function_call: Option<Box<Function<'a>>>,
}

object!(Said<'de> { content, refusal } wishes { tool_calls, function_call });

impl<'a> Said<'a> {
    /// Adds its calls, or pieces of calls, as they are.
    fn calls(&mut self, all: &mut ToolCalls) {
        let older = self.function_call.take().map(|function| function.called(None, None));
        let calls = self.tool_calls.take().map_or_else(Vec::new, |Few(calls)| calls).into_iter().filter_map(|Wish(call)| call);
        for call in calls.chain(older) {
            all.size += call.size();
            all.calls.push(call);
        }
    }

    fn text(&mut self) -> Cow<'a, str> {
        let words = if self.content.0.is_empty() { &mut self.refusal } else { &mut self.content };
        std::mem::take(&mut words.0)
    }
}

/// What a tool is called by and with, as it stands in an answer; `input` is what the tools without a schema have.
#[derive(Default)]
struct Function<'a> {
    name: Option<Words<'a>>,
    arguments: Option<&'a RawValue>,
    input: Option<&'a RawValue>,
}

object!(Function<'de> { arguments, input } wishes { name });

impl Function<'_> {
    fn called(self, index: Option<usize>, id: Option<String>) -> ToolCall {
        // Some servers give the arguments as the object that they are.
        let text = |json: &str| wished(json).map_or_else(|| json.to_string(), |Words(text)| text.into_owned());
        let arguments = self.arguments.or(self.input).map(|json| text(json.get()));
        ToolCall {
            index,
            arguments: Some(arguments.unwrap_or_default()),
            id,
            name: self.name.map(|Words(name)| name.into_owned()),
        }
    }
}

/// A call of a tool, or in a stream a piece of one. History keeps it in this form.
#[derive(Debug, Default, Serialize, PartialEq)]
struct ToolCall {
    #[serde(skip)]
    index: Option<usize>,
    arguments: Option<String>,
    id: Option<String>,
    name: Option<String>,
}

/// A tool call as it stands in an answer.
#[derive(Default)]
struct Call<'a> {
    index: Option<usize>,
    id: Option<Words<'a>>,
    function: Option<Function<'a>>,
    /// The same of a tool without a schema.
    custom: Option<Function<'a>>,
}

object!(Call<'de> {} wishes { index, id, function, custom });

impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ToolCall, D::Error> {
        let Call { index, id, function, custom } = Call::deserialize(deserializer)?;
        let id = id.map(|Words(id)| id.into_owned());
        Ok(match function.or(custom) {
            Some(function) => function.called(index, id),
            None => ToolCall { index, id, ..ToolCall::default() },
        })
    }
}

impl ToolCall {
    /// What a call takes in history beside its texts, in bytes: empty ones are many.
    const FRAME: usize = r#"{"arguments":null,"id":null,"name":null},"#.len();

    fn size(&self) -> usize {
        Self::FRAME + [&self.arguments, &self.name, &self.id].into_iter().flatten().map(|text| size_in_json(text)).sum::<usize>()
    }
}

/// The tool calls of an answer as they come together.
#[derive(Debug, Default, PartialEq)]
pub struct ToolCalls {
    calls: Vec<ToolCall>,
    /// Counted while they come: they may come in a million pieces.
    size: usize,
    /// Place of the call that the last piece belongs to.
    last: usize,
}

/// A field that says something: some servers send empty ones.
fn given(text: &Option<String>) -> Option<&String> {
    text.as_ref().filter(|text| !text.is_empty())
}

impl ToolCalls {
    /// Adds the pieces that a chunk brought.
    pub fn add(&mut self, pieces: ToolCalls) {
        for piece in pieces.calls {
            self.last = self.place(&piece).unwrap_or(self.calls.len());
            if self.last >= MOST_PARTS {
                continue;
            }
            if self.last == self.calls.len() {
                self.calls.push(ToolCall { index: piece.index, ..ToolCall::default() });
                self.size += ToolCall::FRAME;
            }
            let call = &mut self.calls[self.last];
            self.size += take_first(&mut call.id, piece.id) + take_first(&mut call.name, piece.name);
            if let Some(arguments) = piece.arguments {
                self.size += size_in_json(&arguments);
                call.arguments.get_or_insert_default().push_str(&arguments);
            }
        }
    }

    /// The call that a piece continues: the one of its index; where servers give none, the one of its id, or the last.
    /// Some give all calls one index. Then one that is named begins anew: by another id, or where the call before is complete.
    fn place(&self, piece: &ToolCall) -> Option<usize> {
        let place = match (piece.index, given(&piece.id)) {
            (Some(_), _) => self.calls.iter().rposition(|call| call.index == piece.index),
            (None, Some(id)) => self.calls.iter().position(|call| call.id.as_ref() == Some(id)),
            (None, None) => (self.last < self.calls.len()).then_some(self.last),
        }?;
        let call = &self.calls[place];
        let (Some(_), Some(_)) = (given(&piece.name), given(&call.name)) else { return Some(place) };
        let is_another = match (given(&piece.id), given(&call.id)) {
            (Some(id), Some(known)) => id != known,
            _ => call
                .arguments
                .as_ref()
                .is_some_and(|json| json.ends_with('}') && from_json::<IgnoredAny>(json.as_bytes()).is_ok()),
        };
        (!is_another).then_some(place)
    }

    /// About how many bytes history keeps of them.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What history keeps: after the words of the answer a line of JSON, `{"tool_calls":[...]}`.
    pub fn append_to(&self, answer: &mut String) {
        if self.calls.is_empty() {
            return;
        }
        if !answer.is_empty() {
            answer.push('\n');
        }
        *answer += &format!("{{\"tool_calls\":{}}}", serde_json::to_string(&self.calls).unwrap_or_default());
    }
}

/// Keeps the first that came; gives by how many bytes that is more.
fn take_first(known: &mut Option<String>, new: Option<String>) -> usize {
    if given(known).is_some() {
        return 0;
    }
    let before = known.as_deref().map_or(0, size_in_json);
    *known = new.or(known.take());
    known.as_deref().map_or(0, size_in_json) - before
}

/// Counted in whole numbers, but some servers have only one kind of number.
#[derive(Default)]
struct Counts {
    prompt_tokens: Option<f64>,
    completion_tokens: Option<f64>,
    total_tokens: Option<f64>,
}

object!(Counts {} wishes { prompt_tokens, completion_tokens, total_tokens });

/// `None` where nothing was counted.
fn usage(counts: Option<Counts>) -> Option<Usage> {
    let counts = counts?;
    // Less than none is no number of tokens, nor is what nobody could have said: sums of it would overflow.
    let whole = |tokens: Option<f64>| tokens.filter(|tokens| (0.0..1e15).contains(tokens)).map(|tokens| tokens as u64);
    let (prompt, completion, total) = (whole(counts.prompt_tokens), whole(counts.completion_tokens), whole(counts.total_tokens));
    prompt.or(completion).or(total)?;
    let (prompt_tokens, completion_tokens) = (prompt.unwrap_or(0), completion.unwrap_or(0));
    Some(Usage {
        prompt_tokens,
        completion_tokens,
        total_tokens: total.unwrap_or(prompt_tokens.saturating_add(completion_tokens)),
    })
}

/// The text of a content: a string, or a list of parts, with `between` between the texts among them that no white space keeps apart. Anything else is none.
pub fn text_of<'a>(content: &'a str, between: &'static str) -> Cow<'a, str> {
    match content.as_bytes().first() {
        Some(b'"') => wished(content).map_or_else(Cow::default, |Words(text)| text),
        Some(b'[') => serde_json::Deserializer::from_str(content).deserialize_seq(Texts { between }).unwrap_or_default(),
        _ => Cow::default(),
    }
}

/// The text of what a model says, which may come in parts anywhere.
#[derive(Default)]
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text<'a>, D::Error> {
        <&RawValue>::deserialize(deserializer).map(|json| Text(text_of(json.get(), "")))
    }
}

/// A part of a content that is a list.
#[derive(Default)]
struct Part<'a> {
    text: Option<Words<'a>>,
}

object!(Part<'de> {} wishes { text });

struct Texts {
    between: &'static str,
}

impl<'de> Visitor<'de> for Texts {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of parts")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Cow<'de, str>, A::Error> {
        let mut text = Cow::Borrowed("");
        while let Some(part) = parts.next_element::<&RawValue>()? {
            if let Some(Words(more)) = wished::<Part>(part.get()).and_then(|part| part.text) {
                if !text.is_empty() && !text.ends_with(char::is_whitespace) && !more.starts_with(char::is_whitespace) {
                    text += self.between;
                }
                text += more;
            }
        }
        Ok(text)
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
        assert_eq!((chat.body.as_slice(), chat.question.as_str(), chat.model.as_str()), (&body[..], "a\nb", "x"));
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
            (r#"[[{"role":"user","content":"a"}],"m"]"#, 422),
            ("{}", 422),
            (r#"{"messages":[]}"#, 422),
            (r#"{"messages":[{"role":"user"}],"stream":"yes"}"#, 422),
            (r#"{"messages":[{"role":"user","content":"12345678901"}]}"#, 422),
        ] {
            assert_eq!(Chat::from_body(body.as_bytes(), "m", 10).expect_err("refused").code.status(), status, "{body}");
        }
    }

    #[test]
    fn what_is_not_utf8_is_no_chat_request_also_in_a_name() {
        let body = b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"\xff\":1}";
        assert_eq!(Chat::from_body(body, "m", 10).expect_err("refused").code, crate::error::Code::INVALID_JSON);
        assert!(Chat::from_body(&body.map(|b| if b == 0xff { b'x' } else { b }), "m", 10).is_ok());
    }

    #[test]
    fn a_list_is_no_object_and_of_doubled_fields_the_last_counts() {
        for list in [
            r#"[]"#,
            r#"["m",[]]"#,
            r#"["m",[[0,["hello"],null,"stop"]]]"#,
            r#"[{"error":{"code":401,"message":"bad key"}}]"#,
            r#"{"choices":[[0,["hello"],["hello"],"stop"]]}"#,
            r#"{"choices":[{"message":["hello"],"delta":["hello"]}]}"#,
        ] {
            assert!(parse_completion(list.as_bytes()).is_err(), "{list}");
            assert!(parse_chunk(list.as_bytes()).is_err(), "{list}");
        }
        let body = r#"{"model":"a","choices":[],"usage":{"total_tokens":3},"model":"b","usage":null,
            "choices":[{"message":{"content":"x","content":"y"},"finish_reason":"stop","finish_reason":null}]}"#;
        let completion = parse_completion(body.as_bytes()).expect("an answer");
        assert_eq!((&*completion.answer, completion.model.as_deref()), ("y", Some("b")));
        assert_eq!((completion.finish_reason, completion.usage), (None, None));
    }

    #[test]
    fn one_call_that_is_none_costs_the_others_nothing() {
        let body = r#"{"choices":[{"message":{"tool_calls":[null,{"id":"c","function":{"name":"f"}},7,["d"]]}}]}"#;
        let answer = parse_completion(body.as_bytes()).expect("an answer").answer;
        assert_eq!(answer, r#"{"tool_calls":[{"arguments":"","id":"c","name":"f"}]}"#);
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
    fn pieces_of_tool_calls_without_an_index_belong_to_the_call_before_until_an_id_comes() {
        let mut calls = ToolCalls::default();
        for (choice, pieces) in [
            ("null", r#"[{"id":"c1","function":{"name":"f","arguments":"{"}},{"index":null,"function":{"arguments":"}"}}]"#),
            ("0", r#"[{"index":null,"id":"c2","function":{"name":"g","arguments":"["}}]"#),
            ("0", r#"[{"id":"c2","function":{"arguments":"]"}}]"#),
        ] {
            let chunk = format!(r#"{{"choices":[{{"index":{choice},"delta":{{"tool_calls":{pieces}}}}}]}}"#);
            calls.add(parse_chunk(chunk.as_bytes()).expect("a chunk").tool_calls);
        }
        let mut answer = String::new();
        calls.append_to(&mut answer);
        let (first, second) = (r#"{"arguments":"{}","id":"c1","name":"f"}"#, r#"{"arguments":"[]","id":"c2","name":"g"}"#);
        assert_eq!(answer, format!(r#"{{"tool_calls":[{first},{second}]}}"#));
    }

    /// Bridges to other protocols give all calls the index 0, or an empty id.
    #[test]
    fn calls_of_one_index_are_told_by_id_name_and_what_is_complete() {
        let kept = |pieces: &[&str]| {
            let mut calls = ToolCalls::default();
            for piece in pieces {
                let chunk = format!(r#"{{"choices":[{{"delta":{{"tool_calls":[{piece}]}}}}]}}"#);
                calls.add(parse_chunk(chunk.as_bytes()).expect("a chunk").tool_calls);
            }
            let told = |call: &ToolCall| format!("{:?} {:?}", given(&call.name), given(&call.arguments)).replace("Some", "");
            calls.calls.iter().map(told).collect::<Vec<_>>().join(", ")
        };
        let paris = r#"{"index":0,"id":"c1","function":{"name":"f","arguments":"{\"a\":1}"}}"#;
        let rome = paris.replace("c1", "c2");
        let two = r#"("f") ("{\"a\":1}"), ("f") ("{\"a\":1}")"#;
        assert_eq!(kept(&[paris, &rome]), two, "two ids");
        let nameless = |id: &str| paris.replace("\"c1\"", id);
        assert_eq!(kept(&[&nameless("\"\""), &nameless("\"\"")]), two, "no id and whole arguments");
        assert_eq!(kept(&[&nameless("null"), &nameless("null")]), two, "no id and whole arguments");
        let half = |id: &str, name: &str, half: &str| {
            format!(r#"{{"index":0,"id":{id},"function":{{"name":{name},"arguments":{half:?}}}}}"#)
        };
        let one = r#"("f") ("{\"a\":1}")"#;
        for (id, other, name) in [(r#""c1""#, r#""c1""#, r#""f""#), ("\"c1\"", "\"c2\"", "null"), ("\"\"", "\"\"", r#""f""#)] {
            assert_eq!(kept(&[&half(id, r#""f""#, "{\"a\""), &half(other, name, ":1}")]), one, "{id} {other} {name}");
        }
        let later = r#"{"index":3,"id":"c1","function":{"name":"f","arguments":"{\"a\":1}"}}"#;
        assert_eq!(kept(&[later]), one, "whatever the first index");
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
            (r#"{"object":"error","message":"Overloaded","code":503}"#, "with an error: Overloaded"),
            (r#"{"choices":[{}]}"#, "no message"),
            (r#"{"error":{"code":502,"message":"Provider down"}}"#, "Provider down"),
        ] {
            let e = parse_completion(body.as_bytes()).expect_err("no answer");
            assert!(e.why.contains(why), "{e:?}");
        }
    }

    #[test]
    fn of_a_large_error_the_words_are_kept() {
        let much = "[0],".repeat(LARGE_ERROR);
        let long = "é".repeat(LARGE_ERROR);
        for (error, why, passing) in [
            (format!(r#"{{"a":[{much}0],"message":"Overfull","code":"503"}}"#), "Overfull", true),
            (format!(r#"{{"a":[{much}0],"code":400}}"#), r#"{"code":400}"#, false),
            (format!(r#"{{"message":"Long: {long}","code":500}}"#), "Long: é", true),
            (format!(r#""Long: {long}""#), "Long: é", false),
            (format!("[{much}0]"), "bytes without a message", false),
            (format!("{}{}", "[".repeat(1000), "]".repeat(1000)), "2000 bytes", false),
        ] {
            let e = parse_completion(format!(r#"{{"error":{error}}}"#).as_bytes()).expect_err("an error");
            assert!(e.why.contains(why) && e.passing == passing, "{why}: {:.100} {}", e.why, e.passing);
            assert!(e.why.len() < 3 * LARGE_ERROR, "{why}");
        }
    }

    #[test]
    fn of_many_choices_and_calls_the_first_are_kept() {
        let calls = format!("{{}}{}", ",{}".repeat(MOST_PARTS));
        let body = format!(r#"{{"choices":[{{"message":{{"tool_calls":[{calls}]}}}},{calls}]}}"#);
        let answer: Value = serde_json::from_str(&parse_completion(body.as_bytes()).expect("an answer").answer).expect("JSON");
        assert_eq!(answer["tool_calls"].as_array().map(Vec::len), Some(MOST_PARTS));
        assert!(parse_completion(br#"{"choices":[{"message":{"content":""}},0]}"#).is_err());
        let body = br#"{"choices":[{"index":1,"message":{"content":"b"}},{"index":0,"message":{"content":"a"}}]}"#;
        assert_eq!(parse_completion(body).expect("an answer").answer, "a", "whatever their order");
    }

    #[test]
    fn the_size_of_tool_calls_is_what_they_take() {
        let mut calls = ToolCalls::default();
        for piece in [
            r#"{"index":2,"id":"i\"","function":{"name":"n","arguments":"\u0000\b\n\\"}}"#,
            r#"{"index":2,"id":"","function":{"name":"","arguments":"é\u001f\u007f"}}"#,
            r#"{"index":128,"id":"far"}"#,
        ] {
            let chunk = format!(r#"{{"choices":[{{"delta":{{"tool_calls":[{piece}]}}}}]}}"#);
            calls.add(parse_chunk(chunk.as_bytes()).expect("a chunk").tool_calls);
        }
        let mut answer = String::new();
        calls.append_to(&mut answer);
        // A null is written twice as long as two quotes, and the list has a frame of its own.
        let nulls = 4 * "null".len() - 4 * "\"\"".len();
        assert_eq!(calls.size(), answer.len() + nulls - r#"{"tool_calls":[]}"#.len() + 1, "{answer}");
    }

    #[test]
    fn chunks_of_all_kinds() {
        let chunk = parse_chunk(
            br#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null},{"index":1,"delta":{"content":"b"}}]}"#,
        );
        assert_eq!(chunk.expect("a chunk").delta, "a");
        let chunk = parse_chunk(br#"{"choices":[{"delta":{"content":"a"},"finish_reason":""}]}"#).expect("a chunk");
        assert_eq!(chunk.finish_reason, None);
        let chunk = parse_chunk(br#"{"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}"#).expect("a chunk");
        assert!(!chunk.has_choice);
        assert_eq!(chunk.usage.map(|u| u.total_tokens), Some(5));
        let chunk = parse_chunk(br#"{"choices":[],"usage":{"prompt_tokens":2,"total_tokens":1e30}}"#).expect("a chunk");
        assert_eq!(chunk.usage.map(|u| u.total_tokens), Some(2), "nobody counts so far");
        assert_eq!(parse_chunk(br#"{"id":"x"}"#), Ok(Chunk::default()));
        let e = parse_chunk(br#"{"error":{"code":429,"message":"slow down"},"choices":[{"finish_reason":"error"}]}"#);
        let e = e.expect_err("an error");
        assert!(e.why.contains("slow down") && e.passing);
        let e = parse_chunk(br#"{"object":"error","message":"out of memory","type":"InternalServerError","code":500}"#);
        let e = e.expect_err("an error");
        assert!(e.why.contains("out of memory") && e.passing);
    }

    #[test]
    fn errors_are_found_in_every_usual_shape() {
        for (body, text) in [
            (&br#"{"error":{"message":"a","code":"x"}}"#[..], "a (x)"),
            (br#"{"error":{"message":"too long: x","code":"x"}}"#, "too long: x"),
            (br#"{"error":"b"}"#, "b"),
            (br#"[{"error":{"message":"l"}}]"#, "l"),
            (br#"{"detail":"c"}"#, "c"),
            (b"bad gateway\n", "bad gateway"),
            (br#"{"error":{"code":7}}"#, r#"{"code":7}"#),
        ] {
            assert_eq!(error_text(body), text);
        }
    }
}
