//! `/v1`: any OpenAI client goes on working. What it sends reaches the upstream, what it is sent is the upstream's.

use crate::support::client::{Connection, Head, Request, Response, expect_error_object, get, post, post_bytes, streaming};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, UPSTREAM_KEY};
use crate::support::upstream::{
    FakeUpstream, Received, RefusingPort, Step, answer, choice_that_failed, completion, delta, end, event, finish, piece,
    refusal, reply, reply_json, send, stream_head, streamed, usage,
};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const CHAT: &str = "/v1/chat/completions";

/// A chat request with one question; `more` stands beside it.
fn chat(more: Value) -> Request {
    post(CHAT, &chat_body(more))
}

fn chat_body(more: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "What is it?"}]});
    body.as_object_mut().unwrap().extend(more.as_object().expect("fields").clone());
    body
}

fn chat_stream() -> Request {
    chat(json!({"stream": true}))
}

/// The events of a whole stream that must succeed, without its `[DONE]`.
#[track_caller]
fn events_of(proxy: &Proxy, request: &Request) -> Vec<String> {
    let mut stream = proxy.connect().stream(request);
    assert_eq!(stream.head.status, 200, "{:?}", stream.head);
    let mut events = stream.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{events:?}");
    events
}

fn values_of<'a>(head: &'a Head, name: &str) -> Vec<&'a str> {
    let named = head.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.as_str()).collect()
}

/// A whole stream whose events have this data.
fn stream_of(events: &[&str]) -> Vec<Step> {
    let mut steps = vec![stream_head()];
    steps.extend(events.iter().map(|data| event(data)));
    steps.extend([event("[DONE]"), end()]);
    steps
}

fn either(request: &Received, text: &str) -> Vec<Step> {
    if request.is_streaming() { streamed(&[text]) } else { answer(text) }
}

// What goes to the upstream

#[test]
fn the_body_reaches_the_upstream_byte_for_byte() {
    let body = concat!(
        "\r\n{ \"seed\" : 1.50, \"temperature\":2e-1,\t\"n\": 1,\n \"model\":\"gpt\\u002d4o\",",
        r#""messages":[{"role":"system","content":"caf\u00e9 é 🙂 \/"},{"role":"user","content":[{"type":"text","text":"Look"},"#,
        r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}],"#,
        r#""tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"response_format":{"type":"json_object"},"#,
        r#""logprobs":true,"twice":1,"twice":2,"next_year":{"a":[null,1.0,-0]},"user":"" }  "#,
    );
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(proxy.call(&post_bytes(CHAT, body)).status, 200);
    let sent = upstream.requests().remove(0);
    assert_eq!(String::from_utf8_lossy(&sent.body), body);
    assert_eq!((sent.method.as_str(), sent.target.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(sent.header("Content-Type"), Some("application/json"));
}

#[test]
fn the_upstream_gets_the_servers_key_and_not_the_clients() {
    let upstream = FakeUpstream::answering(|request| match request.method.as_str() {
        "GET" => reply_json(200, &json!({"object": "list", "data": []})),
        _ => either(request, "Yes"),
    });
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1").start();
    for request in [chat(json!({})), chat_stream(), get("/v1/models")] {
        assert_eq!(proxy.call(&request.key("secret1")).status, 200);
    }
    for sent in upstream.requests() {
        assert_eq!(sent.header("Authorization"), Some(format!("Bearer {UPSTREAM_KEY}").as_str()));
        assert!(!format!("{sent:?}").contains("secret1"), "{sent:?}");
    }
}

#[test]
fn a_missing_model_is_openai_model_and_all_else_stays_as_it_is() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).set("OPENAI_MODEL", "the-default").start();
    let rest = r#""messages":[ {"role":"user","content":"caf\u00e9"} ],"seed":1.50"#;
    for body in [format!("{{{rest}}}"), format!(r#"{{"model":null,{rest}}}"#), format!(r#"{{{rest},"model":" "}}"#)] {
        assert_eq!(proxy.call(&post_bytes(CHAT, body.clone())).status, 200, "{body}");
        let sent = upstream.requests().pop().unwrap();
        assert_eq!(sent.json()["model"], "the-default", "{body}");
        let text = String::from_utf8_lossy(&sent.body).into_owned();
        assert!(text.contains(rest), "the other fields keep their bytes: {text}");
        assert_eq!(text.matches("\"model\"").count(), 1, "{text}");
    }
}

#[test]
fn the_usage_of_a_stream_is_always_asked_for() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    for options in [json!({}), json!({"stream_options": null}), json!({"stream_options": {"include_usage": false}})] {
        let mut body = chat_body(options);
        body["stream"] = json!(true);
        events_of(&proxy, &post(CHAT, &body));
        assert_eq!(upstream.requests().pop().unwrap().json()["stream_options"]["include_usage"], true, "{body}");
    }
    let whole = FakeUpstream::always(answer("Yes"));
    Proxy::facing(&whole).start().call(&chat(json!({})));
    assert!(whole.requests()[0].json().get("stream_options").is_none(), "a whole answer brings it anyway");
}

#[test]
fn a_stream_that_asks_for_usage_itself_is_passed_on_byte_for_byte() {
    let body = r#"{ "stream" : true, "stream_options":{ "include_usage":true,"x":1.0 }, "model":"m","messages":[{"role":"user","content":"a"}] }"#;
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &post_bytes(CHAT, body));
    assert_eq!(String::from_utf8_lossy(&upstream.requests()[0].body), body);
}

#[test]
fn other_stream_options_stay_beside_ours() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &chat(json!({"stream": true, "stream_options": {"include_obfuscation": false}})));
    let sent = upstream.requests()[0].json();
    assert_eq!(sent["stream_options"], json!({"include_obfuscation": false, "include_usage": true}));
}

#[test]
fn a_server_that_refuses_stream_options_is_asked_again_without() {
    let upstream = FakeUpstream::answering(|request| match request.json().get("stream_options") {
        Some(_) => refusal(400, &format!("{}Unrecognized request argument supplied: stream_options", "Oh. ".repeat(500))),
        None => streamed(&["Yes"]),
    });
    let proxy = Proxy::facing(&upstream).start();
    let body = r#"{"stream":true,"seed":1.50,"model":"m","messages":[{"role":"user","content":"What is it?"}]}"#;
    assert_eq!(events_of(&proxy, &post_bytes(CHAT, body)), [delta("Yes"), finish("stop")]);
    assert_eq!(upstream.calls(), 2);
    assert_eq!(String::from_utf8_lossy(&upstream.requests()[1].body), body, "as the client sent it");
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["usage"]), (&json!("Yes"), &Value::Null));
    // The endpoint with a shape of its own copes as well.
    proxy.stream("What is it?").events();
    assert_eq!(proxy.newest_of(2)["answer"], "Yes");
}

#[test]
fn a_server_may_name_the_refused_stream_options_beside_its_words() {
    let refused = json!({"error": {"message": "Unknown parameter", "param": "stream_options", "code": "unknown_parameter"}});
    let upstream = FakeUpstream::answering(move |request| match request.json().get("stream_options") {
        Some(_) => reply_json(400, &refused),
        None => streamed(&["Yes"]),
    });
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(proxy.call(&chat_stream()).status, 200);
    assert_eq!(upstream.calls(), 2);
}

/// As applications look for it: which field is at fault, and that no waiting helps (`insufficient_quota`).
#[test]
fn an_error_keeps_the_upstreams_param_and_its_word_for_no_quota() {
    let error = |kind: &str, param: Value| json!({"error": {"message": "No.", "type": kind, "param": param, "code": kind}});
    for (status, said, kind, param) in [
        (400, error("invalid_request_error", json!("messages")), "invalid_request_error", json!("messages")),
        (400, error("invalid_request_error", Value::Null), "invalid_request_error", Value::Null),
        (401, error("invalid_request_error", json!("key")), "server_error", Value::Null),
        (429, error("insufficient_quota", Value::Null), "insufficient_quota", Value::Null),
        (429, error("requests", Value::Null), "rate_limit_error", Value::Null),
    ] {
        let upstream = FakeUpstream::always(reply_json(status, &said));
        let proxy = Proxy::facing(&upstream).start();
        for request in [chat(json!({})), chat_stream(), post("/api/ask", &json!({"question": "Well?"}))] {
            let error = &proxy.call(&request).json()["error"];
            assert_eq!((&error["type"], &error["param"]), (&json!(kind), &param), "{said}");
        }
    }
}

#[test]
fn what_the_client_wanted_of_a_stream_stays_where_ours_is_refused() {
    let upstream = FakeUpstream::answering(|request| match request.json()["stream_options"].get("include_usage") {
        Some(_) => refusal(400, "unknown field stream_options.include_usage"),
        None => streamed(&["Yes"]),
    });
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &chat(json!({"stream": true, "stream_options": {"include_obfuscation": false}})));
    assert_eq!(upstream.requests()[1].json()["stream_options"], json!({"include_obfuscation": false}));
}

