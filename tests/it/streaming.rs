//! `POST /api/streaming`: every rule, with gates that show the order of things.

use crate::support::client::{Sse, get, post, streaming};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Step, delta, end, event, finish, piece, reply, send, stream_head, streamed, usage};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

/// The text that the deltas of a stream make up.
fn text_of(events: &[String]) -> String {
    let content = |event: &String| {
        let chunk: Value = serde_json::from_str(event).ok()?;
        Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())
    };
    events.iter().filter_map(content).collect()
}

/// The events of a whole stream that must succeed.
#[track_caller]
fn complete(proxy: &Proxy) -> Vec<String> {
    let mut events = proxy.stream("What is it?").events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{events:?}");
    assert!(!events.iter().any(|event| event.contains("\"error\"")), "{events:?}");
    events
}

#[test]
fn the_headers_are_those_of_the_contract() {
    let Some((Step::Send(begun), rest)) = streamed(&["Yes"]).split_first().map(|(head, rest)| (head.clone(), rest.to_vec()))
    else {
        panic!("a head comes first")
    };
    let begun =
        String::from_utf8_lossy(&begun).replacen("\r\n", "\r\nX-Request-Id: req_up\r\nx-ratelimit-limit-requests: 60\r\n", 1);
    let upstream = FakeUpstream::always([vec![send(begun)], rest].concat());
    let proxy = Proxy::facing(&upstream).start();
    let stream = proxy.stream("What is it?");
    let head = &stream.head;
    assert_eq!(head.header("Content-Type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(head.header("Cache-Control"), Some("no-cache"));
    assert_eq!(head.header("X-Accel-Buffering"), Some("no"));
    assert_eq!(head.header("Transfer-Encoding"), Some("chunked"));
    assert_eq!(head.header("Content-Length"), None);
    assert_eq!(head.header("x-ratelimit-limit-requests"), None, "the upstream's own are for /v1");
    assert_ne!(head.header("X-Request-Id"), Some("req_up"));
}

#[test]
fn events_arrive_one_by_one_while_the_upstream_writes() {
    let gates: [Gate; 4] = Gate::several();
    let mut steps = vec![stream_head()];
    let events = [delta("One "), delta("two "), delta("three"), finish("stop")];
    for (gate, data) in gates.iter().zip(&events) {
        steps.extend([Step::Wait(gate.clone()), event(data)]);
    }
    steps.extend([event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut connection = proxy.connect();
    connection.send(&streaming("Count!"));
    upstream.wait_for_calls(1);
    assert_eq!(upstream.requests()[0].json()["stream"], true);
    gates[0].open();
    let mut stream = connection.into_stream();
    stream.expect_event(&events[0]);
    for (gate, data) in gates.iter().zip(&events).skip(1) {
        gate.open();
        stream.expect_event(data);
    }
    stream.expect_event("[DONE]");
    assert_eq!(stream.next_event(), None);
    let pair = proxy.newest_of(1);
    assert_eq!(pair["question"], "Count!");
    assert_eq!(pair["answer"], "One two three");
    assert_eq!(pair["finish_reason"], "stop");
    assert_eq!(pair["model"], "fake-model-1");
}

#[test]
fn a_data_line_is_passed_on_byte_for_byte() {
    let odd = [
        r#"{ "choices" : [ {"delta":{"content":"caf\u00e9 \ud83d\ude42 \/ \u0000"},"index":0} ],"x":1.50,"x":2e0 }"#,
        r#"{"choices":[{"index":0,"delta":{"content":"é🙂"},"finish_reason":null,"logprobs":null}],"new_field":{"a":[]}}  "#,
        r#"{"choices":[{"index":0,"delta":{"content":""}},{"index":1,"delta":{"content":"other"}}]}"#,
    ];
    let mut steps = vec![stream_head()];
    steps.extend(odd.map(event));
    steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.stream("What is it?");
    for data in odd {
        stream.expect_event(data);
    }
    assert_eq!(stream.events(), [finish("stop"), "[DONE]".to_owned()]);
}

#[test]
fn the_usage_chunk_is_kept_for_history_and_not_passed_on() {
    let steps = vec![stream_head(), event(&delta("Yes")), event(&finish("stop")), event(&usage()), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(complete(&proxy), [delta("Yes"), finish("stop")]);
    let pair = proxy.newest_of(1);
    assert_eq!(pair["usage"], json!({"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}));
}

#[test]
fn usage_inside_the_last_chunk_is_kept_and_the_chunk_passed_on() {
    let mut last: Value = serde_json::from_str(&finish("stop")).unwrap();
    last["usage"] = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
    let last = last.to_string();
    let steps = vec![stream_head(), event(&delta("Yes")), event(&last), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(complete(&proxy), [delta("Yes"), last]);
    assert_eq!(proxy.newest_of(1)["usage"]["total_tokens"], 3);
}

/// Some servers name the model in some chunks only, or count before the last one.
#[test]
fn what_later_chunks_leave_open_is_kept_as_it_was_said() {
    let mut told: Value = serde_json::from_str(&delta("Yes")).unwrap();
    told["model"] = json!("model-told");
    told["usage"] = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
    let mut open: Value = serde_json::from_str(&finish("stop")).unwrap();
    open["model"] = json!("");
    let steps = vec![stream_head(), event(&told.to_string()), event(&open.to_string()), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    complete(&proxy);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["model"], &pair["usage"]["total_tokens"]), (&json!("model-told"), &json!(3)));
}

#[test]
fn usage_is_null_in_history_where_the_stream_gave_none() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    complete(&proxy);
    assert_eq!(proxy.newest_of(1)["usage"], Value::Null);
}

#[test]
fn our_status_waits_for_the_first_event() {
    let gate = Gate::new();
    let ping = piece(": PROCESSING\n\n");
    let steps = vec![stream_head(), ping, Step::Wait(gate.clone()), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut connection = proxy.connect();
    connection.send(&streaming("What is it?"));
    upstream.wait_for_calls(1);
    gate.open();
    connection.read_response().expect_error(502, "upstream_bad_answer");
}

#[test]
fn a_failure_before_the_first_event_is_an_ordinary_error() {
    let said = json!({"error": {"message": "the words", "code": 502}}).to_string();
    for steps in [
        vec![stream_head(), end()],
        vec![stream_head(), Step::Close],
        vec![stream_head(), Step::Reset],
        vec![stream_head(), event(&said), end()],
        vec![stream_head(), event("[DONE]"), end()],
        vec![stream_head(), piece("data: {\"choi"), Step::Close],
        reply(200, &[("Content-Type", "text/event-stream")], ""),
    ] {
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        let response = proxy.call(&streaming("What is it?"));
        response.expect_error(502, "upstream_bad_answer");
        assert_eq!(proxy.count_rows(), 0);
    }
}

#[test]
fn a_first_event_that_does_not_come_is_503_upstream_timeout() {
    let upstream = FakeUpstream::always(vec![stream_head(), Step::Silence]);
    let setup = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1");
    let proxy = setup.set("UPSTREAM_IDLE_SECS", "1").start();
    let response = proxy.call(&streaming("What is it?"));
    response.expect_error(503, "upstream_timeout");
    assert_eq!(response.header("x-should-retry"), Some("false"), "it may have been paid for, and would be as slow again");
    upstream.wait_until_left(1);
}

#[test]
fn heartbeats_are_sent_while_the_upstream_is_silent() {
    let [first, second]: [Gate; 2] = Gate::several();
    let steps = vec![
        Step::Wait(first.clone()),
        stream_head(),
        event(&delta("Yes")),
        Step::Wait(second.clone()),
        event(&finish("stop")),
        event("[DONE]"),
        end(),
    ];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    assert_eq!(stream.head.header("Content-Type"), Some("text/event-stream; charset=utf-8"));
    stream.expect_heartbeat();
    stream.expect_heartbeat();
    first.open();
    stream.expect_event(&delta("Yes"));
    stream.expect_heartbeat();
    stream.expect_heartbeat();
    second.open();
    stream.expect_event(&finish("stop"));
    stream.expect_event("[DONE]");
    assert_eq!(stream.next_event(), None);
    assert_eq!(proxy.newest_of(1)["answer"], "Yes");
}

#[test]
fn heartbeats_are_sent_while_the_upstream_sends_nothing_but_comments() {
    let upstream = FakeUpstream::always(vec![stream_head(), Step::Repeat(b"2\r\n:\n\r\n".to_vec())]);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    loop {
        // Its comments may be passed on; ours has to come all the same.
        match stream.next_piece() {
            Some(Sse::Comment(text)) if text == "keep-alive" => break,
            Some(Sse::Comment(_)) => {}
            other => panic!("neither event nor end: {other:?}"),
        }
    }
    drop(stream);
    upstream.wait_until_left(1);
}

#[test]
fn a_failure_after_heartbeats_only_is_an_error_event() {
    for (steps, code) in [
        (reply(400, &[], "the words"), "upstream_rejected"),
        (reply(500, &[], "the words"), "upstream_error"),
        (vec![Step::Reset], "upstream_unavailable"),
        (vec![stream_head(), end()], "upstream_bad_answer"),
    ] {
        let gate = Gate::new();
        let steps = [vec![Step::Wait(gate.clone())], steps].concat();
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
        let mut stream = proxy.stream("What is it?");
        stream.expect_heartbeat();
        gate.open();
        let error = stream.expect_failure(code);
        assert_eq!(error["request_id"].as_str(), stream.head.header("X-Request-Id"));
    }
}

#[test]
fn a_failure_after_the_200_is_one_error_event_and_a_proper_end() {
    let half = [stream_head(), event(&delta("Half "))];
    let provider = json!({"id": "gen-1", "object": "chat.completion.chunk", "provider": "x",
        "error": {"code": 502, "message": "Provider disconnected"},
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]});
    let bare = json!({"error": {"message": "Provider disconnected", "type": "server_error"}});
    for (what, ending) in [
        ("an end without finish_reason", vec![end()]),
        ("a cut body", vec![Step::Close]),
        ("a reset", vec![Step::Reset]),
        ("half an event", vec![piece("data: {\"choices\":[{\"delta\":{\"content\":\"lost"), Step::Close]),
        ("half an event and a clean end", vec![piece("data: {\"choices\":[{\"del"), end()]),
        ("a finish_reason and a cut", vec![event(&finish("stop")), Step::Close]),
        ("a finish_reason and a reset", vec![event(&finish("stop")), Step::Reset]),
        ("an error in a chunk", vec![event(&provider.to_string()), event("[DONE]"), end()]),
        ("an error event", vec![event(&bare.to_string()), end()]),
    ] {
        eprintln!("{what}");
        let gate = Gate::new();
        let steps = [half.to_vec(), vec![Step::Wait(gate.clone())], ending].concat();
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        let mut stream = proxy.stream("What is it?");
        stream.expect_event(&delta("Half "));
        gate.open();
        let mut events = stream.events();
        let last: Value = serde_json::from_str(&events.pop().expect("an error event")).expect("JSON");
        let error = last["error"].as_object().expect("an error event");
        assert_eq!(error["code"], "upstream_error", "{what}: {last}");
        crate::support::client::expect_error_object(&last["error"], "upstream_error");
        assert_eq!(error["request_id"].as_str(), stream.head.header("X-Request-Id"));
        if what.starts_with("an error") {
            let message = error["message"].as_str().expect("a message");
            assert!(message.contains("Provider disconnected"), "their words help: {last}");
        }
        assert!(!events.iter().any(|event| event == "[DONE]" || event.contains("\"error\"")), "{what}: {events:?}");
        // The connection is in order: the body has its end, the next request its answer.
        assert_eq!(stream.into_connection().exchange(&get("/livez")).status, 200);
        let pair = proxy.newest_of(1);
        assert_eq!(pair["answer"], "Half ", "{what}");
        assert_eq!(pair["finish_reason"], "upstream_error", "{what}");
    }
}

#[test]
fn a_row_is_in_the_database_when_done_is_read() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    for count in 1..=20 {
        let mut stream = proxy.stream("What is it?");
        while stream.next_event().expect("[DONE]") != "[DONE]" {}
        assert_eq!(proxy.count_rows(), count);
    }
}

#[test]
fn a_finish_reason_and_a_clean_end_are_complete_and_done_is_added() {
    let until_close = send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
    let raw = |data: &str| send(format!("data: {data}\n\n"));
    for steps in [
        vec![stream_head(), event(&delta("Yes")), event(&finish("stop")), end()],
        vec![until_close, raw(&delta("Yes")), raw(&finish("stop")), Step::Close],
    ] {
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        assert_eq!(complete(&proxy), [delta("Yes"), finish("stop")]);
        let pair = proxy.newest_of(1);
        assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("Yes"), &json!("stop")));
    }
}

#[test]
fn another_finish_reason_than_stop_is_kept() {
    let steps = vec![stream_head(), event(&delta("Yes")), event(&finish("length")), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    complete(&proxy);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "length");
}

#[test]
fn done_without_a_finish_reason_is_complete() {
    let steps = vec![stream_head(), event(&delta("Yes")), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(complete(&proxy), [delta("Yes")]);
    let pair = proxy.newest_of(1);
    assert_eq!(pair["answer"], "Yes");
    assert_ne!(pair["finish_reason"], "upstream_error");
}

/// llama-cpp-python's way to interrupt one stream for another request.
#[test]
fn done_without_a_finish_reason_before_a_break_is_no_end() {
    let steps = vec![stream_head(), event(&delta("Half")), event("[DONE]"), Step::Close];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Half"));
    stream.expect_failure("upstream_error");
    assert_eq!(proxy.newest_of(1)["finish_reason"], "upstream_error");
}

#[test]
fn done_ends_the_stream_even_where_the_upstream_stays() {
    let steps = vec![stream_head(), event(&delta("Yes")), event(&finish("stop")), event("[DONE]"), Step::Silence];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(complete(&proxy), [delta("Yes"), finish("stop")]);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "stop");
}

#[test]
fn a_stream_that_comes_byte_by_byte_is_the_same_stream() {
    let words = ["При", "вет", " 👩‍🦰", "🙂"];
    let mut text: String = words.iter().map(|word| format!("data: {}\n\n", delta(word))).collect();
    text.push_str(&format!("data: {}\n\ndata: [DONE]\n\n", finish("stop")));
    let mut steps = vec![stream_head()];
    steps.extend(text.as_bytes().iter().map(|byte| piece([*byte])));
    steps.push(end());
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut expected: Vec<String> = words.iter().map(|word| delta(word)).collect();
    expected.push(finish("stop"));
    assert_eq!(complete(&proxy), expected);
    assert_eq!(proxy.newest_of(1)["answer"], words.concat());
}

#[test]
fn a_character_may_be_split_while_the_stream_stands_still() {
    let data = format!("data: {}\n\n", delta("a🙂b"));
    let middle = data.find('🙂').unwrap() + 2;
    let (left, right) = data.as_bytes().split_at(middle);
    let gate = Gate::new();
    let steps = vec![
        stream_head(),
        event(&delta("First")),
        piece(left),
        Step::Wait(gate.clone()),
        piece(right),
        event(&finish("stop")),
        event("[DONE]"),
        end(),
    ];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("First"));
    stream.expect_heartbeat();
    gate.open();
    stream.expect_event(&delta("a🙂b"));
    assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
    assert_eq!(proxy.newest_of(1)["answer"], "Firsta🙂b");
}

#[test]
fn every_legal_way_to_write_an_event_is_understood() {
    let lines = [
        ("CRLF", format!("data: {}\r\n\r\n", delta("Yes"))),
        ("no space", format!("data:{}\n\n", delta("Yes"))),
        ("comments around", format!(": PROCESSING\n\n: a\ndata: {}\n: b\n\n:\n\n", delta("Yes"))),
        ("other fields", format!("event: message\nid: 1\nretry: 10\ndata: {}\n\n", delta("Yes"))),
        ("the last name of an event counts", format!("event: error\nevent: message\ndata: {}\n\n", delta("Yes"))),
        ("unknown and nameless fields", format!("x: y\nnothing\ndata: {}\n\n", delta("Yes"))),
        ("blank lines", format!("\n\n\r\n\ndata: {}\n\n\n\n", delta("Yes"))),
        ("events without data", format!("data:\n\ndata: {}\n\ndata\n\n", delta("Yes"))),
        ("a byte order mark", format!("\u{feff}data: {}\n\n", delta("Yes"))),
    ];
    for (what, text) in lines {
        eprintln!("{what}");
        let steps = vec![stream_head(), piece(text), event(&finish("stop")), event("[DONE]"), end()];
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        assert_eq!(complete(&proxy), [delta("Yes"), finish("stop")], "{what}");
        assert_eq!(proxy.newest_of(1)["answer"], "Yes", "{what}");
    }
}

#[test]
fn an_event_of_several_data_lines_is_one_event() {
    let text = "data: {\"choices\":[{\"index\":0,\ndata: \"delta\":{\"content\":\"Yes\"}}]}\n\n";
    let steps = vec![stream_head(), piece(text), event(&finish("stop")), event("[DONE]"), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let joined = "{\"choices\":[{\"index\":0,\n\"delta\":{\"content\":\"Yes\"}}]}".to_owned();
    assert_eq!(complete(&proxy), [joined, finish("stop")]);
    assert_eq!(proxy.newest_of(1)["answer"], "Yes");
}

#[test]
fn chunks_without_choices_or_content_are_legal() {
    let odd = [
        json!({"id": "c", "object": "chat.completion.chunk"}).to_string(),
        json!({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}).to_string(),
        json!({"id": "c", "choices": [{"index": 0, "delta": {"reasoning": "hm"}}]}).to_string(),
        json!({"id": "c", "choices": [{"index": 0, "finish_reason": null}]}).to_string(),
    ];
    let mut steps = vec![stream_head()];
    steps.extend(odd.iter().map(|data| event(data)));
    steps.extend([event(&delta("Yes")), event(&finish("stop")), event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(complete(&proxy), [odd.to_vec(), vec![delta("Yes"), finish("stop")]].concat());
    assert_eq!(proxy.newest_of(1)["answer"], "Yes");
}

#[test]
fn a_reset_is_no_clean_end_of_a_body_that_ends_with_its_connection() {
    for (ending, reason) in [(Step::Close, "stop"), (Step::Reset, "upstream_error")] {
        let gate = Gate::new();
        let sent = format!("data: {}\n\ndata: {}\n\n", delta("Yes"), finish("stop"));
        let head = send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
        let upstream = FakeUpstream::always(vec![head, send(sent), Step::Wait(gate.clone()), ending]);
        let proxy = Proxy::facing(&upstream).start();
        let mut stream = proxy.stream("What is it?");
        stream.expect_event(&delta("Yes"));
        stream.expect_event(&finish("stop"));
        gate.open();
        if reason == "stop" {
            stream.expect_event("[DONE]");
        } else {
            stream.expect_failure("upstream_error");
        }
        assert_eq!(proxy.newest_of(1)["finish_reason"], reason);
    }
}

#[test]
fn a_client_that_leaves_ends_the_upstream_call_and_is_remembered() {
    let written = format!("data: {}\n\n", delta("more "));
    let written = format!("{:x}\r\n{written}\r\n", written.len()).into_bytes();
    for (what, ending) in [("writing", Step::Repeat(written)), ("silent", Step::Silence)] {
        let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Begun ")), ending]);
        let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
        let mut stream = proxy.stream("What is it?");
        stream.expect_event(&delta("Begun "));
        drop(stream);
        upstream.wait_until_left(1);
        let pair = proxy.newest_of(1);
        assert_eq!(pair["finish_reason"], "client_gone", "{what}");
        assert!(pair["answer"].as_str().unwrap().starts_with("Begun "), "{what}");
    }
}

#[test]
fn a_client_that_crashes_ends_the_upstream_call() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Begun")), Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Begun"));
    stream.abandon().reset();
    upstream.wait_until_left(1);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("Begun"), &json!("client_gone")));
}

#[test]
fn a_client_that_only_says_it_is_done_has_left_too() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Begun")), Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Begun"));
    stream.connection().finish_sending();
    upstream.wait_until_left(1);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "client_gone");
}

