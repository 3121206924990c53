//! The LLM that is not there: answers any chat request deterministically, in OpenAI's shape: words, a
//! tool call where one is demanded, JSON where a response format asks for it. Pure: the waiting is the
//! upstream's.

mod instance;

use std::collections::HashSet;

use serde_json::value::RawValue;
use serde_json::{Value, json};

use self::instance::instance;
use crate::json::{Words, each_element, object};
use crate::openai::{Sent, text_of};

/// Characters of a question that the answer repeats.
const REPEATED: usize = 500;
/// Bytes of a response format or of tools that are listened to; what is larger is as if it were not there.
const HEARD: usize = 512 * 1024;
/// The most choices that are given.
const MOST_CHOICES: u64 = 16;
/// Pieces in which JSON is streamed, and their least length: it has few blanks, or none.
const MOST_PIECES: usize = 50;
const LEAST_PIECE: usize = 8;

/// The body of a 200 for a chat request.
pub fn completion(request: &[u8]) -> String {
    let said = say(request);
    let choice = |index: u64| {
        let (message, finish_reason) = match &said.tool {
            Some(tool) => {
                let call = said.call(tool, index, &said.pieces.concat());
                (json!({"role": "assistant", "content": null, "tool_calls": [call], "refusal": null}), "tool_calls")
            }
            None => (json!({"role": "assistant", "content": said.pieces.concat(), "refusal": null}), "stop"),
        };
        json!({"index": index, "message": message, "logprobs": null, "finish_reason": finish_reason})
    };
    json!({
        "id": said.id, "object": "chat.completion", "created": 0, "model": said.model,
        "choices": (0..said.choices).map(choice).collect::<Vec<Value>>(),
        "usage": said.usage,
    })
    .to_string()
}

/// The same answer as the data of a stream's events, word by word; the usage comes last, and the end.
pub fn chunks(request: &[u8]) -> Vec<String> {
    let said = say(request);
    let chunk = |choices: Value, usage: &Value| {
        json!({"id": said.id, "object": "chat.completion.chunk", "created": 0, "model": said.model,
               "choices": choices, "usage": usage})
        .to_string()
    };
    let mut chunks = Vec::new();
    for index in 0..said.choices {
        let mut delta = |delta: Value, reason: Value| {
            chunks.push(chunk(json!([{"index": index, "delta": delta, "finish_reason": reason}]), &Value::Null));
        };
        // With an empty text clients would make a part of it, beside the call.
        let content = if said.tool.is_some() { Value::Null } else { json!("") };
        delta(json!({"role": "assistant", "content": content}), Value::Null);
        if let Some(tool) = &said.tool {
            let mut call = said.call(tool, index, "");
            call["index"] = json!(0);
            delta(json!({"tool_calls": [call]}), Value::Null);
            for piece in &said.pieces {
                delta(json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}), Value::Null);
            }
            delta(json!({}), json!("tool_calls"));
        } else {
            said.pieces.iter().for_each(|piece| delta(json!({"content": piece}), Value::Null));
            delta(json!({}), json!("stop"));
        }
    }
    chunks.extend([chunk(json!([]), &said.usage), "[DONE]".to_string()]);
    chunks
}

/// The models of the mocked server, as `GET /models` lists them.
pub fn models(names: &[String]) -> String {
    let model = |name| json!({"id": name, "object": "model", "created": 0, "owned_by": "mock"});
    json!({"object": "list", "data": names.iter().map(model).collect::<Vec<Value>>()}).to_string()
}

struct Said {
    /// The name of the tool that is called, as the request demanded.
    tool: Option<String>,
    /// The answer, or the tool's arguments, as a stream brings them.
    pieces: Vec<String>,
    /// How often it is said.
    choices: u64,
    model: String,
    usage: Value,
    id: String,
}

impl Said {
    /// The call of a tool in the choice of this index.
    fn call(&self, name: &str, index: u64, arguments: &str) -> Value {
        let mut id = self.id.replace("chatcmpl", "call");
        if index > 0 {
            id += &format!("-{index}");
        }
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
    }
}