#[test]
fn stream_options_that_are_the_clients_own_are_not_taken_away() {
    let upstream = FakeUpstream::always(refusal(400, "unknown field stream_options"));
    let proxy = Proxy::facing(&upstream).start();
    let request = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    proxy.call(&request).expect_error(400, "upstream_rejected");
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_rejection_for_another_reason_is_not_asked_again() {
    let upstream = FakeUpstream::always(refusal(400, "the prompt is too long"));
    let proxy = Proxy::facing(&upstream).start();
    proxy.call(&chat_stream()).expect_error(400, "upstream_rejected");
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn openrouter_is_told_the_site_where_it_is_set() {
    let upstream = FakeUpstream::answering(|request| match request.method.as_str() {
        "GET" => reply_json(200, &json!({"object": "list", "data": []})),
        _ => either(request, "Yes"),
    });
    let named =
        Proxy::facing(&upstream).set("OPENROUTER_REFERER", "https://example.org").set("OPENROUTER_TITLE", "My Site").start();
    let ask = post("/api/ask", &json!({"question": "What is it?"}));
    for request in [chat(json!({})), chat_stream(), ask, streaming("What is it?"), get("/v1/models")] {
        assert_eq!(named.call(&request).status, 200);
    }
    for sent in upstream.requests() {
        assert_eq!(sent.header("HTTP-Referer"), Some("https://example.org"), "{sent:?}");
        assert_eq!(sent.header("X-OpenRouter-Title"), Some("My Site"), "{sent:?}");
    }
    let before = upstream.calls();
    let client = chat(json!({})).header("HTTP-Referer", "https://client.example");
    Proxy::facing(&upstream).start().call(&client);
    let sent = upstream.requests().remove(before);
    assert_eq!((sent.header("HTTP-Referer"), sent.header("X-OpenRouter-Title")), (None, None));
}

#[test]
fn a_site_that_cannot_stand_in_a_header_is_refused_at_start() {
    for name in ["OPENROUTER_REFERER", "OPENROUTER_TITLE"] {
        let ended = Proxy::with(&[(name, "Сайт")]).run(&[]);
        assert!(ended.expect_refusal(2).contains(name));
    }
}

// What comes back

#[test]
fn the_answer_reaches_the_client_byte_for_byte() {
    let said = concat!(
        " {\"id\" : \"x\",\r\n\"created\":1.0e9,\"model\":\"fake-model-1\",\"twice\":1,\"twice\":2,",
        r#""choices":[{"index":0,"message":{"role":"assistant","content":"caf\u00e9 é 🙂 \/ \u0000"},"logprobs":{"content":[]},"finish_reason":"stop"}],"#,
        r#""usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"cost":0.00015},"provider":"X","next_year":[1.50]}"#,
        "\n"
    );
    let upstream = FakeUpstream::always(reply(200, &[("Content-Type", "application/json; charset=utf-8")], said));
    let proxy = Proxy::facing(&upstream).start();
    let response = proxy.call(&chat(json!({})));
    assert_eq!(response.status, 200);
    assert_eq!(String::from_utf8_lossy(&response.body), said);
    assert!(response.header("Content-Type").is_some_and(|kind| kind.starts_with("application/json")));
    assert_eq!(proxy.newest_of(1)["answer"], "café é 🙂 / \0");
}

#[test]
fn the_events_of_a_stream_reach_the_client_byte_for_byte_and_one_by_one() {
    let gates: [Gate; 3] = Gate::several();
    let events = [
        r#"{ "choices" : [ {"delta":{"content":"caf\u00e9 "},"index":0} ],"x":1.50,"x":2e0 }"#.to_owned(),
        r#"{"choices":[{"index":1,"delta":{"content":"other"}},{"index":0,"delta":{"content":"🙂","new":[]}}]}  "#.to_owned(),
        finish("length"),
    ];
    let mut steps = vec![stream_head()];
    for (gate, data) in gates.iter().zip(&events) {
        steps.extend([Step::Wait(gate.clone()), event(data)]);
    }
    steps.extend([event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    gates[0].open();
    let mut stream = proxy.connect().stream(&chat_stream());
    assert_eq!(stream.head.status, 200);
    assert_eq!(stream.head.header("Content-Type"), Some("text/event-stream; charset=utf-8"));
    stream.expect_event(&events[0]);
    for (gate, data) in gates.iter().zip(&events).skip(1) {
        gate.open();
        stream.expect_event(data);
    }
    assert_eq!(stream.events(), ["[DONE]"]);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("café 🙂"), &json!("length")));
    assert_eq!(pair["question"], "What is it?");
}

#[test]
fn the_usage_chunk_reaches_only_who_asked_for_it() {
    // Also where nothing was counted.
    let empty = r#"{"choices":[],"usage":{}}"#;
    let upstream = FakeUpstream::always(stream_of(&[&delta("Yes"), &finish("stop"), empty]));
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(proxy.connect().stream(&chat_stream()).events(), [delta("Yes"), finish("stop"), "[DONE]".to_owned()]);
    let upstream = FakeUpstream::always(stream_of(&[&delta("Yes"), &finish("stop"), &usage()]));
    let proxy = Proxy::facing(&upstream).start();
    let without = [delta("Yes"), finish("stop")];
    let with = [delta("Yes"), finish("stop"), usage()];
    assert_eq!(events_of(&proxy, &chat_stream()), without);
    for (asked, expected) in [(true, &with[..]), (false, &without[..])] {
        let request = chat(json!({"stream": true, "stream_options": {"include_usage": asked}}));
        assert_eq!(events_of(&proxy, &request), expected);
    }
    let counted = json!({"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17});
    proxy.newest_of(3);
    assert!(proxy.history().iter().all(|pair| pair["usage"] == counted), "history has it every time");
}

#[test]
fn the_upstreams_own_headers_are_passed_on() {
    let theirs = [
        ("x-request-id", "req_upstream-1"),
        ("openai-processing-ms", "412"),
        ("x-ratelimit-limit-requests", "5000"),
        ("x-ratelimit-remaining-tokens", "159976"),
        ("x-ratelimit-reset-tokens", "1m9s"),
        ("openai-organization", "org-secret"),
        ("Set-Cookie", "__cf_bm=secret"),
    ];
    let body = completion("Yes").to_string();
    let mut head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n".to_owned();
    theirs.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    let streamed = [vec![Step::Send(format!("{head}\r\n").into_bytes())], streamed(&["Yes"])[1..].to_vec()].concat();
    // Some doubled, as proxies on the way do it.
    let whole = reply(200, &[&theirs[..], &theirs[..3]].concat(), &body);
    let upstream = FakeUpstream::answering(move |request| {
        if request.method == "POST" && request.is_streaming() { streamed.clone() } else { whole.clone() }
    });
    let proxy = Proxy::facing(&upstream).start();
    for request in [chat(json!({})), chat_stream(), get("/v1/models")] {
        let response = proxy.call(&request);
        assert_eq!(response.status, 200);
        for (name, value) in &theirs[..5] {
            assert_eq!(values_of(&response.head, name), [*value], "{response:?}");
        }
        for (name, _) in &theirs[5..] {
            assert_eq!(response.header(name), None, "nobody's business: {response:?}");
        }
    }
}

/// An id stands in the log, too, where blanks end a field.
#[test]
fn header_fields_of_the_upstream_that_are_odd_are_not_passed_on() {
    let long = "1".repeat(65);
    for (name, value) in [("x-request-id", "one code=-"), ("x-ratelimit-limit-requests", &long), ("openai-processing-ms", &long)]
    {
        let upstream = FakeUpstream::always(reply(200, &[(name, value)], &completion("Yes").to_string()));
        let response = Proxy::facing(&upstream).start().call(&chat(json!({})));
        assert_eq!(response.status, 200);
        assert_ne!(response.header(name), Some(value));
    }
}

/// Some set many and long cookies.
#[test]
fn a_large_head_of_the_upstream_is_read_over() {
    let cookies = ["a", "b", "c"].map(|name| ("Set-Cookie", format!("{name}={}", "x".repeat(15_000))));
    let fields: Vec<(&str, &str)> = cookies.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let upstream = FakeUpstream::always(reply(200, &fields, &completion("Yes").to_string()));
    let response = Proxy::facing(&upstream).start().call(&chat(json!({})));
    assert_eq!((response.status, response.header("Set-Cookie")), (200, None), "{response:?}");
}

#[test]
fn the_headers_of_a_refusal_are_passed_on_too() {
    let theirs = [
        ("Retry-After", "7"),
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "0"),
        ("X-Secret", "s"),
        ("X-Request-Id", "req_up"),
    ];
    let upstream = FakeUpstream::always(reply(429, &theirs, r#"{"error":{"message":"slow down"}}"#));
    let proxy = Proxy::facing(&upstream).start();
    for request in [chat(json!({})), chat_stream()] {
        let response = proxy.call(&request);
        let error = response.expect_error(429, "upstream_rate_limited");
        assert!(error["message"].as_str().unwrap().contains("slow down"), "{error}");
        for (name, value) in &theirs[..3] {
            assert_eq!(values_of(&response.head, name), [*value], "{response:?}");
        }
        assert_eq!(response.header("X-Secret"), None);
    }
}

#[test]
fn a_request_id_of_the_clients_own_is_not_replaced_by_the_upstreams() {
    let upstream = FakeUpstream::answering(|request| {
        let body = if request.is_streaming() { streamed(&["Yes"]) } else { answer("Yes") };
        let Some(Step::Send(head)) = body.first() else { panic!("a head comes first") };
        let head = String::from_utf8_lossy(head).replacen("\r\n", "\r\nx-request-id: req_up\r\n", 1);
        [vec![send(head)], body[1..].to_vec()].concat()
    });
    let proxy = Proxy::facing(&upstream).start();
    for (request, own) in [(chat(json!({})), "mine-1"), (chat_stream(), "mine-2")] {
        let response = proxy.call(&request.header("X-Request-Id", own));
        assert_eq!(values_of(&response.head, "X-Request-Id"), [own], "{response:?}");
        proxy.wait_for_line(|line| line.contains(&format!("id={own} ")));
    }
}

#[test]
fn a_request_id_of_the_clients_own_comes_back_where_the_upstream_has_none() {
    let upstream = FakeUpstream::answering(|request| either(request, "Yes"));
    let proxy = Proxy::facing(&upstream).start();
    for request in [chat(json!({})), chat_stream(), get("/v1/models/nothing").method("PUT")] {
        let response = proxy.call(&request.header("X-Request-Id", "mine-1"));
        assert_eq!(values_of(&response.head, "X-Request-Id"), ["mine-1"], "{response:?}");
    }
}

// What the client is told about trying again

/// The `x-should-retry` of an answer to this script.
#[track_caller]
fn should_retry(retries: &str, calls: Vec<Vec<Step>>, request: &Request) -> (u16, Vec<String>, usize) {
    let upstream = FakeUpstream::script(calls);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", retries).start();
    let response = proxy.call(request);
    let told = values_of(&response.head, "x-should-retry").into_iter().map(str::to_owned).collect();
    (response.status, told, upstream.calls())
}

const NEVER: &str = "false";

#[test]
fn where_a_retry_is_pointless_the_client_is_told() {
    let quota = json!({"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "param": null,
        "code": "insufficient_quota"}});
    for request in [chat(json!({})), chat_stream()] {
        let quota = reply_json(429, &quota);
        assert_eq!(should_retry("2", vec![quota], &request), (429, vec![NEVER.into()], 1), "no waiting fills an account");
        for (status, ours) in [(400, 400), (413, 400), (422, 400), (401, 502), (402, 502), (403, 502), (404, 502), (451, 502)] {
            let said = should_retry("2", vec![refusal(status, "no")], &request);
            assert_eq!(said, (ours, vec![NEVER.into()], 1), "{status} is final");
        }
    }
    // As vLLM says in a stream what it refuses, and OpenRouter anywhere.
    for (request, field) in [(chat(json!({})), ""), (chat_stream(), "data: ")] {
        for (code, told) in [(400, vec![NEVER.into()]), (502, vec![])] {
            let error = json!({"error": {"message": "Grammar error", "type": "BadRequestError", "param": null, "code": code}});
            let said = should_retry("2", vec![reply(200, &[], &format!("{field}{error}\n\n"))], &request);
            assert_eq!(said, (502, told, 1), "{code} in a 200");
        }
    }
}

#[test]
fn where_a_retry_may_help_the_client_is_not_held_back() {
    for (status, ours) in [(408, 503), (409, 502), (429, 429), (500, 502), (503, 503)] {
        let said = should_retry("0", vec![refusal(status, "not now")], &chat(json!({})));
        assert_eq!(said, (ours, vec![], 1), "{status}");
    }
    assert!(Proxy::start().call(&chat(json!({}))).header("x-should-retry").is_none());
}

#[test]
fn what_we_have_retried_ourselves_the_client_need_not_multiply() {
    for request in [chat(json!({})), chat_stream()] {
        let said = should_retry("1", vec![refusal(500, "no"), refusal(500, "no")], &request);
        assert_eq!(said, (502, vec![NEVER.into()], 2));
        let said = should_retry("1", vec![refusal(429, "no"), refusal(429, "no")], &request);
        assert_eq!(said, (429, vec![NEVER.into()], 2));
        // What was asked but once may be asked again.
        let said = should_retry("0", vec![refusal(429, "no")], &request);
        assert_eq!(said, (429, vec![], 1));
    }
}

#[test]
fn what_was_retried_for_one_question_is_nothing_to_the_next() {
    let calls = vec![refusal(500, "no"), answer("Yes"), reply(429, &[("Retry-After", "3600")], "")];
    let upstream = FakeUpstream::script(calls);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").set("WORKERS", "1").start();
    assert_eq!(proxy.call(&chat(json!({}))).status, 200);
    let response = proxy.call(&chat(json!({})));
    assert_eq!((response.status, response.header("x-should-retry")), (429, None), "it was asked but once");
}

#[test]
fn nor_where_the_last_of_our_attempts_failed_in_another_way() {
    let broken = json!({"error": {"message": "no", "code": 402}});
    for request in [chat(json!({})), chat_stream()] {
        let said = should_retry("2", vec![refusal(500, "no"), refusal(500, "no"), reply_json(200, &broken)], &request);
        assert_eq!(said, (502, vec![NEVER.into()], 3));
        let upstream = FakeUpstream::answering(|request| match request.json()["model"] == "good" {
            true => reply_json(200, &json!({"error": {"message": "no", "code": 402}})),
            false => refusal(500, "no"),
        });
        let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good");
        let proxy = setup.set("UPSTREAM_RETRIES", "1").start();
        let response = proxy.call(&request);
        assert_eq!(values_of(&response.head, "x-should-retry"), [NEVER], "{response:?}");
        assert_eq!(upstream.calls(), 3);
    }
}

#[test]
fn an_answer_that_took_all_the_time_is_not_to_be_asked_for_again() {
    let begun = send("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{");
    let upstream = FakeUpstream::always(vec![begun, Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1").start();
    for request in [chat(json!({})), chat_stream()] {
        let response = proxy.call(&request);
        assert_eq!((response.status, values_of(&response.head, "x-should-retry")), (503, vec![NEVER]));
    }
}

#[test]
fn it_is_said_once_only() {
    // A client that finds `false, false` there takes it for no word at all.
    for status in [400, 402, 404] {
        let (_, told, calls) = should_retry("1", vec![refusal(500, "not now"), refusal(status, "no")], &chat(json!({})));
        assert_eq!((told, calls), (vec![NEVER.to_owned()], 2), "500, then {status}");
    }
}

// What history keeps

/// The pair that this request and this answer make.
#[track_caller]
fn pair_of(request: Value, said: Value) -> Value {
    let upstream = FakeUpstream::always(reply_json(200, &said));
    let proxy = Proxy::facing(&upstream).start();
    let response = proxy.call(&post(CHAT, &request));
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.json(), said);
    proxy.newest_of(1)
}

fn said(message: Value, reason: &str) -> Value {
    let mut said = completion("");
    said["choices"][0] = json!({"index": 0, "message": message, "finish_reason": reason});
    said
}

#[test]
fn the_question_is_the_last_user_message_with_its_texts_joined() {
    let user = |content: Value| json!({"role": "user", "content": content});
    let cases = [
        (json!([user(json!("One?"))]), "One?"),
        (
            json!([{"role": "system", "content": "S"}, user(json!("One?")), {"role": "assistant", "content": "A"}, user(json!("Two?"))]),
            "Two?",
        ),
        (
            json!([user(json!("Call it!")), {"role": "assistant", "content": null, "tool_calls": []}, {"role": "tool", "tool_call_id": "c", "content": "42"}]),
            "Call it!",
        ),
        (
            json!([user(
                json!([{"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "this?"}])
            )]),
            "What is this?",
        ),
        (json!([{"role": "system", "content": "Only rules"}]), ""),
        (json!([user(json!("И 🙂 \u{0}?"))]), "И 🙂 \u{0}?"),
    ];
    for (messages, question) in cases {
        let pair = pair_of(json!({"model": "m", "messages": messages}), completion("Yes"));
        assert_eq!(pair["question"], question);
        assert_eq!(pair["answer"], "Yes");
    }
}

#[test]
fn the_answer_is_the_first_choices_content_with_model_usage_and_reason() {
    let mut two = completion("First");
    two["choices"].as_array_mut().unwrap().push(json!({"index": 1, "message": {"role": "assistant", "content": "Second"}}));
    two["choices"][0]["finish_reason"] = json!("length");
    let pair = pair_of(chat_body(json!({"n": 2})), two);
    assert_eq!(pair["answer"], "First");
    assert_eq!((&pair["model"], &pair["finish_reason"]), (&json!("fake-model-1"), &json!("length")));
    assert_eq!(pair["usage"], json!({"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}));
}

#[test]
fn refusals_and_texts_in_parts_are_kept() {
    let refused = said(json!({"role": "assistant", "content": null, "refusal": "I cannot."}), "stop");
    assert_eq!(pair_of(chat_body(json!({})), refused)["answer"], "I cannot.");
    let parts = said(json!({"content": [{"type": "text", "text": "In "}, {"type": "text", "text": "parts"}]}), "stop");
    assert_eq!(pair_of(chat_body(json!({})), parts)["answer"], "In parts");
}

/// The tool calls in an answer of history, with the words before them.
#[track_caller]
fn tool_calls_of(pair: &Value) -> (String, Value) {
    let answer = pair["answer"].as_str().expect("a text");
    let (words, calls) = match answer.rfind('\n') {
        Some(at) => (&answer[..at], &answer[at + 1..]),
        None => ("", answer),
    };
    let calls: Value = serde_json::from_str(calls).unwrap_or_else(|_| panic!("no tool calls in {answer:?}"));
    (words.to_owned(), calls["tool_calls"].clone())
}

#[test]
fn tool_calls_are_kept_so_that_the_row_says_what_happened() {
    let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}});
    let calls = json!([call("call_1", r#"{"city":"Paris"}"#), call("call_2", r#"{"city":"Řím"}"#)]);
    for (content, words) in [(Value::Null, ""), (json!("Let me see."), "Let me see.")] {
        let message = json!({"role": "assistant", "content": content, "tool_calls": calls});
        let pair = pair_of(chat_body(json!({})), said(message, "tool_calls"));
        assert_eq!(pair["finish_reason"], "tool_calls");
        let (kept_words, kept) = tool_calls_of(&pair);
        assert_eq!(kept_words, words);
        assert_eq!(kept[0]["name"], "weather");
        assert_eq!(kept[0]["arguments"], r#"{"city":"Paris"}"#);
        assert_eq!((&kept[1]["id"], &kept[1]["arguments"]), (&json!("call_2"), &json!(r#"{"city":"Řím"}"#)));
    }
}

#[test]
fn calls_of_the_older_and_the_newer_kind_are_kept_as_well() {
    let older = json!({"content": null, "function_call": {"name": "weather", "arguments": r#"{"city":"Paris"}"#}});
    let newer =
        json!({"content": null, "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "weather", "input": "Paris"}}]});
    for message in [older, newer] {
        let pair = pair_of(chat_body(json!({})), said(message, "stop"));
        let answer = pair["answer"].as_str().unwrap();
        assert!(answer.contains("weather") && answer.contains("Paris"), "the row says what happened: {answer:?}");
    }
}

#[test]
fn a_call_that_is_told_in_both_ways_is_one() {
    let function = json!({"name": "weather", "arguments": "{}"});
    let both = json!({"content": null, "function_call": function, "tool_calls": [{"id": "c", "type": "function", "function": function}]});
    let (_, kept) = tool_calls_of(&pair_of(chat_body(json!({})), said(both, "tool_calls")));
    assert_eq!(kept, json!([{"arguments": "{}", "id": "c", "name": "weather"}]));
    let piece = |name: &str, arguments: &str| {
        let function = json!({"name": name, "arguments": arguments});
        let calls = json!([{"index": 0, "id": "c", "type": "function", "function": function}]);
        let delta = json!({"function_call": function, "tool_calls": calls});
        event(&json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}).to_string())
    };
    let steps = vec![stream_head(), piece("weather", "{"), piece("", "}"), event(&finish("tool_calls")), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &chat(json!({"stream": true})));
    assert_eq!(tool_calls_of(&proxy.newest_of(1)).1, kept);
}

fn pieces(calls: Value) -> String {
    let delta = json!({"tool_calls": calls});
    json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]}).to_string()
}

#[test]
fn tool_calls_of_a_stream_come_together_from_their_pieces() {
    let first = |index: u8, id: &str, name: &str| json!([{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]);
    let more = |index: u8, arguments: &str| json!([{"index": index, "function": {"arguments": arguments}}]);
    let events = [
        pieces(first(0, "call_a", "weather")),
        pieces(more(0, "{\"ci")),
        pieces(first(1, "call_b", "time")),
        pieces(more(1, "{\"zone\"")),
        pieces(more(0, "ty\":\"Paris\"}")),
        pieces(more(1, ":\"CET\"}")),
        finish("tool_calls"),
    ];
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    let upstream = FakeUpstream::always(stream_of(&events));
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(events_of(&proxy, &chat_stream()), events);
    let pair = proxy.newest_of(1);
    assert_eq!(pair["finish_reason"], "tool_calls");
    let (words, calls) = tool_calls_of(&pair);
    assert_eq!(words, "");
    assert_eq!(
        calls,
        json!([
            {"id": "call_a", "name": "weather", "arguments": "{\"city\":\"Paris\"}"},
            {"id": "call_b", "name": "time", "arguments": "{\"zone\":\"CET\"}"},
        ])
    );
}

#[test]
fn a_refusal_in_a_stream_is_kept() {
    let refuse = |text: &str| json!({"choices": [{"index": 0, "delta": {"content": null, "refusal": text}}]}).to_string();
    let upstream = FakeUpstream::always(stream_of(&[&refuse("I "), &refuse("cannot."), &finish("stop")]));
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &chat_stream());
    assert_eq!(proxy.newest_of(1)["answer"], "I cannot.");
}

#[test]
fn what_a_model_speaks_is_kept_as_its_transcript() {
    let audio = json!({"id": "a", "data": "AAAA", "expires_at": 1, "transcript": "Hi there"});
    let spoken = said(json!({"role": "assistant", "content": null, "refusal": null, "audio": audio}), "stop");
    assert_eq!(pair_of(chat_body(json!({})), spoken)["answer"], "Hi there");
    let piece = |audio: Value| json!({"choices": [{"index": 0, "delta": {"content": null, "audio": audio}}]}).to_string();
    let [first, second, sound] =
        [json!({"transcript": "Hi"}), json!({"transcript": " there"}), json!({"data": "AAAA"})].map(piece);
    let upstream = FakeUpstream::always(stream_of(&[&first, &second, &sound, &finish("stop")]));
    let proxy = Proxy::facing(&upstream).start();
    events_of(&proxy, &chat_stream());
    assert_eq!(proxy.newest_of(1)["answer"], "Hi there");
}

#[test]
fn each_key_sees_what_it_asked_here() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1,bob:secret2")]).start();
    assert_eq!(proxy.call(&chat(json!({})).key("secret1")).status, 200);
    assert_eq!(proxy.call(&chat_stream().key("secret1")).status, 200);
    let count = |secret: &str| {
        let history = proxy.call(&get("/api/history").key(secret)).json();
        history["items"].as_array().expect("items").len()
    };
    assert_eq!((count("secret1"), count("secret2")), (2, 0));
}

#[test]
fn who_reads_a_200_finds_the_row() {
    let proxy = Proxy::start();
    for number in 1..=5 {
        assert_eq!(proxy.call(&chat(json!({}))).status, 200);
        assert_eq!(proxy.count_rows(), 2 * number - 1);
        events_of(&proxy, &chat_stream());
        assert_eq!(proxy.count_rows(), 2 * number);
    }
}

#[test]
fn twenty_clients_at_once_each_get_their_own_answer() {
    let upstream = FakeUpstream::answering(|request| either(request, &format!("About {}", request.question())));
    let proxy = Proxy::facing(&upstream).start();
    std::thread::scope(|scope| {
        for number in 0..20 {
            let proxy = &proxy;
            scope.spawn(move || {
                let (question, expected) = (format!("number {number}"), format!("About number {number}"));
                let body = json!({"messages": [{"role": "user", "content": question}], "stream": number % 2 == 0});
                let response = proxy.call(&post(CHAT, &body));
                assert!(String::from_utf8_lossy(&response.body).contains(&expected), "{response:?}");
            });
        }
    });
    let pairs = proxy.history();
    assert_eq!(pairs.len(), 20);
    assert!(pairs.iter().all(|pair| pair["answer"] == format!("About {}", pair["question"].as_str().unwrap())));
}

// Failures

#[test]
fn openrouters_error_inside_a_200_is_an_error() {
    let error = json!({"error": {"message": "No credits", "code": 402, "metadata": {"provider_name": "x"}}, "user_id": "u"});
    let upstream = FakeUpstream::always(reply_json(200, &error));
    let proxy = Proxy::facing(&upstream).start();
    for request in [chat(json!({})), chat_stream()] {
        let error = proxy.call(&request).expect_error(502, "upstream_bad_answer");
        assert!(error["message"].as_str().unwrap().contains("No credits"), "{error}");
    }
    assert_eq!(proxy.count_rows(), 0);
}

#[test]
fn openrouters_error_as_the_first_event_is_a_status() {
    let error = json!({"id": "gen-1", "error": {"code": 429, "message": "Slow down"}, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]});
    let steps = vec![stream_head(), piece(": OPENROUTER PROCESSING\n\n"), event(&error.to_string()), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let error = proxy.call(&chat_stream()).expect_error(502, "upstream_bad_answer");
    assert!(error["message"].as_str().unwrap().contains("Slow down"), "{error}");
    assert_eq!(proxy.count_rows(), 0);
}

#[test]
fn openrouters_error_amid_a_stream_ends_it_as_an_error() {
    let error = json!({"id": "gen-1", "error": {"code": "server_error", "message": "Provider disconnected"},
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]});
    let steps = vec![stream_head(), event(&delta("Half")), event(&error.to_string()), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.connect().stream(&chat_stream());
    stream.expect_event(&delta("Half"));
    let error = stream.expect_failure("upstream_error");
    assert!(error["message"].as_str().unwrap().contains("Provider disconnected"), "{error}");
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("Half"), &json!("upstream_error")));
}

#[test]
fn openrouters_usage_and_comments_nobody_asked_for_disturb_nobody() {
    let mut last: Value = serde_json::from_str(&usage()).unwrap();
    last["choices"] = json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]);
    let last = last.to_string();
    let steps = vec![
        stream_head(),
        piece(": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n"),
        event(&delta("Yes")),
        event(&finish("stop")),
        event(&last),
        event("[DONE]"),
        end(),
    ];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(events_of(&proxy, &chat_stream()), [delta("Yes"), finish("stop"), last]);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["finish_reason"], &pair["usage"]["total_tokens"]), (&json!("stop"), &json!(17)));
}

#[test]
fn an_error_inside_a_stream_names_the_request_that_its_head_names() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nx-request-id: req_up\r\n\r\n";
    let upstream = FakeUpstream::always(vec![Step::Send(head.into()), event(&delta("Half")), Step::Close]);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.connect().stream(&chat_stream());
    let named = stream.head.header("X-Request-Id").map(str::to_owned);
    let events = stream.events();
    let last: Value = serde_json::from_str(events.last().expect("an error event")).expect("JSON");
    expect_error_object(&last["error"], "upstream_error");
    assert_eq!(last["error"]["request_id"].as_str(), named.as_deref());
}

#[test]
fn a_client_that_leaves_ends_the_call() {
    let upstream = FakeUpstream::answering(|request| match request.is_streaming() {
        true => vec![stream_head(), event(&delta("Half")), Step::Silence],
        false => vec![Step::Silence],
    });
    let proxy = Proxy::facing(&upstream).start();
    let mut waiting = proxy.connect();
    waiting.send(&chat(json!({})));
    upstream.wait_for_calls(1);
    drop(waiting);
    upstream.wait_until_left(1);
    let mut stream = proxy.connect().stream(&chat_stream());
    stream.expect_event(&delta("Half"));
    drop(stream);
    upstream.wait_until_left(2);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("Half"), &json!("client_gone")));
}

/// A proxy whose upstream must never be asked.
fn unasked(settings: &[(&str, &str)], check: impl FnOnce(&Proxy)) {
    let upstream = FakeUpstream::always(answer("nobody asked"));
    let proxy = Proxy::with(settings).facing(&upstream).start();
    check(&proxy);
    assert_eq!(upstream.calls(), 0, "no refused request reaches the upstream");
    assert_eq!(proxy.count_rows(), 0, "no refused request is remembered");
}

#[test]
fn a_missing_or_wrong_key_is_401_here_as_elsewhere() {
    unasked(&[("API_KEYS", "alice:secret1")], |proxy| {
        for request in [chat(json!({})), chat_stream(), get("/v1/models"), get("/v1/models/gpt-4o")] {
            for request in [request.clone(), request.key(UPSTREAM_KEY)] {
                let response = proxy.call(&request);
                response.expect_error(401, "unauthorized");
                assert_eq!(response.header("WWW-Authenticate"), Some("Bearer"), "{response:?}");
            }
        }
    });
}

#[test]
fn a_request_that_is_no_chat_is_refused_and_the_field_named() {
    let user = json!([{"role": "user", "content": "a"}]);
    let bad = [
        (json!([]), "body"),
        (json!(["m", user, false, null]), "body"),
        (json!("a"), "body"),
        (json!({}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "a"}), "messages"),
        (json!({"messages": [1]}), "messages"),
        (json!({"messages": [["user", "a"]]}), "messages"),
        (json!({"messages": [{"role": 1, "content": "a"}]}), "messages"),
        (json!({"messages": user, "stream": "yes"}), "stream"),
        (json!({"messages": user, "model": 4}), "model"),
        (json!({"messages": user, "stream_options": {"include_usage": "yes"}}), "stream_options"),
        (json!({"messages": [{"role": "user", "content": "x".repeat(11)}]}), "messages"),
    ];
    unasked(&[("MAX_QUESTION_CHARS", "10")], |proxy| {
        let mut wrong = Vec::new();
        for (body, param) in bad {
            let response = proxy.call(&post(CHAT, &body));
            let error = response.json()["error"].clone();
            if (response.status, &error["code"], &error["param"]) != (422, &json!("invalid_request"), &json!(param)) {
                wrong.push(format!("{body}: {} {error}, where {param} is at fault", response.status));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        for body in [&b""[..], b"{", b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}"] {
            proxy.call(&post_bytes(CHAT, body)).expect_error(400, "invalid_json");
        }
        proxy.call(&chat(json!({})).header("Content-Type", "text/plain")).expect_error(415, "unsupported_media_type");
    });
}

#[test]
fn the_limits_hold_here_as_elsewhere() {
    unasked(&[("MAX_BODY_BYTES", "300")], |proxy| {
        proxy.call(&chat(json!({"user": "u".repeat(300)}))).expect_error(413, "body_too_large");
    });
    let gate = Gate::new();
    let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").set("QUEUE_SIZE", "0").start();
    let mut first = proxy.connect();
    first.send(&chat(json!({})));
    upstream.wait_for_calls(1);
    for request in [chat(json!({})), chat_stream(), get("/v1/models")] {
        proxy.call(&request).expect_error(503, "overloaded");
    }
    gate.open();
    assert_eq!(first.read_response().status, 200);
}

#[test]
fn paths_and_methods_are_exact_here_as_elsewhere() {
    let proxy = Proxy::start();
    for target in [
        "/v1",
        "/v1/",
        "/v1/chat",
        "/v1/chat/completions/",
        "/v1/models/",
        "/v1/models/..",
        "/v1/models/a/../b",
        "/v1/models/..;/admin",
        "/v1/embeddings",
    ] {
        proxy.get(target).expect_error(404, "not_found");
    }
    for target in ["/chat/completions", "/models", "/api/chat/completions"] {
        let error = proxy.call(&post(target, &chat_body(json!({})))).expect_error(404, "not_found");
        assert!(error["message"].as_str().is_some_and(|text| text.contains("below /v1")), "{error}");
    }
    for (request, allow) in
        [(get(CHAT), "POST"), (post("/v1/models", &json!({})), "GET, HEAD"), (post("/v1/models/m", &json!({})), "GET, HEAD")]
    {
        let response = proxy.call(&request);
        response.expect_error(405, "method_not_allowed");
        assert_eq!(response.header("Allow"), Some(allow));
    }
    assert_eq!(proxy.call(&post("/v1/chat/completions?api-version=1", &chat_body(json!({})))).status, 200);
}

#[test]
fn every_failure_of_the_upstream_has_its_mapping_here_too() {
    let upstream = FakeUpstream::answering(|request| match request.question().parse::<u16>() {
        Ok(status) => refusal(status, "their words"),
        Err(_) => reply(200, &[("Content-Type", "application/json")], &request.question()),
    });
    let proxy = Proxy::facing(&upstream).start();
    let cases = [
        ("400", 400, "upstream_rejected"),
        ("401", 502, "upstream_error"),
        ("402", 502, "upstream_error"),
        ("429", 429, "upstream_rate_limited"),
        ("500", 502, "upstream_error"),
        ("503", 503, "upstream_unavailable"),
        ("not json", 502, "upstream_bad_answer"),
        ("{\"choices\":[]}", 502, "upstream_bad_answer"),
    ];
    for (question, status, code) in cases {
        for stream in [false, true] {
            let body = json!({"messages": [{"role": "user", "content": question}], "stream": stream});
            proxy.call(&post(CHAT, &body)).expect_error(status, code);
        }
    }
    assert_eq!(proxy.count_rows(), 0);
}

// Fallback models

/// An upstream whose models `down-*` fail with the status in their name.
fn partly_down() -> FakeUpstream {
    FakeUpstream::answering(|request| {
        let model = request.json()["model"].as_str().expect("a model").to_owned();
        match model.strip_prefix("down-") {
            Some(status) => refusal(status.parse().expect("a status"), &format!("{model} is down")),
            None if request.is_streaming() => stream_of(&[&named(&model, &delta("Yes")), &named(&model, &finish("stop"))]),
            None => {
                let mut said = completion("Yes");
                said["model"] = json!(model);
                reply_json(200, &said)
            }
        }
    })
}

fn named(model: &str, chunk: &str) -> String {
    let mut chunk: Value = serde_json::from_str(chunk).unwrap();
    chunk["model"] = json!(model);
    chunk.to_string()
}

fn models_asked(upstream: &FakeUpstream) -> Vec<String> {
    upstream.requests().iter().map(|request| request.json()["model"].as_str().unwrap().to_owned()).collect()
}

/// All four ways to ask a model.
fn all_ways(model: &str) -> [Request; 4] {
    let question = json!({"question": "What is it?", "model": model});
    [
        chat(json!({"model": model})),
        chat(json!({"model": model, "stream": true})),
        post("/api/ask", &question),
        post("/api/streaming", &question),
    ]
}

#[test]
fn fallback_models_are_tried_in_order_and_who_spoke_is_said() {
    for status in [404, 408, 429, 500, 502, 503, 529] {
        let down = format!("down-{status}");
        let upstream = partly_down();
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "down-501, good ,never").start();
        for request in all_ways(&down) {
            let response = proxy.call(&request);
            assert_eq!(response.status, 200, "after {status}: {response:?}");
            assert!(String::from_utf8_lossy(&response.body).contains("\"good\""), "the answer says who: {response:?}");
        }
        let expected: Vec<&str> = [down.as_str(), "down-501", "good"].repeat(4);
        assert_eq!(models_asked(&upstream), expected);
        proxy.newest_of(4);
        assert!(proxy.history().iter().all(|pair| pair["model"] == "good"), "history says who");
        assert!(proxy.get("/metrics").everything().contains("ai_proxy_upstream_fallbacks_total 8\n"));
    }
}

#[test]
fn the_fallback_gets_the_same_body_but_for_the_model() {
    let upstream = partly_down();
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
    let rest = r#""seed":1.50,"messages":[ {"role":"user","content":"caf\u00e9"} ],"x":{"model":"down-500"}"#;
    assert_eq!(proxy.call(&post_bytes(CHAT, format!(r#"{{"model":"down-500",{rest}}}"#))).status, 200);
    let body = upstream.requests()[1].body.clone();
    let body = String::from_utf8(body).unwrap();
    assert!(body.contains(rest), "{body}");
    assert!(body.contains(r#""model":"good""#), "{body}");
}

#[test]
fn a_fallback_whose_answer_names_no_model_is_named_all_the_same() {
    for no_name in [None, Some(Value::Null), Some(json!(""))] {
        let mut unnamed = completion("Yes");
        let mut nameless = json!({"choices": [{"index": 0, "delta": {"content": "Yes"}, "finish_reason": "stop"}]});
        for told in [&mut unnamed, &mut nameless] {
            let told = told.as_object_mut().unwrap();
            told.remove("model");
            told.extend(no_name.iter().map(|name| ("model".to_owned(), name.clone())));
        }
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            false => refusal(500, "down"),
            true if request.is_streaming() => stream_of(&[&nameless.to_string()]),
            true => reply_json(200, &unnamed),
        });
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        for request in all_ways("bad") {
            assert_eq!(proxy.call(&request).status, 200);
        }
        proxy.newest_of(4);
        let models: Vec<Value> = proxy.history().iter().map(|pair| pair["model"].clone()).collect();
        assert_eq!(models, vec![json!("good"); 4]);
    }
}

#[test]
fn what_another_model_would_not_mend_is_not_asked_of_it() {
    for status in [400, 401, 402, 403, 413, 422] {
        let upstream = partly_down();
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        let down = format!("down-{status}");
        for request in all_ways(&down) {
            assert!(matches!(proxy.call(&request).status, 400 | 502));
        }
        assert_eq!(models_asked(&upstream), vec![down; 4]);
    }
}

#[test]
fn where_all_models_fail_the_last_failure_is_told() {
    let upstream = partly_down();
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "down-404,down-503").start();
    for request in all_ways("down-500") {
        let error = proxy.call(&request).expect_error(503, "upstream_unavailable");
        assert!(error["message"].as_str().unwrap().contains("down-503 is down"), "{error}");
    }
    assert_eq!(proxy.count_rows(), 0);
}

#[test]
fn no_model_is_asked_twice_in_vain() {
    for (fallbacks, asked) in [
        ("down-500,good", vec!["down-500", "good"]),
        ("down-503,down-500,good", vec!["down-500", "down-503", "good"]),
        ("down-503,down-503,good", vec!["down-500", "down-503", "good"]),
    ] {
        let upstream = partly_down();
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", fallbacks).start();
        assert_eq!(proxy.call(&chat(json!({"model": "down-500"}))).status, 200);
        assert_eq!(models_asked(&upstream), asked, "{fallbacks}");
    }
}

#[test]
fn each_model_has_its_retries_before_the_next_is_tried() {
    let upstream = partly_down();
    let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "down-404,good");
    let proxy = setup.set("UPSTREAM_RETRIES", "1").start();
    assert_eq!(proxy.call(&chat(json!({"model": "down-500"}))).status, 200);
    assert_eq!(models_asked(&upstream), ["down-500", "down-500", "down-404", "good"], "a 404 is not tried again");
}

#[test]
fn a_fallback_is_tried_where_the_upstream_closes_without_a_word() {
    let upstream = FakeUpstream::answering(|request| match request.json()["model"] == "good" {
        true => either(request, "Yes"),
        false => vec![Step::Close],
    });
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
    for request in all_ways("bad") {
        assert_eq!(proxy.call(&request).status, 200);
    }
}

#[test]
fn a_stream_that_has_begun_is_not_taken_over_by_another_model() {
    let passing = json!({"error": {"code": 503, "message": "No provider available"}}).to_string();
    for broken_off in [Step::Close, event(&passing)] {
        // Its event has gone out before it breaks off.
        let gate = Gate::new();
        let half = [stream_head(), event(&delta("Half")), Step::Wait(gate.clone()), broken_off];
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => streamed(&["Yes"]),
            false => half.to_vec(),
        });
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        let mut stream = proxy.connect().stream(&chat(json!({"model": "bad", "stream": true})));
        stream.expect_event(&delta("Half"));
        gate.open();
        stream.expect_failure("upstream_error");
        assert_eq!(upstream.calls(), 1);
    }
}

#[test]
fn an_error_of_a_retryable_kind_inside_a_200_is_worth_a_fallback_too() {
    let codes =
        [json!(503), json!(404), json!("503"), json!("server_error"), json!("rate_limit_exceeded")].map(|code| (code, ""));
    let types = ["server_error", "rate_limit_error", "overloaded_error"].map(|kind| (Value::Null, kind));
    let told = [&codes[..], &types].concat();
    for (streams_it, (code, kind)) in [true, false].iter().flat_map(|way| told.iter().map(|told| (*way, told))) {
        let error = json!({"error": {"code": code, "message": "No provider available", "type": kind}});
        let first_event = error.to_string();
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => either(request, "Yes"),
            false if request.is_streaming() && streams_it => stream_of(&[&first_event]),
            false => reply_json(200, &error),
        });
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        for request in all_ways("bad") {
            let response = proxy.call(&request);
            assert_eq!(response.status, 200, "nothing had reached the client: {response:?}");
        }
    }
}

#[test]
fn an_error_inside_a_choice_is_an_error() {
    for streams_it in [true, false] {
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => either(request, "Yes"),
            false if request.is_streaming() && streams_it => stream_of(&[&choice_that_failed(502).to_string()]),
            false => reply_json(200, &choice_that_failed(502)),
        });
        for (fallback, status) in [("good", 200), ("", 502)] {
            let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", fallback).start();
            for request in all_ways("bad") {
                let response = proxy.call(&request);
                assert_eq!(response.status, status, "{response:?}");
            }
            let counted = r#"ai_proxy_upstream_errors_total{code="upstream_bad_answer"}"#;
            let failed = if status == 200 { "0" } else { "4" };
            let metrics = String::from_utf8_lossy(&proxy.get("/metrics").body).into_owned();
            assert!(metrics.contains(&format!("{counted} {failed}\n")), "who was answered did not fail: {metrics}");
        }
    }
}