#[test]
fn a_client_that_leaves_before_the_first_event_ends_the_upstream_call() {
    for steps in [vec![Step::Silence], vec![stream_head(), Step::Silence]] {
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
        let mut connection = proxy.connect();
        connection.send(&streaming("What is it?"));
        upstream.wait_for_calls(1);
        drop(connection);
        upstream.wait_until_left(1);
        assert_eq!(proxy.get("/livez").status, 200);
    }
}

#[test]
fn a_client_that_left_does_not_hold_its_worker() {
    let upstream = FakeUpstream::script(vec![vec![stream_head(), event(&delta("Begun")), Step::Silence], streamed(&["Yes"])]);
    let setup = Proxy::facing(&upstream).set("WORKERS", "1").set("QUEUE_SIZE", "5");
    let proxy = setup.set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("First?");
    stream.expect_event(&delta("Begun"));
    drop(stream);
    assert_eq!(complete(&proxy), [delta("Yes"), finish("stop")]);
}

#[test]
fn an_upstream_that_falls_silent_is_given_up() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Half"));
    stream.expect_failure("upstream_timeout");
    upstream.wait_until_left(1);
    let pair = proxy.newest_of(1);
    assert_eq!((&pair["answer"], &pair["finish_reason"]), (&json!("Half"), &json!("upstream_error")));
}

