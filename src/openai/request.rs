//! A chat request on its way to the upstream: made of a question, or a client's own, with little changed. Knows nothing of
//! answers.

use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::text_of;
use crate::error::ApiError;
use crate::exchange::{Question, is_longer, no_object, read};
use crate::json::{Words, each_element, each_field, object};

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
        fields.map_err(|e| no_object(body, e))?;
        let (mut any, mut wrong_role, mut question) = (false, false, None);
        if let Some(messages) = messages.filter(|messages| messages.get() != "null") {
            let list = each_element(messages.get(), |message: Sent| {
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
            return Err(ApiError::invalid(
                "messages",
                format!("the question is longer than {max_chars} characters (MAX_QUESTION_CHARS)"),
            ));
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

/// What is read of a message of a request.
#[derive(Default)]
pub struct Sent<'a> {
    pub role: Option<&'a RawValue>,
    pub content: Option<&'a RawValue>,
    pub tool_calls: Option<&'a RawValue>,
}

object!(Sent<'de> { role, content, tool_calls } wishes {});

/// The model whose name stands in a path, in which clients may encode any byte (RFC 3986, section 2.1); `None`: none can
/// have that name.
pub fn model_in_path(name: &str) -> Option<String> {
    let name = percent_decode_str(name).decode_utf8().ok()?;
    // What servers may take for a part of another path.
    let odd = |c: char| c.is_control() || "\\?#%;".contains(c);
    let sane = (1..=200).contains(&name.len()) && !name.contains(odd);
    // Servers of a local file name it by its path, which begins with a slash.
    let mut steps = name.strip_prefix('/').unwrap_or(&name).split('/');
    (sane && steps.all(|step| !matches!(step, "" | "." | ".."))).then(|| name.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_in_a_path_leads_to_no_other_path() {
        let long = "n".repeat(200);
        for name in ["gpt-4o", "vendor/model-1.5:free", "a..b", "@cf/m", &long] {
            assert_eq!(model_in_path(name).as_deref(), Some(name));
        }
        assert_eq!(model_in_path("caf%C3%A9%2f1").as_deref(), Some("café/1"));
        assert_eq!(model_in_path("%2Fmodels%2Fllama").as_deref(), Some("/models/llama"));
        for name in [
            "",
            "..",
            "a/./b",
            "a//b",
            "//a",
            "/",
            "/../a",
            "a/",
            "..;/b",
            "a;b",
            "a%3Bb",
            "a\\b",
            "a%3fb",
            "a%23b",
            "a%25b",
            "a%0a",
            "%ff",
            &(long + "n"),
        ] {
            assert_eq!(model_in_path(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_not_utf8_is_no_chat_request_also_in_a_name() {
        let body = b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"\xff\":1}";
        assert_eq!(Chat::from_body(body, "m", 10).expect_err("refused").code, crate::error::Code::INVALID_JSON);
        assert!(Chat::from_body(&body.map(|b| if b == 0xff { b'x' } else { b }), "m", 10).is_ok());
    }
}