#[test]
fn what_fails_when_the_time_is_over_is_told_as_it_is() {
    let upstream = FakeUpstream::answering(|_| {
        let error = event(r#"{"error":{"code":429,"message":"Overrun"}}"#);
        vec![stream_head(), Step::Pause(Duration::from_millis(1200)), error, end()]
    });
    let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good");
    let proxy = setup.set("UPSTREAM_TIMEOUT_SECS", "1").start();
    let error = proxy.call(&chat_stream()).expect_error(502, "upstream_bad_answer");
    assert!(error["message"].as_str().unwrap().contains("Overrun"), "{error}");
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_stream_without_any_choice_is_no_answer() {
    for data in ["{}", r#"{"message":"boom"}"#, r#"{"message":"ok","code":200}"#, r#"{"choices":[]}"#] {
        let upstream = FakeUpstream::always(stream_of(&[data]));
        let proxy = Proxy::facing(&upstream).start();
        let mut stream = proxy.connect().stream(&chat_stream());
        stream.expect_event(data);
        stream.expect_failure("upstream_error");
    }
}

/// Neither what it counted nor why it ended: another one answers.
#[test]
fn what_a_model_said_that_failed_is_not_booked_to_its_fallback() {
    let counted = r#"{"choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":1000,"total_tokens":2000}}"#;
    let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
        true => streamed(&["Yes"]),
        false => stream_of(&[counted, r#"{"error":{"code":503,"message":"Gone"}}"#]),
    });
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
    let question = json!({"question": "What is it?", "model": "bad"});
    assert_eq!(proxy.call(&post("/api/streaming", &question)).status, 200);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["usage"], &pair["finish_reason"]), (&json!("Yes"), &Value::Null, &json!("stop")));
}

