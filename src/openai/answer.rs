//! What an answer of the upstream says, whole or in the chunks of a stream. Knows nothing of questions.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::errors::{BROKEN_OFF, NoAnswer, no_error};
use super::tool_calls::{Function, ToolCall, ToolCalls};
use super::{from_json, text_of};
use crate::config::MAX_ANSWER;
use crate::exchange::Usage;
use crate::json::{Few, Wish, Words, object};

/// What a whole answer says.
#[derive(Debug, PartialEq)]
pub struct Completion {
    pub answer: String,
    pub model: Option<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
}

/// Reads the body of a 200. Errs when it is no answer: not JSON, without choices, or an `error` in place
/// of one.
pub fn parse_completion(body: &[u8]) -> Result<Completion, NoAnswer> {
    let answer: Answer =
        from_json(body).map_err(|e| NoAnswer::other("its answer is not a chat completion (check OPENAI_BASE_URL)", e))?;
    answer.no_error("it answered with an error", body)?;
    let mut choices = answer.choices.map_or_else(Vec::new, |Few(choices)| choices);
    if choices.is_empty() {
        return Err("its answer has no choices".to_string().into());
    }
    let choice = choices.swap_remove(choices.iter().position(Choice::is_first).unwrap_or(0));
    no_error("it answered with an error", choice.error)?;
    let message = choice.message.ok_or_else(|| "its answer's first choice has no message".to_string())?;
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

/// Errs where a body is no JSON object, as every list and model is, or an error.
pub fn check_models(body: &[u8]) -> Result<(), NoAnswer> {
    let answer: Answer = from_json(body).map_err(|e| NoAnswer::other("it answered with something else than models", e))?;
    answer.no_error("it answered with an error", body)
}

/// The model of this name out of the answer to `GET /models`, in its own bytes.
pub fn model_of_list(body: &[u8], name: &str) -> Option<Vec<u8>> {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Model<'a> {
        #[serde(borrow)]
        id: Cow<'a, str>,
    }
    let List { data } = from_json(body).ok()?;
    let is_meant = |model: &&RawValue| from_json::<Model>(model.get().as_bytes()).is_ok_and(|model| model.id == name);
    data.into_iter().find(is_meant).map(|model| model.get().as_bytes().to_vec())
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
    /// It has a usage, counted or not.
    pub has_usage: bool,
    /// Without one it is a frame around the answer: the usage, what a filter says, or nothing we know.
    pub has_choice: bool,
}

/// An empty finish reason is none: some servers send it in every chunk.
fn reason(given: Option<Words>) -> Option<Cow<str>> {
    given.map(|Words(reason)| reason).filter(|reason| !reason.is_empty())
}

/// Reads the data of one event that is not `[DONE]`. Errs when it is an error or no chunk.
pub fn parse_chunk(data: &[u8]) -> Result<Chunk<'_>, NoAnswer> {
    let answer: Answer = from_json(data).map_err(|e| NoAnswer::other("an event of its stream is not a chunk", e))?;
    answer.no_error(BROKEN_OFF, data)?;
    let (has_usage, usage) = (answer.usage.is_some(), usage(answer.usage));
    let mut chunk = Chunk { model: answer.model.map(|Words(model)| model), usage, has_usage, ..Chunk::default() };
    let choices = answer.choices.map_or_else(Vec::new, |Few(choices)| choices);
    chunk.has_choice = !choices.is_empty();
    for choice in choices {
        if let Some(index) = choice.index.filter(|index| *index > 0.0) {
            chunk.others.push((index as u64, reason(choice.finish_reason).is_some()));
            continue;
        }
        no_error(BROKEN_OFF, choice.error)?;
        if let Some(delta) = choice.delta {
            chunk.delta += delta.text();
            delta.calls(&mut chunk.tool_calls);
        }
        chunk.finish_reason = reason(choice.finish_reason).or(chunk.finish_reason);
    }
    Ok(chunk)
}

#[derive(Default)]
struct Answer<'a> {
    model: Option<Words<'a>>,
    choices: Option<Few<Choice<'a>>>,
    usage: Option<Counts>,
    error: Option<&'a RawValue>,
    object: Option<&'a RawValue>,
    message: Option<&'a RawValue>,
    code: Option<&'a RawValue>,
}

