//! Mock mode: everything but the LLM is real.

use crate::support::client::{post, streaming};
use crate::support::proxy::{Proxy, Setup};
use crate::support::upstream::{FakeUpstream, answer};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[track_caller]
fn expect_usage(usage: &Value) {
    let count = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("{name} in {usage}"));
    assert!(count("prompt_tokens") > 0 && count("completion_tokens") > 0, "{usage}");
    assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));
}

#[test]
fn the_answer_depends_on_the_question_alone() {
    let (one, other) = (Proxy::start(), Proxy::start());
    for question in ["What is it?", "И что?", "🙂"] {
        let first = one.answer(question);
        for again in [one.answer(question), other.answer(question)] {
            for field in ["answer", "model", "finish_reason", "usage"] {
                assert_eq!(first[field], again[field], "{question}");
            }
        }
    }
    assert_ne!(one.answer("What is it?")["answer"], one.answer("What is this?")["answer"]);
}

#[test]
fn an_answer_is_a_whole_pair_with_usage_and_history() {
    let proxy = Proxy::start();
    let pair = proxy.answer("What is it?");
    assert!(!pair["answer"].as_str().unwrap().is_empty());
    assert!(!pair["model"].as_str().unwrap().is_empty());
    assert_eq!(pair["finish_reason"], "stop");
    expect_usage(&pair["usage"]);
    assert_eq!(proxy.history(), [pair]);
}

#[test]
fn the_stream_is_the_same_answer_word_by_word() {
    let proxy = Proxy::start();
    let question = "Tell me a story of several words, please!";
    let whole = proxy.answer(question);
    let mut events = proxy.stream(question).events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
    let mut text = String::new();
    let mut pieces = 0;
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["model"], whole["model"]);
        assert!(chunk["id"].is_string() && chunk["created"].is_u64(), "{chunk}");
        let choices = chunk["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), 1, "the usage chunk is not passed on: {chunk}");
        if let Some(content) = choices[0]["delta"]["content"].as_str().filter(|content| !content.is_empty()) {
            assert!(content.split_whitespace().count() <= 1, "word by word: {content:?}");
            text.push_str(content);
            pieces += 1;
        }
    }
    assert_eq!(json!(text), whole["answer"]);
    assert!(pieces > 1, "several words are several events");
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "stop");
    let history = proxy.history();
    assert_eq!(history.len(), 2);
    for field in ["question", "answer", "model", "finish_reason", "usage"] {
        assert_eq!(history[0][field], whole[field], "{field}");
    }
    expect_usage(&history[0]["usage"]);
}

#[test]
fn mock_mode_true_never_asks_the_upstream() {
    let upstream = FakeUpstream::always(answer("not asked"));
    for so_be_it in ["true", "True", "1", "yes", "on"] {
        let proxy = Proxy::facing(&upstream).set("MOCK_MODE", so_be_it).start();
        assert_ne!(proxy.answer("What is it?")["answer"], "not asked");
        proxy.stream("What is it?").events();
        assert_eq!(upstream.connections(), 0);
        assert_eq!(proxy.get("/readyz").json()["mode"], "mock");
    }
}

#[test]
fn the_log_says_the_mode_once_at_start() {
    let told = |mut proxy: Proxy, word: &str| {
        proxy.answer("What is it?");
        let log = proxy.whole_log();
        log.iter().filter(|line| line.to_lowercase().contains(word) && !line.contains("/api/ask")).count()
    };
    assert_eq!(told(Proxy::start(), "mock"), 1);
    let upstream = FakeUpstream::always(answer("Yes"));
    let live = Proxy::facing(&upstream).start();
    assert_eq!(live.get("/readyz").json()["mode"], "upstream");
    assert_eq!(told(live, "mock mode"), 0);
}

#[test]
fn the_delay_is_waited() {
    let proxy = Setup::new().set("MOCK_DELAY_MS", "400").start();
    for request in [post("/api/ask", &json!({"question": "Well?"})), streaming("Well?")] {
        let started = Instant::now();
        assert_eq!(proxy.call(&request).status, 200);
        assert!(started.elapsed() >= Duration::from_millis(400));
    }
    for pair in proxy.history() {
        assert!(pair["latency_ms"].as_u64().is_some_and(|latency| latency >= 400), "{pair}");
    }
}

/// As a real one that is slow.
#[test]
fn a_delay_has_the_time_of_a_call() {
    let proxy = Setup::new().set("MOCK_DELAY_MS", "600000").set("UPSTREAM_TIMEOUT_SECS", "1").start();
    for request in [post("/api/ask", &json!({"question": "Well?"})), streaming("Well?")] {
        proxy.call(&request).expect_error(503, "upstream_timeout");
    }
}

#[test]
fn the_checks_are_those_of_the_real_one() {
    let proxy = Proxy::start();
    for path in ["/api/ask", "/api/streaming"] {
        proxy.call(&post(path, &json!({"question": " "}))).expect_error(422, "invalid_request");
        let full = json!({"question": "a", "model": "m", "system": "s", "temperature": 1, "max_tokens": 5});
        assert_eq!(proxy.call(&post(path, &full)).status, 200);
    }
}