/// A heartbeat is nothing of an answer.
#[test]
fn a_fallback_is_tried_after_heartbeats_too() {
    for failure in [reply(500, &[], "no"), stream_of(&[r#"{"error":{"code":503,"message":"Gone"}}"#])] {
        let gate = Gate::new();
        let (late, open) = (gate.clone(), failure);
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => streamed(&["Yes"]),
            false => [vec![Step::Wait(late.clone())], open.clone()].concat(),
        });
        let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good");
        let proxy = setup.set("STREAM_HEARTBEAT_SECS", "1").start();
        let mut stream = proxy.connect().stream(&chat(json!({"model": "bad", "stream": true})));
        stream.expect_heartbeat();
        gate.open();
        assert_eq!(stream.events(), [delta("Yes"), finish("stop"), "[DONE]".to_owned()]);
    }
}

#[test]
fn an_error_inside_a_200_that_stays_is_worth_no_fallback() {
    for code in [json!(400), json!("content_policy_violation")] {
        let error = json!({"error": {"code": code, "message": "No such voice", "type": "invalid_request_error"}});
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => either(request, "Yes"),
            false => reply_json(200, &error),
        });
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        for request in all_ways("bad") {
            proxy.call(&request).expect_error(502, "upstream_bad_answer");
        }
        assert_eq!(upstream.calls(), 4);
    }
}

