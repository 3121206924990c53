//! Calls of tools in answers: how they look on the way, how their pieces come together in a stream, and how history keeps
//! them.

use serde::de::Deserializer;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::exchange::size_in_json;
use crate::json::{Few, MOST_PARTS, Wish, Words, object, wished};

/// What a tool is called by and with, as it stands in an answer; `input` is what the tools without a schema have.
#[derive(Default)]
pub(super) struct Function<'a> {
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
pub(super) struct ToolCall {
    #[serde(skip)]
    index: Option<usize>,
    arguments: Option<String>,
    id: Option<String>,
    name: Option<String>,
}

/// A tool call as it stands in an answer.
#[derive(Default)]
struct Call<'a> {
    index: Option<f64>,
    id: Option<Words<'a>>,
    function: Option<Function<'a>>,
    /// The same of a tool without a schema.
    custom: Option<Function<'a>>,
}

object!(Call<'de> {} wishes { index, id, function, custom });

impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ToolCall, D::Error> {
        let Call { index, id, function, custom } = Call::deserialize(deserializer)?;
        // Whole, but some servers have only one kind of number.
        let index = index.filter(|index| *index >= 0.0).map(|index| index as usize);
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

    fn arguments(&self) -> &str {
        self.arguments.as_deref().unwrap_or_default()
    }

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
    /// Takes the calls, or pieces of calls, of a message as they are: those of its list, or the single one of the form
    /// from before there were tools, in which some servers repeat the first.
    pub(super) fn take(&mut self, listed: Option<Few<Wish<ToolCall>>>, older: Option<Box<Function>>) {
        let listed: Vec<ToolCall> =
            listed.map_or_else(Vec::new, |Few(calls)| calls).into_iter().filter_map(|Wish(call)| call).collect();
        let older = older.filter(|_| listed.is_empty()).map(|function| function.called(None, None));
        for call in listed.into_iter().chain(older) {
            self.size += call.size();
            self.calls.push(call);
        }
    }

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

    /// The call that a piece continues: the one of its index, by its id where several have that; or the last where servers
    /// give no index. Some give all calls the same. Then a piece with a name begins anew: where its id is another, or its
    /// name after arguments came, or where it begins an object and the last one has ended: JSON has no `}{`, but in a text.
    fn place(&self, piece: &ToolCall) -> Option<usize> {
        let of_index = |call: &ToolCall| piece.index.is_none() || call.index == piece.index;
        let of_id = |id| self.calls.iter().position(|call| of_index(call) && call.id.as_ref() == Some(id));
        let with_id = given(&piece.id).and_then(of_id);
        let place = with_id.or_else(|| match (piece.index, given(&piece.id)) {
            (Some(_), _) => self.calls.iter().rposition(of_index),
            (None, Some(_)) => None,
            (None, None) => (self.last < self.calls.len()).then_some(self.last),
        })?;
        let call = &self.calls[place];
        let (Some(name), Some(known), None) = (given(&piece.name), given(&call.name), with_id) else { return Some(place) };
        let is_next = piece.arguments().trim_start().starts_with('{') && call.arguments().trim_end().ends_with('}');
        let is_another = match (given(&piece.id), given(&call.id)) {
            (Some(id), Some(known)) => id != known,
            // A name may come in pieces, before the arguments.
            _ => name != known && !call.arguments().is_empty() || is_next,
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
    *known = new.or(known.take());
    known.as_deref().map_or(0, size_in_json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::{parse_chunk, parse_completion};

    #[test]
    fn one_call_that_is_none_costs_the_others_nothing() {
        let body = r#"{"choices":[{"message":{"tool_calls":[null,{"id":"c","function":{"name":"f"}},7,["d"]]}}]}"#;
        let answer = parse_completion(body.as_bytes()).expect("an answer").answer;
        assert_eq!(answer, r#"{"tool_calls":[{"arguments":"","id":"c","name":"f"}]}"#);
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
        let two = |first: &str, second: &str| kept(&[first, second]);
        let named =
            |name: &str, arguments: &str| format!(r#"{{"index":0,"function":{{"name":"{name}","arguments":{arguments:?}}}}}"#);
        assert_eq!(two(&named("f", "{}"), &named("g", "")), r#"("f") ("{}"), ("g") None"#, "another name");
        assert_eq!(two(&named("f", ""), &named("g", "{}")), r#"("f") ("{}")"#, "a name in pieces is one call");
        assert_eq!(two(&named("f", "{}"), &named("f", "")), r#"("f") ("{}")"#, "an empty end is no call");
        assert_eq!(two(&named("f", "{}\n"), &named("f", "{}\n")), r#"("f") ("{}\n"), ("f") ("{}\n")"#, "a line end");
        let by_id = |id: &str, name: &str, arguments: &str| {
            format!(r#"{{"index":0,"id":"{id}","function":{{"name":{name},"arguments":{arguments:?}}}}}"#)
        };
        let mixed = [by_id("a", "\"f\"", "{"), by_id("b", "\"g\"", "["), by_id("a", "null", "}"), by_id("b", "null", "]")];
        assert_eq!(kept(&mixed.each_ref().map(String::as_str)), r#"("f") ("{}"), ("g") ("[]")"#, "by their ids");
        let later = r#"{"index":3,"id":"c1","function":{"name":"f","arguments":"{\"a\":1}"}}"#;
        assert_eq!(kept(&[later]), one, "whatever the first index");
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
}