/// As with `cpulimit`, a debugger, or a container that is paused: the wait is interrupted, and goes on.
#[test]
fn an_upstream_that_falls_silent_is_given_up_although_the_server_is_stopped_now_and_then() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Half"));
    let (over, is_over) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let is_over = is_over;
            while is_over.try_recv() == Err(TryRecvError::Empty) {
                for signal in [Signal::STOP, Signal::CONT] {
                    proxy.signal(signal);
                    // Otherwise the second would take the first back.
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        });
        // Dropped with this, also where it is not given up.
        let _over = over;
        stream.expect_failure("upstream_timeout");
    });
    upstream.wait_until_left(1);
}

/// As a container that was paused: all that was waited for is there.
#[test]
fn what_came_while_the_server_was_stopped_is_not_silence() {
    let gate = Gate::new();
    let rest = vec![Step::Wait(gate.clone()), event(&delta(" and whole")), event(&finish("stop")), event("[DONE]"), end()];
    let upstream = FakeUpstream::always([vec![stream_head(), event(&delta("Half"))], rest].concat());
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Half"));
    // Its worker waits for more; and nothing comes before all is still.
    std::thread::sleep(Duration::from_millis(100));
    proxy.signal(Signal::STOP);
    std::thread::sleep(Duration::from_millis(100));
    gate.open();
    // Longer than the LLM may be silent.
    std::thread::sleep(Duration::from_millis(1500));
    proxy.signal(Signal::CONT);
    stream.expect_event(&delta(" and whole"));
    assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
}