#[test]
fn the_head_of_a_stream_is_that_of_the_model_that_answered() {
    let started = |fields: &str| send(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{fields}\r\n"));
    for (theirs, own) in [("", "mine"), ("", ""), ("X-Request-Id: good-1\r\nX-RateLimit-Limit-Requests: 7\r\n", "")] {
        let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
            true => vec![started(theirs), send(format!("data: {}\n\ndata: [DONE]\n\n", finish("stop"))), Step::Close],
            false => vec![
                started("X-Request-Id: bad-1\r\nX-RateLimit-Remaining-Tokens: 0\r\nOpenAI-Processing-Ms: 3\r\n"),
                send("data: {\"error\":{\"code\":503,\"message\":\"down\"}}\n\n"),
                Step::Close,
            ],
        });
        let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
        let mut request = chat(json!({"model": "bad", "stream": true}));
        if !own.is_empty() {
            request = request.header("X-Request-Id", own);
        }
        let response = proxy.call(&request);
        assert_eq!(response.status, 200, "{response:?}");
        let id = response.header("X-Request-Id").expect("an id").to_owned();
        match (theirs, own) {
            ("", "") => assert_ne!(id, "bad-1", "then it is the server's own"),
            (_, "") => assert_eq!((id.as_str(), response.header("X-RateLimit-Limit-Requests")), ("good-1", Some("7"))),
            (_, own) => assert_eq!(id, own),
        }
        assert!(response.header("X-RateLimit-Remaining-Tokens").is_none(), "{response:?}");
        assert!(response.header("OpenAI-Processing-Ms").is_none(), "{response:?}");
        proxy.wait_for_line(|line| line.contains(&format!("id={id} ")));
    }
}

