//! The chat completions protocol: what goes to the upstream and what its answers mean
//! (<https://platform.openai.com/docs/api-reference/chat>), with OpenRouter's and other servers'
//! deviations. Pure: text in, types out. Here is what questions and answers have in common.

mod answer;
mod errors;
mod request;
mod tool_calls;

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::json::{Words, object, wished};

pub use answer::{Completion, is_model_answer, model_of_list, parse_chunk, parse_completion};
pub use errors::{NoAnswer, error_told};
pub use request::{Chat, each_message, model_in_path};
pub use tool_calls::ToolCalls;

/// JSON is UTF-8 (RFC 8259, section 8.1), also in the fields that nobody here reads.
fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// The text of a content: a string, or a list of parts, with `between` between the texts among them that no white space
/// keeps apart. Anything else is none.
pub fn text_of<'a>(content: &'a str, between: &'static str) -> Cow<'a, str> {
    match content.as_bytes().first() {
        Some(b'"') => wished(content).map_or_else(Cow::default, |Words(text)| text),
        Some(b'[') => serde_json::Deserializer::from_str(content).deserialize_seq(Texts { between }).unwrap_or_default(),
        _ => Cow::default(),
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