#[test]
fn an_upstream_that_falls_silent_is_given_up_although_heartbeats_are_sent() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), Step::Silence]);
    let setup = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "3");
    let proxy = setup.set("STREAM_HEARTBEAT_SECS", "1").start();
    let mut stream = proxy.stream("What is it?");
    stream.expect_event(&delta("Half"));
    stream.expect_heartbeat();
    stream.expect_failure("upstream_timeout");
    upstream.wait_until_left(1);
}

#[test]
fn a_healthy_stream_may_outlast_every_timeout() {
    let mut steps = vec![stream_head()];
    let words = ["a ", "stream ", "of ", "four ", "words"];
    for word in words {
        steps.extend([event(&delta(word)), Step::Pause(Duration::from_millis(600))]);
    }
    steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let setup = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1");
    let proxy = setup.set("UPSTREAM_IDLE_SECS", "2").set("SHUTDOWN_GRACE_SECS", "1").start();
    assert_eq!(text_of(&complete(&proxy)), words.concat());
}

/// Whatever it calls itself.
#[test]
fn a_stream_that_is_called_json_may_outlast_the_timeout_too() {
    let head = send("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    let begun = vec![head, event(&delta("Half ")), Step::Pause(Duration::from_millis(1500))];
    let upstream = FakeUpstream::always([begun, streamed(&["and half"])[1..].to_vec()].concat());
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1").start();
    assert_eq!(text_of(&complete(&proxy)), "Half and half");
}

#[test]
fn an_http_1_0_client_gets_the_same_bytes_unchunked_and_one_by_one() {
    let [first, second]: [Gate; 2] = Gate::several();
    let steps = vec![
        stream_head(),
        event(&delta("One ")),
        Step::Wait(first.clone()),
        event(&delta("two")),
        Step::Wait(second.clone()),
        event(&finish("stop")),
        event("[DONE]"),
        end(),
    ];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let request = streaming("Count!").version_1_0();
    for request in [request.clone(), request.header("Connection", "keep-alive")] {
        let mut stream = proxy.connect().stream(&request);
        assert_eq!(stream.head.status, 200);
        assert_eq!(stream.head.header("Transfer-Encoding"), None);
        assert_eq!(stream.head.header("Content-Length"), None);
        assert_eq!(stream.head.header("Connection"), Some("close"));
        assert_eq!(stream.head.header("Content-Type"), Some("text/event-stream; charset=utf-8"));
        stream.expect_event(&delta("One "));
        first.open();
        stream.expect_event(&delta("two"));
        second.open();
        assert_eq!(stream.events(), [finish("stop"), "[DONE]".to_owned()]);
    }
}

#[test]
fn a_failure_ends_an_http_1_0_stream_with_an_error_event_too() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), end()]);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.connect().stream(&streaming("What is it?").version_1_0());
    let events = stream.events();
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(events[1].contains("\"error\""), "{events:?}");
}