#[test]
fn fallbacks_serve_servers_without_stream_options_too() {
    let upstream = FakeUpstream::answering(|request| {
        let body = request.json();
        match (body["model"] == "good", body.get("stream_options")) {
            (false, _) => refusal(500, "down"),
            (true, Some(_)) => refusal(400, "stream_options is not permitted"),
            (true, None) => streamed(&["Yes"]),
        }
    });
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
    assert_eq!(events_of(&proxy, &chat(json!({"model": "bad", "stream": true}))), [delta("Yes"), finish("stop")]);
}

// Models

#[test]
fn the_models_are_the_upstreams_own_byte_for_byte() {
    let list = "{ \"object\":\"list\",\"data\":[{\"id\":\"gpt-4o\",\"created\":1.0e9,\"pricing\":{\"prompt\":\"0.10\"}}] }\n";
    let one = "{\"id\" : \"gpt-4o\", \"next_year\":[1.50]}";
    let upstream = FakeUpstream::answering(move |request| {
        let body = if request.target.ends_with("/models") { list } else { one };
        reply(200, &[("Content-Type", "application/json")], body)
    });
    let proxy = Proxy::facing(&upstream).start();
    let ids = [
        "gpt-4o",
        "ft:gpt-4o-mini:acme::7p4lURel",
        "openai/gpt-4o:free",
        "openai%2Fgpt-4o",
        "ft%3Agpt",
        "a%20b%C3%A8",
        "@cf/meta/llama-3.1-8b",
        "a_b~c",
    ];
    assert_eq!(String::from_utf8_lossy(&proxy.get("/v1/models").body), list);
    for id in ids {
        let response = proxy.get(&format!("/v1/models/{id}"));
        assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (200, one), "{id}");
    }
    let targets: Vec<String> = upstream.requests().into_iter().map(|request| request.target).collect();
    let expected = std::iter::once("/v1/models".to_owned()).chain(ids.map(|id| format!("/v1/models/{id}")));
    assert_eq!(targets, expected.collect::<Vec<_>>());
    assert!(upstream.requests().iter().all(|request| request.method == "GET" && request.body.is_empty()));
    assert_eq!(proxy.count_rows(), 0);
    let head = proxy.connect().exchange(&get("/v1/models").method("HEAD"));
    assert_eq!((head.status, head.header("Content-Length")), (200, Some(list.len().to_string().as_str())));
}

