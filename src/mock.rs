//! The LLM that is not there: answers any chat request deterministically, in OpenAI's shape: words, a
//! tool call where one is demanded, JSON where a response format asks for it. Pure: the waiting is the
//! upstream's.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::openai::{each_message, text_of};

/// Characters of a question that the answer repeats.
const REPEATED: usize = 500;
/// Bytes of a response format or of tools that are listened to; what is larger is as if it were not there.
const HEARD: usize = 128 * 1024;
/// The most choices that are given.
const MOST_CHOICES: u64 = 16;
/// Nesting to which a JSON schema is followed.
const DEEPEST: usize = 32;
/// The most items of an array that are given.
const MOST_ITEMS: usize = 1000;
/// Bytes that are said for a JSON schema, about; where it asks for more, the rest is null or left out.
const LONGEST_INSTANCE: usize = 16 * 1024;

/// The body of a 200 for a chat request.
pub fn completion(request: &[u8]) -> String {
    let said = say(request);
    let choice = |index: u64| {
        let (message, finish_reason) = match &said.tool {
            Some(tool) => {
                let call = tool.call(&said.id, index);
                (json!({"role": "assistant", "content": null, "tool_calls": [call], "refusal": null}), "tool_calls")
            }
            None => (json!({"role": "assistant", "content": said.answer, "refusal": null}), "stop"),
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

/// The same answer as the data of a stream's events, word by word; the usage comes last.
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
        delta(json!({"role": "assistant", "content": ""}), Value::Null);
        if let Some(tool) = &said.tool {
            let mut call = tool.call(&said.id, index);
            call["index"] = json!(0);
            delta(json!({"tool_calls": [call]}), Value::Null);
            delta(json!({}), json!("tool_calls"));
        } else {
            said.answer.split_inclusive(' ').for_each(|word| delta(json!({"content": word}), Value::Null));
            delta(json!({}), json!("stop"));
        }
    }
    chunks.push(chunk(json!([]), &said.usage));
    chunks
}

/// The models of the mocked server, as `GET /models` lists them.
pub fn models(names: &[String]) -> String {
    let models: Vec<Value> = names.iter().map(|name| model(name)).collect();
    json!({"object": "list", "data": models}).to_string()
}

/// One model, as `GET /models/{id}` shows it.
pub fn model(name: &str) -> Value {
    json!({"id": name, "object": "model", "created": 0, "owned_by": "mock"})
}

struct Said {
    answer: String,
    tool: Option<Tool>,
    /// How often it is said.
    choices: u64,
    model: String,
    usage: Value,
    id: String,
}

/// A call of a tool that the request demanded.
struct Tool {
    name: String,
    arguments: String,
}

impl Tool {
    /// The call in an answer of this id, in the choice of this index.
    fn call(&self, id: &str, index: u64) -> Value {
        let mut id = id.replace("chatcmpl", "call");
        if index > 0 {
            id += &format!("-{index}");
        }
        json!({"id": id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// A chat request, in so far as it is listened to.
#[derive(Default, Deserialize)]
struct Request<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    response_format: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_choice: Option<&'a RawValue>,
    #[serde(borrow, default)]
    n: Option<&'a RawValue>,
}

fn count(text: &str) -> usize {
    text.split_whitespace().count().max(1)
}

fn say(request: &[u8]) -> Said {
    let request: Request = serde_json::from_slice(request).unwrap_or_default();
    let (mut question, mut prompt, mut called) = (String::new(), 0, Vec::new());
    // Who asks was let in, so it is a list.
    let _ = request.messages.map(|messages| {
        each_message(messages, |message| {
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
    let tool = demanded_tool(&heard(request.tools), &heard(request.tool_choice), &called);
    let choices = heard(request.n).as_u64().unwrap_or(1).clamp(1, MOST_CHOICES);
    let format = heard(request.response_format);
    let answer = match format["type"].as_str() {
        Some("json_object") => json!({"mock": true, "question": repeated(&question)}).to_string(),
        Some("json_schema") => {
            let schema = &format["json_schema"]["schema"];
            instance(schema, schema, 0, &mut { LONGEST_INSTANCE }).to_string()
        }
        _ => format!("This is a mock answer to: {}", repeated(&question)),
    };
    let completion = count(tool.as_ref().map_or(&answer, |tool| &tool.arguments)) * choices as usize;
    // FNV-1a: the same messages always have the same id, and each turn of a conversation one of its own, by which
    // frameworks tell its messages.
    let messages = request.messages.map_or("", RawValue::get);
    let hash = messages.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Said {
        answer,
        tool,
        choices,
        model: repeated(request.model.as_deref().unwrap_or("mock")),
        usage: json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}),
        id: format!("chatcmpl-mock-{hash:016x}"),
    }
}

fn repeated(question: &str) -> String {
    question.chars().take(REPEATED).collect()
}

/// The value where it is listened to, or null.
fn heard(json: Option<&RawValue>) -> Value {
    let json = json.map(RawValue::get).filter(|json| json.len() <= HEARD);
    json.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default()
}

/// The function that `tool_choice` names. Where it demands any, of all or of those that it allows: the first that was not
/// `called` since the question, or the last, so that an agent that demands one at each step comes to the one that ends it.
fn demanded_tool(tools: &Value, choice: &Value, called: &[String]) -> Option<Tool> {
    let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_string);
    let list = |tools: &Value| -> Vec<String> { tools.as_array().into_iter().flatten().filter_map(name).collect() };
    let allowed = &choice["allowed_tools"];
    let candidates = match choice.as_str() {
        Some("required" | "any") => list(tools),
        _ if allowed["mode"] == "required" => list(&allowed["tools"]),
        _ => vec![name(choice)?],
    };
    let name = candidates.iter().find(|name| !called.contains(name)).or(candidates.last())?;
    let tool = tools.as_array()?.iter().find(|tool| tool["function"]["name"] == **name)?;
    let schema = &tool["function"]["parameters"];
    let arguments = instance(schema, schema, 0, &mut { LONGEST_INSTANCE }).to_string();
    Some(Tool { name: name.clone(), arguments })
}

/// A value that fits a JSON schema as it is used for structured output, of at most `left` bytes. A
/// schema that refers to itself could ask for any number of them.
fn instance(schema: &Value, root: &Value, depth: usize, left: &mut usize) -> Value {
    if !afford(left, 8) || depth > DEEPEST {
        return Value::Null;
    }
    if let Some(constant) = schema.get("const").or(schema["enum"].get(0)) {
        return repeat(constant, left);
    }
    let has_fields = ["properties", "required"].iter().any(|name| schema.get(name).is_some());
    match combined(schema, root, depth, left) {
        Some(Value::Object(object)) if has_fields => return fields(object, schema, root, depth, left).into(),
        Some(value) if !has_fields => return value,
        _ => {}
    }
    let kind = schema["type"].as_str().or(schema["type"][0].as_str()).unwrap_or("object");
    match kind {
        "string" => text(schema, left).into(),
        "integer" | "number" => number(schema),
        "boolean" => json!(true),
        "null" => Value::Null,
        "array" => {
            // An older name of the same.
            let first = schema["prefixItems"].as_array().or(schema["items"].as_array()).map_or(&[][..], Vec::as_slice);
            let least = (schema["minItems"].as_u64().unwrap_or(0) as usize).max(first.len()).min(MOST_ITEMS);
            let items = (0..least).map(|at| first.get(at).unwrap_or(&schema["items"]));
            items.map(|schema| instance(schema, root, depth + 1, left)).collect()
        }
        _ => fields(Map::new(), schema, root, depth, left).into(),
    }
}

/// What the schemas say that one refers to or is put together of; `None`: there are none.
fn combined(schema: &Value, root: &Value, depth: usize, left: &mut usize) -> Option<Value> {
    if let Some(reference) = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#')) {
        // As a part of a URI it may be percent-encoded (RFC 6901, section 6).
        let pointer = percent_decode_str(reference).decode_utf8_lossy();
        let meant = if afford(left, reference.len()) { root.pointer(&pointer) } else { None };
        return Some(meant.map_or(Value::Null, |schema| instance(schema, root, depth + 1, left)));
    }
    if let Some([first, more @ ..]) = schema["allOf"].as_array().map(Vec::as_slice) {
        let mut all = instance(first, root, depth + 1, left);
        for schema in more {
            if let (Value::Object(all), Value::Object(part)) = (&mut all, instance(schema, root, depth + 1, left)) {
                all.extend(part);
            }
        }
        return Some(all);
    }
    let choices = schema["anyOf"].as_array().or(schema["oneOf"].as_array())?;
    // A chain that goes on for ever ends, where it may, before it has to.
    let is_end = |choice: &&Value| {
        depth > DEEPEST / 2 && matches!(choice["type"].as_str(), Some("null" | "string" | "integer" | "number" | "boolean"))
    };
    let choice = choices.iter().find(is_end).or(choices.first())?;
    Some(instance(choice, root, depth + 1, left))
}

/// The object with the properties of the schema, and what else that requires.
fn fields(mut object: Map<String, Value>, schema: &Value, root: &Value, depth: usize, left: &mut usize) -> Map<String, Value> {
    let known = schema["properties"].as_object();
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let others = required.filter(|name| known.is_none_or(|known| !known.contains_key(*name)));
    let others = others.filter(|name| !object.contains_key(*name)).map(|name| (name, &schema["additionalProperties"]));
    // What the schemas say that this one is put together of stands, but for what they only require.
    let is_open = |name: &str| object.get(name).is_none_or(|value| *value == json!({}));
    let known = known.into_iter().flatten().map(|(name, schema)| (name.as_str(), schema));
    let known = known.filter(|(name, _)| is_open(name));
    let wanted: Vec<(&str, &Value)> = known.chain(others).collect();
    for (name, schema) in wanted {
        if !afford(left, name.len()) {
            break;
        }
        object.insert(name.to_string(), instance(schema, root, depth + 1, left));
    }
    object
}

/// A text of the format that the schema names (JSON Schema, validation, section 7.3), or of the length.
fn text(schema: &Value, left: &mut usize) -> String {
    let of_format = match schema["format"].as_str() {
        Some("date-time") => "2000-01-01T00:00:00Z",
        Some("date") => "2000-01-01",
        Some("time") => "00:00:00Z",
        Some("duration") => "P1D",
        Some("email" | "idn-email") => "mock@example.com",
        Some("hostname" | "idn-hostname") => "example.com",
        Some("ipv4") => "127.0.0.1",
        Some("ipv6") => "::1",
        Some("uri" | "iri" | "url") => "https://example.com/",
        Some(format) if format.starts_with("uuid") => "00000000-0000-4000-8000-000000000000",
        _ => {
            let length = |name: &str| schema[name].as_u64().map(|length| length as usize);
            let (least, most) = (length("minLength").unwrap_or(0), length("maxLength").unwrap_or(usize::MAX));
            let length = 4.max(least).min(most);
            return if afford(left, length) { "mock".chars().cycle().take(length).collect() } else { String::new() };
        }
    };
    of_format.to_string()
}

/// 0 or what comes next to it, within the schema's limits (JSON Schema, validation, section 6.2).
fn number(schema: &Value) -> Value {
    let names = ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"];
    // As it is: not every whole number is one that a float can be.
    if schema["minimum"].is_i64() && names[1..].iter().all(|name| schema.get(name).is_none()) {
        return schema["minimum"].clone();
    }
    let limit = |name: &str| schema[name].as_f64();
    let [least, above, most, below] = [names[0], names[1], names[2], names[3]].map(limit);
    let step = limit("multipleOf").filter(|step| *step > 0.0).unwrap_or(1.0);
    let low = [least, above].into_iter().flatten().reduce(f64::max).unwrap_or(0.0);
    let high = [most, below].into_iter().flatten().reduce(f64::min).unwrap_or(0.0);
    let (up, down) = ((low / step).ceil() * step, (high / step).floor() * step);
    let candidates = [0.0, up, up + step, down, down - step, (low + high) / 2.0];
    let fits = |n: &f64| {
        least.is_none_or(|least| *n >= least)
            && above.is_none_or(|above| *n > above)
            && most.is_none_or(|most| *n <= most)
            && below.is_none_or(|below| *n < below)
    };
    let number = candidates.into_iter().find(fits).unwrap_or(low);
    // Whole numbers as such: 1.0 is none to every reader.
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

/// A value out of the schema itself.
fn repeat(value: &Value, left: &mut usize) -> Value {
    if afford(left, value.to_string().len()) { value.clone() } else { Value::Null }
}

/// Takes `cost` of what is left; false: that is not enough, and there is nothing left for others either.
fn afford(left: &mut usize, cost: usize) -> bool {
    let rest = left.checked_sub(cost);
    *left = rest.unwrap_or(0);
    rest.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::{parse_chunk, parse_completion};

    #[test]
    fn the_stream_says_what_the_whole_answer_says() {
        let request = r#"{"model":"m","messages":[{"role":"user","content":"Привет, 🦀\u0000 world"}]}"#.as_bytes();
        let whole = parse_completion(completion(request).as_bytes()).expect("an answer");
        let data = chunks(request);
        let chunks: Vec<_> = data.iter().map(|c| parse_chunk(c.as_bytes()).expect("a chunk")).collect();
        let streamed: String = chunks.iter().map(|c| &*c.delta).collect();
        assert_eq!(streamed, whole.answer);
        assert!(streamed.ends_with("Привет, 🦀\0 world"));
        assert_eq!(chunks.last().and_then(|c| c.usage), whole.usage);
    }

    #[test]
    fn a_demanded_tool_is_called_with_arguments_of_its_schema() {
        let request = br##"{"messages":[{"role":"user","content":"q"}],"tool_choice":{"type":"function","function":{"name":"f"}},
            "tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"city":{"type":"string"},"n":{"$ref":"#/$defs/n"}},"$defs":{"n":{"type":"integer"}}}}}]}"##;
        let whole = parse_completion(completion(request).as_bytes()).expect("an answer");
        assert_eq!(whole.finish_reason.as_deref(), Some("tool_calls"));
        assert!(whole.answer.contains(r#"{\"city\":\"mock\",\"n\":0}"#), "{}", whole.answer);
    }

    #[test]
    fn a_schema_gets_what_it_asks_for() {
        let schema = json!({"type":"object","properties":{"a":{"enum":["x"]},"b":{"type":"array","minItems":1,"items":{"type":"boolean"}},"c":{"anyOf":[{"type":"null"}]}}});
        assert_eq!(instance(&schema, &schema, 0, &mut { LONGEST_INSTANCE }), json!({"a":"x","b":[true],"c":null}));
    }

    #[test]
    fn formats_lengths_and_limits_are_kept() {
        let said = |schema: Value| instance(&schema, &schema, 0, &mut { LONGEST_INSTANCE });
        for (schema, expected) in [
            (json!({"type": "string", "format": "date-time"}), json!("2000-01-01T00:00:00Z")),
            (json!({"type": "string", "minLength": 6}), json!("mockmo")),
            (json!({"type": "string", "maxLength": 2}), json!("mo")),
            (json!({"type": "string", "minLength": LONGEST_INSTANCE + 1}), json!("")),
            (json!({"type": "integer"}), json!(0)),
            (json!({"type": "integer", "minimum": 3}), json!(3)),
            (json!({"type": "integer", "minimum": 9_007_199_254_740_993_i64}), json!(9_007_199_254_740_993_i64)),
            (json!({"type": "integer", "minimum": 1, "exclusiveMinimum": 5}), json!(6)),
            (json!({"type": "integer", "maximum": 10, "exclusiveMaximum": -3}), json!(-4)),
            (json!({"type": "integer", "exclusiveMinimum": 0}), json!(1)),
            (json!({"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5}), json!(5)),
            (json!({"type": "integer", "maximum": -1}), json!(-1)),
            (json!({"type": "integer", "exclusiveMaximum": 0}), json!(-1)),
            (json!({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}), json!(0.5)),
            (json!({"type": "number", "minimum": 0.5, "multipleOf": 0.25}), json!(0.5)),
            (json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]}), json!([0, true])),
            (json!({"type": "array", "items": [{"type": "integer"}, {"type": "boolean"}]}), json!([0, true])),
            (json!({"type": "array", "minItems": 20, "items": {"type": "null"}}), json!(vec![Value::Null; 20])),
            (json!({"type": "string", "format": "uuid4"}), json!("00000000-0000-4000-8000-000000000000")),
            (json!({"required": ["a"], "additionalProperties": {"type": "integer"}}), json!({"a": 0})),
            (json!({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 1}}}), json!(1)),
            (
                json!({"anyOf": [{"required": ["a"]}], "properties": {"a": {"type": "string"}}, "required": ["b"]}),
                json!({"a": "mock", "b": {}}),
            ),
            (
                json!({"$ref": "#/$defs/m", "properties": {"a": {"const": 1}}, "required": ["b"], "additionalProperties": true,
                       "$defs": {"m": {"properties": {"b": {"const": 2}}}}}),
                json!({"a": 1, "b": 2}),
            ),
            (
                json!({"properties": {"kind": {"type": "string"}, "n": {"type": "integer"}},
                       "oneOf": [{"properties": {"kind": {"const": "a"}}}, {"properties": {"kind": {"const": "b"}}}]}),
                json!({"kind": "a", "n": 0}),
            ),
            (
                json!({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}),
                json!({"a": 1, "b": 2}),
            ),
        ] {
            assert_eq!(said(schema.clone()), expected, "{schema}");
        }
    }

    #[test]
    fn ten_models_in_each_other_are_followed() {
        let mut definitions = json!({"m10": {"type": "object", "properties": {"end": {"const": "here"}}}});
        for depth in 0..10 {
            let next = json!({"anyOf": [{"$ref": format!("#/$defs/m{}", depth + 1)}]});
            definitions[format!("m{depth}")] = json!({"type": "object", "properties": {"next": next}});
        }
        let schema = json!({"$defs": definitions, "$ref": "#/$defs/m0"});
        let mut model = &instance(&schema, &schema, 0, &mut { LONGEST_INSTANCE });
        while !model["next"].is_null() {
            model = &model["next"];
        }
        assert_eq!(model["end"], "here");
    }

    #[test]
    fn a_chain_ends_as_its_schema_has_it() {
        let schema = json!({"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}, "$ref": "#/$defs/node"});
        let mut node = &instance(&schema, &schema, 0, &mut { LONGEST_INSTANCE });
        while !node.is_null() {
            assert_eq!(node["v"], 0, "{node}");
            node = &node["next"];
        }
    }

    #[test]
    fn a_tree_ends_in_leaves() {
        let tree = json!({"anyOf": [{"type": "object", "properties": {"left": {"$ref": "#"}}, "required": ["left"]}, {"type": "integer"}]});
        let mut node = &instance(&tree, &tree, 0, &mut { LONGEST_INSTANCE });
        while node.is_object() {
            node = &node["left"];
        }
        assert_eq!(*node, json!(0));
    }

    #[test]
    fn a_schema_without_end_gets_an_end() {
        for schema in [
            json!({"type":"array","minItems":16,"items":{"$ref":"#"}}),
            json!({"properties":{"a":{"$ref":"#"},"b":{"$ref":"#"},"c":{"anyOf":[{"$ref":"#"}]}}}),
            json!({"properties":{"a":{"const":"x".repeat(LONGEST_INSTANCE)},"b":{"type":"number","minimum":vec![0; LONGEST_INSTANCE]}}}),
        ] {
            assert!(instance(&schema, &schema, 0, &mut { LONGEST_INSTANCE }).to_string().len() < 2 * LONGEST_INSTANCE);
        }
    }
}