object!(Answer<'de> { choices, error, object, message, code } wishes { model, usage });

impl Answer<'_> {
    /// Errs where it is an error or has one, by what `json` says; `what` its sender did.
    fn no_error(&self, what: &str, json: &[u8]) -> Result<(), NoAnswer> {
        no_error(what, self.error)?;
        // Other forms of it, without a frame: vLLM's, llama.cpp's.
        let says_so = self.object.is_some_and(|object| object.get() == "\"error\"");
        let says_why = self.message.is_some_and(|message| message.get().starts_with('"')) && self.code.is_some_and(is_failure);
        if self.choices.is_none() && (says_so || says_why) { Err(NoAnswer::error(what, json)) } else { Ok(()) }
    }
}

/// A code as HTTP has them for failures: others, such as 0 or 200, say that all is well.
fn is_failure(code: &RawValue) -> bool {
    code.get().parse().is_ok_and(|code: u16| code >= 400)
}

#[derive(Default)]
struct Choice<'a> {
    /// Whole, but some servers have only one kind of number.
    index: Option<f64>,
    message: Option<Said<'a>>,
    delta: Option<Said<'a>>,
    finish_reason: Option<Words<'a>>,
    /// OpenRouter's, of a provider that failed.
    error: Option<&'a RawValue>,
}

object!(Choice<'de> { message, delta, error } wishes { index, finish_reason });

impl Choice<'_> {
    fn is_first(&self) -> bool {
        self.index.is_none_or(|index| index == 0.0)
    }
}

#[derive(Default)]
struct Said<'a> {
    content: Option<&'a RawValue>,
    refusal: Option<&'a RawValue>,
    audio: Option<Audio<'a>>,
    tool_calls: Option<Few<Wish<ToolCall>>>,
    /// How a single call looked before there were tools.
    function_call: Option<Box<Function<'a>>>,
}

object!(Said<'de> { content, refusal } wishes { audio, tool_calls, function_call });

/// What a model says with a voice.
#[derive(Default)]
struct Audio<'a> {
    transcript: Option<&'a RawValue>,
}

object!(Audio<'de> { transcript } wishes {});

impl<'a> Said<'a> {
    /// Adds its calls, or pieces of calls, as they are.
    fn calls(self, all: &mut ToolCalls) {
        all.take(self.tool_calls, self.function_call);
    }

    /// The text of what a model says, which may come in parts anywhere; of what it speaks, that which it tells of it.
    fn text(&self) -> Cow<'a, str> {
        let text = |said: Option<&'a RawValue>| said.map(|said| text_of(said.get(), "")).filter(|text| !text.is_empty());
        let spoken = || text(self.audio.as_ref()?.transcript);
        text(self.content).or_else(|| text(self.refusal)).or_else(spoken).unwrap_or_default()
    }
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

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::json::MOST_PARTS;

    #[test]
    fn what_is_not_utf8_is_no_json_also_where_nobody_reads_it() {
        let chunk = b"{\"id\":\"\xff\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}";
        assert!(parse_chunk(chunk).is_err_and(|no| no.words.contains("utf-8")));
        assert!(parse_chunk(&chunk.map(|b| if b == 0xff { b'x' } else { b })).is_ok());
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
            (r#"{"object":"error","message":"Overloaded","code":503}"#, "with an error Overloaded"),
            (r#"{"choices":[{}]}"#, "no message"),
            (r#"{"error":{"code":502,"message":"Provider down"}}"#, "Provider down"),
        ] {
            let e = parse_completion(body.as_bytes()).expect_err("no answer");
            assert!(format!("{} {}", e.why, e.words).contains(why), "{e:?}");
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
    fn chunks_of_all_kinds() {
        let chunk = parse_chunk(
            br#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null},{"index":1,"delta":{"content":"b"}}]}"#,
        );
        assert_eq!(chunk.expect("a chunk").delta, "a");
        let chunk = parse_chunk(br#"{"choices":[{"index":0.0,"delta":{"content":"a"}},{"index":1.0,"delta":{"content":"b"}}]}"#);
        let chunk = chunk.expect("a chunk");
        assert_eq!((&*chunk.delta, chunk.others), ("a", vec![(1, false)]));
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
        assert!(e.words.contains("slow down") && e.passing);
        let e = parse_chunk(br#"{"object":"error","message":"out of memory","type":"InternalServerError","code":500}"#);
        let e = e.expect_err("an error");
        assert!(e.words.contains("out of memory") && e.passing);
    }
}
