//! The chat completions protocol: what goes to the upstream and what its answers mean
//! (<https://platform.openai.com/docs/api-reference/chat>), with OpenRouter's and other servers'
//! deviations. Pure: text in, types out. Here is what questions and answers have in common.

mod answer;
mod errors;
mod request;
mod tool_calls;

use std::borrow::Cow;

use serde::Deserialize;

use crate::json::{Wish, Words, each_element, object, wished};

pub use answer::{Completion, check_models, model_of_list, parse_chunk, parse_completion};
pub use errors::{NoAnswer, error_told};
pub use request::{Chat, Sent, model_in_path};
pub use tool_calls::ToolCalls;

/// JSON is UTF-8 (RFC 8259, section 8.1), also in the fields that nobody here reads.
fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// The text of a content: a string, or a list of parts, with `between` between the texts among them that no white space
/// keeps apart. Anything else is none.
pub fn text_of<'a>(content: &'a str, between: &'static str) -> Cow<'a, str> {
    if let Some(Words(text)) = wished(content) {
        return text;
    }
    let mut text = Cow::Borrowed("");
    let all = each_element(content, |Wish(part): Wish<Part<'a>>| {
        let Some(Words(more)) = part.and_then(|part| part.text) else { return };
        if !text.is_empty() && !text.ends_with(char::is_whitespace) && !more.starts_with(char::is_whitespace) {
            text += between;
        }
        text += more;
    });
    all.map_or_else(|_| Cow::default(), |()| text)
}

/// A part of a content that is a list.
#[derive(Default)]
struct Part<'a> {
    text: Option<Words<'a>>,
}

object!(Part<'de> {} wishes { text });