/// A chat request, in so far as it is listened to.
#[derive(Default)]
struct Request<'a> {
    model: Option<Words<'a>>,
    messages: Option<&'a RawValue>,
    response_format: Option<&'a RawValue>,
    tools: Option<&'a RawValue>,
    tool_choice: Option<&'a RawValue>,
    n: Option<&'a RawValue>,
}

object!(Request<'de> { messages, response_format, tools, tool_choice, n } wishes { model });

fn count(text: &str) -> usize {
    text.split_whitespace().count().max(1)
}

fn say(request: &[u8]) -> Said {
    let request: Request = serde_json::from_slice(request).unwrap_or_default();
    let (mut question, mut prompt, mut called) = (String::new(), 0, Vec::new());
    // Who asks was let in, so it is a list.
    let _ = request.messages.map(|messages| {
        each_element(messages.get(), |message: Sent| {
            let text = message.content.map(|content| text_of(content.get(), "\n")).unwrap_or_default();
            prompt += count(&text);
            if message.role.is_some_and(|role| role.get() == "\"user\"") {
                question = text.into_owned();
                called.clear();
            }
            let calls = heard(message.tool_calls);
            let names = calls.as_array().into_iter().flatten().filter_map(|call| call["function"]["name"].as_str());
            called.extend(names.map(str::to_string));
        })
    });
    let choices = heard(request.n).as_u64().unwrap_or(1).clamp(1, MOST_CHOICES);
    let format = heard(request.response_format);
    let (tool, json) = match demanded_tool(&heard(request.tools), &heard(request.tool_choice), &called) {
        Some((name, arguments)) => (Some(name), Some(arguments)),
        None => match format["type"].as_str() {
            Some("json_object") => (None, Some(json!({"mock": true, "question": repeated(&question)}))),
            Some("json_schema") => (None, Some(instance(&format["json_schema"]["schema"]))),
            _ => (None, None),
        },
    };
    let pieces = match json {
        Some(json) => pieces_of_json(&json.to_string()),
        None => words(&format!("This is a mock answer to: {}", repeated(&question))),
    };
    let completion = pieces.len() * choices as usize;
    // FNV-1a: the same messages always have the same id, and each turn of a conversation one of its own, by which
    // frameworks tell its messages.
    let messages = request.messages.map_or("", RawValue::get);
    let hash = messages.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Said {
        tool,
        pieces,
        choices,
        model: repeated(request.model.as_ref().map_or("mock", |Words(model)| model)),
        usage: json!({
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0},
        }),
        id: format!("chatcmpl-mock-{hash:016x}"),
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_inclusive(' ').map(str::to_string).collect()
}

fn pieces_of_json(json: &str) -> Vec<String> {
    let characters: Vec<char> = json.chars().collect();
    let pieces = characters.chunks(LEAST_PIECE.max(characters.len().div_ceil(MOST_PIECES)));
    pieces.map(|piece| piece.iter().collect()).collect()
}

fn repeated(question: &str) -> String {
    question.chars().take(REPEATED).collect()
}

/// The value where it is listened to, or null.
fn heard(json: Option<&RawValue>) -> Value {
    let json = json.map(RawValue::get).filter(|json| json.len() <= HEARD);
    json.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default()
}

/// The name of the function that `tool_choice` names, and arguments for it. Where it demands any, of all or of those that it
/// allows: the first that was not `called` since the question, or the last, so that an agent that demands one at each step
/// comes to the one that ends it.
fn demanded_tool(tools: &Value, choice: &Value, called: &[String]) -> Option<(String, Value)> {
    let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_string);
    let list = |tools: &Value| -> Vec<String> { tools.as_array().into_iter().flatten().filter_map(name).collect() };
    let allowed = &choice["allowed_tools"];
    let candidates = match choice.as_str() {
        Some("required" | "any") => list(tools),
        _ if allowed["mode"] == "required" => list(&allowed["tools"]),
        _ => vec![name(choice)?],
    };
    let called: HashSet<&String> = called.iter().collect();
    let name = candidates.iter().find(|name| !called.contains(name)).or(candidates.last())?;
    let tool = tools.as_array()?.iter().find(|tool| tool["function"]["name"] == **name)?;
    Some((name.clone(), instance(&tool["function"]["parameters"])))
}