#[test]
fn failures_at_the_models_are_those_of_the_table() {
    for (status, ours, code) in [
        (404, 404, "not_found"),
        (401, 502, "upstream_error"),
        (429, 429, "upstream_rate_limited"),
        (500, 502, "upstream_error"),
        (503, 503, "upstream_unavailable"),
    ] {
        let upstream = FakeUpstream::always(refusal(status, "no"));
        let proxy = Proxy::facing(&upstream).start();
        proxy.get("/v1/models/gpt-4o").expect_error(ours, code);
        // Where the list is looked into.
        let upstream = FakeUpstream::answering(move |request| match request.target.as_str() {
            "/v1/models" => refusal(status, "no"),
            _ => refusal(404, "File Not Found"),
        });
        Proxy::facing(&upstream).start().get("/v1/models/own").expect_error(ours, code);
    }
    // Some servers have the list alone.
    let upstream = FakeUpstream::answering(|request| match request.target.as_str() {
        "/v1/models" => reply_json(
            200,
            &json!({"object": "list", "data": [{"id": "other"}, {"id": "own/model", "size": 1.50}, {"id": "/data/own.gguf"}]}),
        ),
        _ => refusal(404, "File Not Found"),
    });
    let mut proxy = Proxy::facing(&upstream).start();
    let response = proxy.get("/v1/models/own%2Fmodel");
    assert_eq!((response.status, response.json()), (200, json!({"id": "own/model", "size": 1.50})));
    // As the SDKs write a name that is a path.
    assert_eq!(proxy.get("/v1/models/%2Fdata%2Fown.gguf").json(), json!({"id": "/data/own.gguf"}));
    proxy.get("/v1/models/own").expect_error(404, "not_found");
    proxy.expect_no_line(|line| line.contains("[WARN]"));
    // Who has no list has no list: the address may be wrong.
    let upstream = FakeUpstream::always(refusal(404, "no"));
    Proxy::facing(&upstream).start().get("/v1/models").expect_error(502, "upstream_error");
    let nobody = RefusingPort::new();
    let setup = Proxy::with(&[("OPENAI_API_KEY", UPSTREAM_KEY), ("UPSTREAM_RETRIES", "0")]);
    let proxy = setup.set("OPENAI_BASE_URL", nobody.url()).start();
    proxy.get("/v1/models").expect_error(503, "upstream_unavailable");
}

#[test]
fn a_list_of_models_that_is_none_is_502_upstream_bad_answer() {
    for (said, words) in [
        ("<html>Login</html>", "something else than models"),
        ("", "something else than models"),
        ("[]", "something else than models"),
        (r#"{"error":{"message":"no credits","code":402}}"#, "no credits"),
        (r#"{"object":"error","message":"no credits","code":402}"#, "no credits"),
    ] {
        let upstream = FakeUpstream::always(reply(200, &[("Content-Type", "text/html")], said));
        let proxy = Proxy::facing(&upstream).start();
        for target in ["/v1/models", "/v1/models/gpt-4o"] {
            let error = proxy.get(target).expect_error(502, "upstream_bad_answer");
            assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{error}");
        }
    }
}

// Mock mode

fn mocked(settings: &[(&str, &str)]) -> Proxy {
    Proxy::with(settings).start()
}

#[test]
fn the_mock_lists_its_models() {
    let proxy = mocked(&[("OPENAI_MODEL", "main/one"), ("OPENAI_FALLBACK_MODELS", "two,main/one")]);
    let list = proxy.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> = list["data"].as_array().expect("models").iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["main/one", "two"]);
    // Clients encode what they like of a name.
    for (target, id) in [("two", "two"), ("t%77o", "two"), ("main/one", "main/one"), ("main%2Fone", "main/one")] {
        let model = proxy.get(&format!("/v1/models/{target}"));
        assert_eq!(model.status, 200, "{model:?}");
        let model = model.json();
        assert_eq!((&model["id"], &model["object"]), (&json!(id), &json!("model")));
        assert!(model["created"].is_u64() && model["owned_by"].is_string(), "{model}");
    }
    proxy.get("/v1/models/three").expect_error(404, "not_found");
}

/// One choice in full shape; gives its message.
#[track_caller]
fn expect_completion(response: &Response, reason: &str) -> Value {
    assert_eq!(response.status, 200, "{response:?}");
    let said = response.json();
    assert_eq!(said["object"], "chat.completion");
    assert!(said["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")), "{said}");
    assert!(said["created"].is_u64(), "{said}");
    assert_eq!(said["model"], "m");
    let choices = said["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 1);
    assert_eq!((&choices[0]["index"], &choices[0]["finish_reason"]), (&json!(0), &json!(reason)));
    assert_eq!(choices[0]["message"]["role"], "assistant");
    let count = |name: &str| said["usage"][name].as_u64().expect("a count");
    assert!(count("prompt_tokens") > 0 && count("completion_tokens") > 0);
    assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));
    // Programs read these without a question whether they are there.
    assert_eq!(said["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(said["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    choices[0]["message"].clone()
}

/// The message that the deltas of a stream make up, as an SDK puts it together, with the finish reason.
fn assembled(events: &[String]) -> (Value, Value) {
    let (mut content, mut calls, mut reason) = (None::<String>, Vec::<Value>::new(), Value::Null);
    for event in events {
        let chunk: Value = serde_json::from_str(event).expect("JSON");
        assert_eq!(chunk["object"], "chat.completion.chunk");
        let Some(choice) = chunk["choices"].get(0) else { continue };
        content = choice["delta"]["content"].as_str().map(|more| content.clone().unwrap_or_default() + more).or(content);
        for piece in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = piece["index"].as_u64().expect("an index") as usize;
            if index == calls.len() {
                calls.push(json!({"id": piece["id"], "type": piece["type"], "function": {"name": piece["function"]["name"], "arguments": ""}}));
            }
            let arguments = calls[index]["function"]["arguments"].as_str().unwrap().to_owned();
            calls[index]["function"]["arguments"] =
                json!(arguments + piece["function"]["arguments"].as_str().unwrap_or_default());
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (json!({"content": content, "tool_calls": calls}), reason)
}

/// Asks the mock, whole and as a stream, which must say the same. Gives the message.
#[track_caller]
fn mock_says(proxy: &Proxy, more: Value, reason: &str) -> Value {
    let message = expect_completion(&proxy.call(&chat(more.clone())), reason);
    let mut body = chat_body(more);
    body["stream"] = json!(true);
    let (streamed, streamed_reason) = assembled(&events_of(proxy, &post(CHAT, &body)));
    assert_eq!(streamed["content"], message["content"]);
    assert_eq!(streamed["tool_calls"], message.get("tool_calls").cloned().unwrap_or(json!([])));
    assert_eq!(streamed_reason, reason);
    message
}

/// One that ends is not the answer where another is cut off (`n` above 1).
#[test]
fn a_stream_is_whole_when_all_its_choices_are() {
    let piece = |index: u64, text: &str, reason: Value| {
        event(
            &json!({"object": "chat.completion.chunk", "model": "m",
            "choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}]})
            .to_string(),
        )
    };
    let both = [piece(0, "One", Value::Null), piece(1, "Two", Value::Null)];
    let whole = [piece(1, "", json!("stop")), piece(0, "", json!("stop"))];
    for (ends, is_whole) in [(&whole[..], true), (&whole[1..], false), (&whole[..1], false)] {
        let steps = [&[stream_head()][..], &both, ends, &[end()]].concat();
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        let events = proxy.connect().stream(&chat(json!({"n": 2, "stream": true}))).events();
        assert_eq!(events.last().is_some_and(|event| event == "[DONE]"), is_whole, "{events:?}");
        let reason = if is_whole { "stop" } else { "upstream_error" };
        assert_eq!(proxy.history()[0]["finish_reason"], reason);
    }
}

#[test]
fn the_mock_answers_in_full_shape() {
    let proxy = mocked(&[]);
    let message = mock_says(&proxy, json!({}), "stop");
    assert!(message["content"].as_str().is_some_and(|content| content.contains("What is it?")), "{message}");
    let pairs = proxy.history();
    assert_eq!(pairs.len(), 2);
    assert!(pairs.iter().all(|pair| pair["answer"] == message["content"] && pair["usage"]["total_tokens"].is_u64()));
}

#[test]
fn the_mock_gives_as_many_choices_as_are_asked_for() {
    let proxy = mocked(&[]);
    let whole = proxy.call(&chat(json!({"n": 3}))).json();
    let choices = whole["choices"].as_array().expect("choices");
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    assert!(choices.iter().all(|choice| choice["message"] == choices[0]["message"]));
    let events = events_of(&proxy, &chat(json!({"n": 3, "stream": true})));
    for index in 0..3 {
        let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
        let choices = chunks.filter_map(|chunk| Some(chunk["choices"].get(0)?.clone())).filter(|choice| choice["index"] == index);
        let text: String = choices.filter_map(|choice| Some(choice["delta"]["content"].as_str()?.to_owned())).collect();
        assert_eq!(text, choices_text(&whole), "{index}");
    }
    assert!(proxy.history().iter().all(|pair| pair["answer"] == choices_text(&whole)), "the first one is kept");
}

fn choices_text(whole: &Value) -> String {
    whole["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn the_mock_sends_the_usage_chunk_to_who_asks() {
    let proxy = mocked(&[]);
    let usages = |options: Value| {
        let events = events_of(&proxy, &chat(options));
        let chunks = events.iter().map(|event| serde_json::from_str::<Value>(event).expect("JSON"));
        chunks.filter(|chunk| chunk["choices"] == json!([])).collect::<Vec<_>>()
    };
    assert!(usages(json!({"stream": true})).is_empty());
    let asked = usages(json!({"stream": true, "stream_options": {"include_usage": true}}));
    assert_eq!(asked.len(), 1);
    assert!(asked[0]["usage"]["total_tokens"].as_u64().is_some_and(|total| total > 0), "{asked:?}");
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "days"]
    }}})
}

