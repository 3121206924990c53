//! `POST /api/ask`: what the upstream is sent, and what the client gets.

use crate::support::client::{get, post, post_bytes};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, UPSTREAM_KEY};
use crate::support::upstream::{FakeUpstream, Step, answer, completion, reply_json, streamed};
use serde_json::{Value, json};

/// `2026-11-22T21:34:00.123Z`
fn is_rfc3339_millis(text: &str) -> bool {
    let shape = "dddd-dd-ddTdd:dd:dd.dddZ";
    let fits = |(expected, byte): (u8, u8)| match expected {
        b'd' => byte.is_ascii_digit(),
        _ => byte == expected,
    };
    text.len() == shape.len() && shape.bytes().zip(text.bytes()).all(fits)
}

#[test]
fn the_answer_has_the_shape_of_the_contract() {
    let upstream = FakeUpstream::always(answer("Paris"));
    let proxy = Proxy::facing(&upstream).start();
    let response = proxy.ask("What is the capital of France?");
    assert_eq!(response.status, 200);
    assert_eq!(response.header("Content-Type").map(|kind| kind.starts_with("application/json")), Some(true));
    let pair = response.json();
    let mut fields: Vec<&str> = pair.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    let expected = ["answer", "created_at", "finish_reason", "id", "latency_ms", "model", "question", "usage"];
    assert_eq!(fields, expected);
    assert_eq!(pair["question"], "What is the capital of France?");
    assert_eq!(pair["answer"], "Paris");
    assert_eq!(pair["model"], "fake-model-1");
    assert_eq!(pair["finish_reason"], "stop");
    assert_eq!(pair["usage"], json!({"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}));
    assert!(pair["id"].as_i64().is_some_and(|id| id > 0), "{pair}");
    assert!(pair["latency_ms"].is_u64(), "{pair}");
    assert!(pair["created_at"].as_str().is_some_and(is_rfc3339_millis), "{pair}");
}

#[test]
fn usage_is_null_where_the_model_gave_none() {
    let mut said = completion("Paris");
    said.as_object_mut().unwrap().remove("usage");
    let upstream = FakeUpstream::always(reply_json(200, &said));
    let proxy = Proxy::facing(&upstream).start();
    let pair = proxy.answer("Where?");
    assert!(pair.as_object().unwrap().contains_key("usage"), "{pair}");
    assert_eq!(pair["usage"], Value::Null);
    assert_eq!(proxy.history(), [pair]);
}

#[test]
fn the_finish_reason_is_the_upstreams_own() {
    let mut said = completion("Paris is");
    said["choices"][0]["finish_reason"] = json!("length");
    let upstream = FakeUpstream::always(reply_json(200, &said));
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(proxy.answer("Where?")["finish_reason"], "length");
}

#[test]
fn the_upstream_is_sent_what_openai_expects() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).start();
    proxy.answer("Is it so?");
    let sent = upstream.requests().remove(0);
    assert_eq!((sent.method.as_str(), sent.target.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(sent.header("Authorization"), Some(format!("Bearer {UPSTREAM_KEY}").as_str()));
    assert_eq!(sent.header("Content-Type").map(|kind| kind.starts_with("application/json")), Some(true));
    assert_eq!(sent.header("Accept-Encoding"), Some("identity"), "nothing is unpacked here");
    assert!(sent.header("User-Agent").is_some_and(|agent| agent.starts_with("ai-proxy/")));
    let body = sent.json();
    assert_eq!(body["model"], "gpt-4o-mini");
    assert_eq!(body["messages"], json!([{"role": "user", "content": "Is it so?"}]));
    assert_ne!(body["stream"], true);
    for absent in ["temperature", "max_tokens", "question", "system"] {
        assert!(body.get(absent).is_none(), "{absent} was not asked for: {body}");
    }
}

#[test]
fn every_field_of_the_question_reaches_the_upstream_on_both_endpoints() {
    let upstream = FakeUpstream::answering(|request| match request.is_streaming() {
        true => streamed(&["Yes"]),
        false => answer("Yes"),
    });
    let proxy = Proxy::facing(&upstream).start();
    let body = json!({"question": "Is it so?", "model": "other-model", "system": "Answer in one word.",
        "temperature": 0.25, "max_tokens": 64});
    for path in ["/api/ask", "/api/streaming"] {
        assert_eq!(proxy.call(&post(path, &body)).status, 200);
        let sent = upstream.requests().pop().unwrap().json();
        assert_eq!(sent["model"], "other-model");
        assert_eq!(sent["temperature"], 0.25);
        assert_eq!(sent["max_tokens"], 64);
        let expected = json!([{"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Is it so?"}]);
        assert_eq!(sent["messages"], expected);
        assert_eq!(sent["stream"] == json!(true), path == "/api/streaming");
        assert_eq!(sent["stream_options"]["include_usage"] == json!(true), path == "/api/streaming");
    }
}

#[test]
fn the_settings_give_the_model_and_the_system_prompt_and_the_question_overrides_them() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let setup = Proxy::facing(&upstream);
    let proxy = setup.set("OPENAI_MODEL", "house-model").set("SYSTEM_PROMPT", "Be brief.").start();
    proxy.answer("One?");
    proxy.call(&post("/api/ask", &json!({"question": "Two?", "system": "Be long.", "model": "mine"})));
    let sent: Vec<Value> = upstream.requests().iter().map(|request| request.json()).collect();
    assert_eq!(sent[0]["model"], "house-model");
    assert_eq!(sent[0]["messages"][0], json!({"role": "system", "content": "Be brief."}));
    assert_eq!(sent[1]["model"], "mine");
    assert_eq!(sent[1]["messages"][0], json!({"role": "system", "content": "Be long."}));
    assert_eq!(sent[1]["messages"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_base_url_may_end_in_a_slash() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let url = format!("{}/", upstream.url());
    let proxy = Proxy::facing(&upstream).set("OPENAI_BASE_URL", url).start();
    proxy.answer("Well?");
    assert_eq!(upstream.requests()[0].target, "/v1/chat/completions");
}

#[test]
fn the_limits_themselves_are_allowed() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).set("MAX_QUESTION_CHARS", "3").start();
    for body in [
        json!({"question": "👩🦰!"}),
        json!({"question": "a", "temperature": 0}),
        json!({"question": "a", "temperature": 2}),
        json!({"question": "a", "max_tokens": 1}),
        json!({"question": " a "}),
    ] {
        let response = proxy.call(&post("/api/ask", &body));
        assert_eq!(response.status, 200, "{body} {response:?}");
    }
    assert_eq!(upstream.requests().last().unwrap().question(), " a ", "the question is not trimmed");
}

#[test]
fn connections_to_the_upstream_are_reused() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for number in 0..5 {
        proxy.answer(&format!("Question {number}?"));
    }
    assert_eq!((upstream.calls(), upstream.connections()), (5, 1));
}

#[test]
fn a_connection_that_the_upstream_has_closed_costs_no_error() {
    let mut closing = answer("Yes");
    closing.push(Step::Close);
    let upstream = FakeUpstream::always(closing);
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for number in 0..5 {
        proxy.answer(&format!("Question {number}?"));
        upstream.wait_until_closed(number + 1);
    }
    assert_eq!(upstream.calls(), 5);
}

#[test]
fn one_client_connection_serves_many_requests() {
    let proxy = Proxy::start();
    let mut connection = proxy.connect();
    for number in 0..3 {
        let question = json!({"question": format!("Question {number}?")});
        assert_eq!(connection.exchange(&post("/api/ask", &question)).status, 200);
        connection.exchange(&post("/api/ask", &json!({}))).expect_error(422, "invalid_request");
        assert_eq!(connection.exchange(&get("/livez")).status, 200);
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let proxy = Proxy::start();
    let mut connection = proxy.connect();
    // In one write: what arrives while the one before is read may end the connection.
    let question = |number| post("/api/ask", &json!({"question": format!("Question {number}?")})).bytes();
    connection.send_bytes((0..3).flat_map(question).collect::<Vec<u8>>());
    for number in 0..3 {
        let response = connection.read_response();
        assert_eq!(response.json()["question"], format!("Question {number}?"));
    }
}

#[test]
fn a_chunked_question_and_one_without_content_type_are_taken() {
    let proxy = Proxy::start();
    let chunked = post_bytes("/api/ask", "5\r\n{\"que\r\nc\r\nstion\":\"Ok?\"\r\n1\r\n}\r\n0\r\n\r\n")
        .without("Content-Length")
        .header("Transfer-Encoding", "chunked");
    let mut connection = proxy.connect();
    for _ in 0..2 {
        connection.send(&chunked);
        let response = connection.read_response();
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(response.json()["question"], "Ok?");
    }
    // Both in one write: what follows a chunked body is the next request.
    connection.send_bytes([chunked.bytes(), chunked.bytes()].concat());
    for _ in 0..2 {
        assert_eq!(connection.read_response().json()["question"], "Ok?");
    }
    let untyped = post("/api/ask", &json!({"question": "Ok?"})).without("Content-Type");
    assert_eq!(proxy.call(&untyped).status, 200);
}

#[test]
fn a_client_that_waits_for_100_continue_is_told_to_go_on() {
    let proxy = Proxy::start();
    let body = json!({"question": "Ok?"}).to_string();
    let length = body.len().to_string();
    let head = post_bytes("/api/ask", "").header("Content-Length", &length).header("Expect", "100-continue");
    let mut connection = proxy.connect();
    connection.send(&head);
    assert_eq!(connection.read_response().status, 100);
    connection.send_bytes(body);
    assert_eq!(connection.read_response().status, 200);
}

#[test]
fn an_http_1_0_client_gets_its_answer() {
    let proxy = Proxy::start();
    let request = post("/api/ask", &json!({"question": "Ok?"})).version_1_0();
    let response = proxy.call(&request);
    assert_eq!(response.status, 200);
    assert_eq!(response.header("Transfer-Encoding"), None);
    assert_eq!(response.json()["question"], "Ok?");
    assert_eq!(response.header("Connection"), Some("close"));
}

/// As `ab -k` asks.
#[test]
fn an_http_1_0_client_that_wants_to_keep_its_connection_may() {
    let proxy = Proxy::start();
    let mut connection = proxy.connect();
    let request = post("/api/ask", &json!({"question": "Ok?"})).version_1_0().header("Connection", "Keep-Alive");
    for _ in 0..3 {
        let response = connection.exchange(&request);
        assert_eq!((response.status, response.header("Connection")), (200, Some("keep-alive")));
    }
    assert_eq!(connection.exchange(&request.without("Connection")).header("Connection"), Some("close"));
    assert!(connection.is_closed_by_server());
}

#[test]
fn as_many_calls_run_at_once_as_there_are_workers() {
    let gate = Gate::new();
    let mut steps = vec![Step::Wait(gate.clone())];
    steps.extend(answer("Yes"));
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).set("WORKERS", "3").set("QUEUE_SIZE", "10").start();
    std::thread::scope(|scope| {
        for number in 0..5 {
            let proxy = &proxy;
            scope.spawn(move || proxy.answer(&format!("Question {number}?")));
        }
        upstream.wait_for_calls(3);
        assert_eq!(upstream.calls(), 3, "the others wait in the queue");
        gate.open();
    });
    assert_eq!(upstream.calls(), 5);
}