#[test]
fn the_connection_serves_on_after_a_stream() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).start();
    let mut connection = proxy.connect();
    for _ in 0..3 {
        let mut stream = connection.stream(&streaming("What is it?"));
        assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
        connection = stream.into_connection();
        assert_eq!(connection.exchange(&get("/livez")).status, 200);
        connection.exchange(&post("/api/streaming", &json!({}))).expect_error(422, "invalid_request");
    }
}

#[test]
fn long_streams_and_long_events_pass_whole() {
    let long = "long ".repeat(100_000);
    let mut steps = vec![stream_head(), event(&delta(&long))];
    steps.extend((0..5000).map(|number| event(&delta(&format!("{number} ")))));
    steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let text = text_of(&complete(&proxy));
    let expected: String = (0..5000).map(|number| format!("{number} ")).collect();
    assert_eq!(text, long + &expected);
    assert_eq!(proxy.newest_of(1)["answer"], text);
}

/// Although no event is too long.
#[test]
fn a_stream_of_more_text_than_an_answer_may_have_is_cut() {
    let piece = event(&delta(&"x".repeat(1 << 20)));
    let upstream = FakeUpstream::always([vec![stream_head()], vec![piece; 17], streamed(&["Yes"])[1..].to_vec()].concat());
    let proxy = Proxy::facing(&upstream).start();
    let error = proxy.stream("How much?").expect_failure("upstream_error");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("larger than 16777216 bytes")), "{error}");
    // Asked of the database: to write and to read it as JSON takes long without optimization.
    eventually("what came is kept", || proxy.count_rows() == 1);
    let kept = proxy.database().query_row("SELECT length(answer) FROM history", [], |row| row.get::<_, i64>(0));
    assert_eq!(kept, Ok(16 << 20));
}

