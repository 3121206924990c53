//! The LLM that is not there: answers any chat request deterministically, in OpenAI's shape. Pure: the
//! waiting is the upstream's.

use serde_json::{Value, json};

/// Characters of a question that the answer repeats.
const REPEATED: usize = 500;

/// The body of a 200 for the chat request `request`, and the same answer as the data of stream
/// events, word by word, the usage chunk last.
pub fn completion(request: &[u8]) -> String {
    let Said { answer, model, usage, id } = say(request);
    json!({
        "id": id, "object": "chat.completion", "created": 0, "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        "usage": usage,
    })
    .to_string()
}

/// The same answer as the data of a stream's events, word by word; the usage comes last.
pub fn chunks(request: &[u8]) -> Vec<String> {
    let Said { answer, model, usage, id } = say(request);
    let chunk = |choices: Value, usage: &Value| {
        json!({"id": id, "object": "chat.completion.chunk", "created": 0, "model": model,
               "choices": choices, "usage": usage})
        .to_string()
    };
    let delta = |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "finish_reason": reason}]);
    let mut chunks = vec![chunk(delta(json!({"role": "assistant", "content": ""}), Value::Null), &Value::Null)];
    for word in answer.split_inclusive(' ') {
        chunks.push(chunk(delta(json!({"content": word}), Value::Null), &Value::Null));
    }
    chunks.push(chunk(delta(json!({}), json!("stop")), &Value::Null));
    chunks.push(chunk(json!([]), &usage));
    chunks
}

struct Said {
    answer: String,
    model: String,
    usage: Value,
    id: String,
}

fn say(request: &[u8]) -> Said {
    let request: Value = serde_json::from_slice(request).unwrap_or_default();
    let empty = Vec::new();
    let messages = request["messages"].as_array().unwrap_or(&empty);
    let question = messages.last().and_then(|m| m["content"].as_str()).unwrap_or_default();
    let repeated: String = question.chars().take(REPEATED).collect();
    let answer = format!("This is a mock answer to: {repeated}");
    let count = |text: &str| text.split_whitespace().count().max(1);
    let prompt: usize = messages.iter().map(|m| count(m["content"].as_str().unwrap_or_default())).sum();
    let completion = count(&answer);
    // FNV-1a: the same question always has the same id.
    let hash = question.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Said {
        answer,
        model: request["model"].as_str().unwrap_or("mock").to_string(),
        usage: json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}),
        id: format!("chatcmpl-mock-{hash:016x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::{parse_chunk, parse_completion};

    #[test]
    fn the_stream_says_what_the_whole_answer_says() {
        let request = r#"{"model":"m","messages":[{"role":"user","content":"Привет, 🦀\u0000 world"}]}"#.as_bytes();
        let whole = parse_completion(completion(request).as_bytes()).expect("an answer");
        let chunks: Vec<_> = chunks(request).iter().map(|c| parse_chunk(c.as_bytes()).expect("a chunk")).collect();
        let streamed: String = chunks.iter().map(|c| c.delta.as_str()).collect();
        assert_eq!(streamed, whole.answer);
        assert!(streamed.ends_with("Привет, 🦀\0 world"));
        assert_eq!(chunks.last().and_then(|c| c.usage), whole.usage);
    }
}