#[test]
fn the_mock_calls_a_tool_that_is_demanded() {
    let proxy = mocked(&[]);
    let other = json!({"type": "function", "function": {"name": "other"}});
    let tools = json!([other, weather()]);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let message = mock_says(&proxy, json!({"tools": tools, "tool_choice": named}), "tool_calls");
    assert_eq!(message["content"], Value::Null);
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}});
    assert_eq!(mock_says(&proxy, json!({"tools": tools, "tool_choice": allowed}), "tool_calls"), message);
    let calls = message["tool_calls"].as_array().expect("calls");
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0]["type"], &calls[0]["function"]["name"]), (&json!("function"), &json!("weather")));
    assert!(calls[0]["id"].as_str().is_some_and(|id| id.starts_with("call")), "{message}");
    let arguments = calls[0]["function"]["arguments"].as_str().expect("a text");
    let arguments: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(arguments["city"].is_string() && arguments["days"].as_i64().is_some_and(|days| days >= 1), "{arguments}");
    assert_eq!(arguments["unit"], "C");
    let (_, kept) = tool_calls_of(&proxy.history()[0]);
    assert_eq!(kept[0]["name"], "weather");
    let required = mock_says(&proxy, json!({"tools": tools, "tool_choice": "required"}), "tool_calls");
    assert_eq!(required["tool_calls"][0]["function"]["name"], "other", "any one does");
    assert_eq!(required["tool_calls"][0]["function"]["arguments"], "{}");
    for choice in [json!("auto"), json!("none"), Value::Null] {
        let words = mock_says(&proxy, json!({"tools": tools, "tool_choice": choice}), "stop");
        assert!(words["content"].is_string());
    }
    let both = mock_says(&proxy, json!({"tools": tools, "tool_choice": "required"}), "tool_calls");
    assert_eq!(both, required, "the same request has the same answer");
    let two = proxy.call(&chat(json!({"tools": tools, "tool_choice": "required", "n": 2}))).json();
    assert_ne!(two["choices"][0]["message"]["tool_calls"][0]["id"], two["choices"][1]["message"]["tool_calls"][0]["id"]);
}

/// Agents demand a tool at each step, the one that ends their run among them.
#[test]
fn a_conversation_with_the_mock_comes_to_its_last_tool_and_each_turn_has_its_id() {
    let proxy = mocked(&[]);
    let custom = json!({"type": "custom", "custom": {"name": "grammar"}});
    let last = json!({"type": "function", "function": {"name": "final_result"}});
    let mut messages = vec![json!({"role": "user", "content": "Will it rain?"})];
    let (mut names, mut ids) = (Vec::new(), BTreeSet::new());
    let more = json!({"tools": [custom, weather(), last], "tool_choice": "any"});
    for turn in ["", "", "", "And tomorrow?", ""] {
        if !turn.is_empty() {
            messages.push(json!({"role": "user", "content": turn}));
        }
        let mut body = chat_body(more.clone());
        body["messages"] = json!(messages);
        let answer = proxy.call(&post(CHAT, &body)).json();
        let message = answer["choices"][0]["message"].clone();
        let call = &message["tool_calls"][0];
        names.push(call["function"]["name"].as_str().expect("a name").to_owned());
        ids.extend([answer["id"].to_string(), call["id"].to_string()]);
        messages.extend([message.clone(), json!({"role": "tool", "tool_call_id": call["id"], "content": "Yes."})]);
    }
    assert_eq!(names, ["weather", "final_result", "final_result", "weather", "final_result"]);
    assert_eq!(ids.len(), 10, "{ids:?}");
}

#[test]
fn parts_of_a_question_are_kept_as_lines_of_it() {
    let proxy = mocked(&[]);
    let parts = json!([{"type": "text", "text": "First block"}, {"type": "image_url"}, {"type": "text", "text": "second block"}]);
    proxy.call(&post(CHAT, &json!({"messages": [{"role": "user", "content": parts}]})));
    assert_eq!(proxy.history()[0]["question"], "First block\nsecond block");
    let found = proxy.call(&get("/api/history?q=second")).json();
    assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{found}");
}

#[test]
fn the_mock_answers_in_json_where_it_is_asked_for() {
    let proxy = mocked(&[]);
    let parsed = |format: Value| {
        let message = mock_says(&proxy, json!({"response_format": format}), "stop");
        serde_json::from_str::<Value>(message["content"].as_str().expect("a text")).expect("JSON")
    };
    assert!(parsed(json!({"type": "json_object"})).is_object());
    let streamed = json!({"stream": true, "response_format": {"type": "json_object"}});
    let events = events_of(&proxy, &chat(streamed));
    assert!(events.len() > 6, "an object comes in pieces: {events:?}");
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "size", "tags", "kind", "nested", "maybe"],
        "properties": {
            "name": {"type": "string"}, "size": {"type": "number"}, "sure": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
            "kind": {"enum": ["big", "small"]}, "nested": {"$ref": "#/$defs/nested"}, "maybe": {"type": ["string", "null"]}
        },
        "$defs": {"nested": {"type": "object", "properties": {"deep": {"type": "integer"}}}}
    });
    let value = parsed(json!({"type": "json_schema", "json_schema": {"name": "thing", "strict": true, "schema": schema}}));
    assert!(value["name"].is_string() && value["size"].is_number() && value["sure"].is_boolean(), "{value}");
    assert!(value["tags"].as_array().is_some_and(|tags| tags.len() == 2 && tags[0].is_string()), "{value}");
    assert!(value["kind"] == "big" && value["nested"]["deep"].is_i64(), "{value}");
    assert!(value["maybe"].is_string() || value["maybe"].is_null(), "{value}");
    assert!(parsed(json!({"type": "json_schema", "json_schema": {"name": "bare"}})).is_object());
}

#[test]
fn the_mock_survives_a_schema_that_never_ends() {
    let endless = json!({"type": "object", "properties": {"again": {"$ref": "#"}, "more": {"type": "array", "minItems": 1000000, "items": {"type": "null"}}}});
    let response =
        mocked(&[]).call(&chat(json!({"response_format": {"type": "json_schema", "json_schema": {"schema": endless}}})));
    assert_eq!(response.status, 200);
    assert!(response.body.len() < 1_000_000, "{} bytes", response.body.len());
}

// Connections

#[test]
fn one_connection_serves_whole_answers_streams_and_models() {
    let proxy = Proxy::start();
    let mut connection: Connection = proxy.connect();
    for _ in 0..3 {
        assert_eq!(connection.exchange(&chat(json!({}))).status, 200);
        let mut stream = connection.stream(&chat_stream());
        assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
        connection = stream.into_connection();
        assert_eq!(connection.exchange(&get("/v1/models")).status, 200);
    }
}

#[test]
fn whoever_looks_into_the_database_meanwhile_takes_nothing_from_it() {
    // Closing any descriptor of a file drops all POSIX locks that the process holds on it (fcntl(2)). SQLite minds that;
    // a server that copies and closes descriptors it does not know loses SQLite's locks. The next `sqlite3` shell that
    // quits then takes itself for the last one and deletes the WAL, and with it what is acknowledged afterwards.
    let proxy = Proxy::start();
    for number in 1..=6 {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                // A connection each, so that descriptors come and go.
                scope.spawn(|| (0..250).for_each(|_| assert_eq!(proxy.get("/livez").status, 200)));
            }
        });
        assert_eq!(proxy.call(&chat(json!({}))).status, 200);
        assert_eq!(proxy.count_rows(), number, "what was acknowledged is in the database, for everybody to see");
    }
}