#[test]
fn many_streams_run_at_once_and_none_is_mixed_up() {
    let upstream = FakeUpstream::answering(|request| {
        let question = request.question();
        streamed(&["Re: ", &question, "!"])
    });
    let proxy = Proxy::facing(&upstream).set("WORKERS", "8").set("QUEUE_SIZE", "100").start();
    std::thread::scope(|scope| {
        for number in 0..50 {
            let proxy = &proxy;
            scope.spawn(move || {
                let events = proxy.stream(&format!("question {number}")).events();
                assert_eq!(text_of(&events), format!("Re: question {number}!"));
                assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
            });
        }
    });
    let history = proxy.history();
    assert_eq!(history.len(), 50);
    for pair in history {
        assert_eq!(pair["answer"], format!("Re: {}!", pair["question"].as_str().unwrap()));
    }
}

#[test]
fn a_stream_that_ended_well_leaves_the_upstream_connection_for_the_next() {
    let upstream = FakeUpstream::always(streamed(&["Yes"]));
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for _ in 0..4 {
        complete(&proxy);
    }
    assert_eq!((upstream.calls(), upstream.connections()), (4, 1));
}

#[test]
fn a_reader_that_is_slow_gets_everything() {
    let mut steps = vec![stream_head()];
    let word = "word ".repeat(2000);
    steps.extend((0..1000).map(|_| event(&delta(&word))));
    steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.stream("What is it?");
    // Nothing is read while 10 MB are under way: more than all buffers between hold.
    upstream.wait_for_calls(1);
    std::thread::sleep(Duration::from_secs(1));
    let events = stream.events();
    assert_eq!(events.len(), 1002);
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    eventually("the pair is stored whole", || {
        proxy.history()[0]["answer"].as_str().is_some_and(|answer| answer.len() == word.len() * 1000)
    });
}
