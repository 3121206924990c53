//! The error table: what a client does wrong, and what the server itself cannot do.

use crate::support::client::{Request, get, is_sane_id, post, post_bytes, streaming};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Step, answer, streamed};
use serde_json::{Value, json};
use std::time::Duration;

const LLM_PATHS: [&str; 2] = ["/api/ask", "/api/streaming"];

fn question() -> Value {
    json!({"question": "What is it?"})
}

/// A proxy whose upstream must never be asked.
fn with_unasked_upstream(settings: &[(&str, &str)], check: impl FnOnce(&Proxy)) {
    let upstream = FakeUpstream::always(answer("nobody asked"));
    let proxy = Proxy::with(settings).facing(&upstream).start();
    check(&proxy);
    assert_eq!(upstream.calls(), 0, "no refused request reaches the upstream");
    assert_eq!(proxy.count_rows(), 0, "no refused request is remembered");
}

#[test]
fn a_body_that_is_not_json_is_400_invalid_json() {
    let deep = "[".repeat(100_000);
    let bodies: [&[u8]; 12] = [
        b"",
        b"{",
        b"not json",
        b"{\"question\": \"a\"} and more",
        b"{'question': 'a'}",
        b"{\"question\": \"\xff\xfe\"}",
        b"{\"question\": \"\\ud800\"}",
        b"{\"\\ud800\": 1}",
        b"{\"a\": [01]}",
        b"[1",
        b"{\"question\": \"a\nb\"}",
        deep.as_bytes(),
    ];
    with_unasked_upstream(&[], |proxy| {
        for path in LLM_PATHS {
            for body in bodies {
                let error = proxy.call(&post_bytes(path, body)).expect_error(400, "invalid_json");
                assert_eq!(error["param"], Value::Null);
            }
        }
    });
}

#[test]
fn malformed_http_is_400_bad_request() {
    let proxy = Proxy::start();
    for bytes in [
        "GARBAGE\r\n\r\n",
        "GET\r\n\r\n",
        "GET /livez\r\n\r\n",
        "GET /livez NOT/1.1\r\nHost: a\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: a\r\nno colon here\r\n\r\n",
        "GET /livez HTTP/1.1\r\n\r\n",
        "POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
        "POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /api/ask HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n\r\n",
    ] {
        eprintln!("sending {bytes:?}");
        let mut connection = proxy.connect();
        connection.send_bytes(bytes);
        connection.read_response().expect_error(400, "bad_request");
    }
    assert_eq!(proxy.get("/livez").status, 200);
}

#[test]
fn a_missing_or_wrong_key_is_401_on_every_endpoint_that_needs_one() {
    with_unasked_upstream(&[("API_KEYS", "alice:secret1,bob:secret2,bare3")], |proxy| {
        for request in [post("/api/ask", &question()), streaming("What is it?"), get("/api/history")] {
            for value in [
                None,
                Some(""),
                Some("Bearer"),
                Some("Bearer "),
                Some("Bearer wrong"),
                Some("Bearer secret"),
                Some("Bearer secret11"),
                Some("Bearer SECRET1"),
                Some("Bearer alice:secret1"),
                Some("Bearer alice"),
                Some("Bearer secret1,secret2"),
                Some("Basic secret1"),
            ] {
                let request = match value {
                    Some(value) => request.clone().header("Authorization", value),
                    None => request.clone(),
                };
                let response = proxy.call(&request);
                let error = response.expect_error(401, "unauthorized");
                assert_eq!(error["param"], Value::Null);
                assert_eq!(response.header("WWW-Authenticate"), Some("Bearer"), "{response:?}");
                assert!(!response.everything().contains("secret1"), "{response:?}");
            }
        }
    });
}

#[test]
fn every_configured_key_is_taken_with_and_without_bearer() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1,bob:secret:2,bare3")]).start();
    for value in ["Bearer secret1", "Bearer secret:2", "Bearer bare3", "Bearer  secret1", "secret1", "bare3", "bearer secret1"] {
        for path in LLM_PATHS {
            let response = proxy.call(&post(path, &question()).header("Authorization", value));
            assert_eq!(response.status, 200, "{value}: {response:?}");
        }
        assert_eq!(proxy.call(&get("/api/history").header("Authorization", value)).status, 200);
    }
}

/// Secrets are compared over the longest there may be.
#[test]
fn a_longer_secret_than_any_is_wrong_also_where_it_begins_as_one() {
    let longest = "s".repeat(256);
    let proxy = Proxy::with(&[("API_KEYS", &format!("alice:{longest}"))]).start();
    assert_eq!(proxy.call(&get("/api/history").key(&longest)).status, 200);
    proxy.call(&get("/api/history").key(&(longest + "s"))).expect_error(401, "unauthorized");
}

#[test]
fn the_401_comes_before_the_body_is_read_and_before_anything_is_said_about_it() {
    with_unasked_upstream(&[("API_KEYS", "alice:secret1"), ("MAX_BODY_BYTES", "1000")], |proxy| {
        for path in LLM_PATHS {
            let head = post_bytes(path, "");
            for head in [
                head.clone().header("Content-Length", "500"),
                head.clone().header("Content-Length", "1000000"),
                head.clone().header("Content-Length", "500").header("Expect", "100-continue"),
                head.clone().header("Content-Length", "500").header("Content-Type", "text/plain"),
                head.clone().without("Content-Length").header("Transfer-Encoding", "chunked"),
            ] {
                proxy.call(&head).expect_error(401, "unauthorized");
            }
        }
    });
}

#[test]
fn health_needs_no_key() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1")]).start();
    for path in ["/livez", "/readyz"] {
        assert_eq!(proxy.get(path).status, 200);
    }
}

#[test]
fn an_unknown_path_is_404() {
    let proxy = Proxy::start();
    let paths = ["/api", "/api/", "/api/ask/", "/api/ask/x", "/API/ASK", "/api/nope", "/livez/", "//livez"];
    for path in paths {
        for request in [get(path), post(path, &question())] {
            proxy.call(&request).expect_error(404, "not_found");
        }
    }
}

#[test]
fn a_wrong_method_is_405_and_names_the_right_ones() {
    let proxy = Proxy::start();
    let expect = |request: Request, allowed: &[&str]| {
        let response = proxy.call(&request);
        response.expect_error(405, "method_not_allowed");
        let mut allow: Vec<&str> = response.header("Allow").expect("Allow").split(", ").collect();
        allow.sort_unstable();
        assert_eq!(allow, allowed, "{response:?}");
    };
    for path in LLM_PATHS {
        for method in ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "post"] {
            expect(get(path).method(method), &["POST"]);
        }
    }
    for path in ["/api/history", "/livez", "/readyz"] {
        expect(post(path, &question()), &["GET", "HEAD"]);
        for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "BREW"] {
            expect(get(path).method(method), &["GET", "HEAD"]);
        }
    }
}

#[test]
fn a_body_over_the_limit_is_413_at_once_by_its_declaration() {
    with_unasked_upstream(&[("MAX_BODY_BYTES", "1000")], |proxy| {
        for path in LLM_PATHS {
            for length in ["1001", "1099511627776", "9223372036854775807"] {
                let head = post_bytes(path, "").header("Content-Length", length);
                proxy.call(&head).expect_error(413, "body_too_large");
                let waiting = head.header("Expect", "100-continue");
                proxy.call(&waiting).expect_error(413, "body_too_large");
            }
        }
    });
}

#[test]
fn a_body_over_the_limit_is_413_at_once_by_its_real_size() {
    with_unasked_upstream(&[("MAX_BODY_BYTES", "1000")], |proxy| {
        for path in LLM_PATHS {
            let head = post_bytes(path, "").without("Content-Length").header("Transfer-Encoding", "chunked");
            let mut connection = proxy.connect();
            connection.send(&head);
            for _ in 0..11 {
                connection.send_bytes(format!("64\r\n{}\r\n", "x".repeat(100)));
            }
            connection.read_response().expect_error(413, "body_too_large");
        }
    });
}

#[test]
fn a_body_of_exactly_the_limit_is_taken() {
    let proxy = Proxy::with(&[("MAX_BODY_BYTES", "1000")]).start();
    let empty = json!({"question": ""}).to_string().len();
    let body = json!({"question": "x".repeat(1000 - empty)});
    for path in LLM_PATHS {
        assert_eq!(proxy.call(&post(path, &body)).status, 200);
    }
}

#[test]
fn a_client_that_sends_all_of_a_refused_body_still_reads_why() {
    let proxy = Proxy::with(&[("MAX_BODY_BYTES", "1000"), ("API_KEYS", "alice:secret1")]).start();
    let body = json!({"question": "x".repeat(200_000)});
    for path in LLM_PATHS {
        for _ in 0..5 {
            proxy.call(&post(path, &body).key("secret1")).expect_error(413, "body_too_large");
            proxy.call(&post(path, &body)).expect_error(401, "unauthorized");
        }
        proxy.call(&post("/nowhere", &body)).expect_error(404, "not_found");
    }
}

#[test]
fn a_compressed_body_is_415_and_says_so() {
    with_unasked_upstream(&[], |proxy| {
        for path in LLM_PATHS {
            let response = proxy.call(&post(path, &question()).header("Content-Encoding", "gzip"));
            response.expect_error(415, "unsupported_media_type");
            assert!(response.json()["error"]["message"].as_str().is_some_and(|text| text.contains("Content-Encoding")));
        }
    });
    let proxy = Proxy::start();
    for none in ["identity", ""] {
        let response = proxy.call(&post("/api/ask", &question()).header("Content-Encoding", none));
        assert_eq!(response.status, 200, "{none:?}: {response:?}");
    }
}

#[test]
fn who_is_refused_asks_again_on_the_same_connection() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1")]).start();
    let asking = post("/api/ask", &question()).key("secret1");
    for (refused, status) in [
        (post("/api/ask", &json!({})).key("secret1"), 422),
        (asking.clone().key("wrong"), 401),
        (asking.clone().header("Content-Type", "text/plain"), 415),
        (post("/nowhere", &question()), 404),
        (get("/api/ask"), 405),
    ] {
        let mut connection = proxy.connect();
        assert_eq!(connection.exchange(&refused).status, status);
        assert_eq!(connection.exchange(&asking).status, 200, "after a {status}");
    }
}

/// Without a type the browser of a page of another origin would not ask whether it may.
#[test]
fn a_web_page_has_to_name_the_type() {
    let proxy = Proxy::start();
    for path in LLM_PATHS {
        let typed = post(path, &question()).header("Origin", "https://example.com");
        let untyped = typed.clone().without("Content-Type");
        proxy.call(&untyped).expect_error(415, "unsupported_media_type");
        assert_eq!(proxy.call(&typed).status, 200, "{path}: its browser has asked");
        assert_eq!(proxy.call(&untyped.without("Origin")).status, 200, "{path}: no page");
    }
}

#[test]
fn a_byte_order_mark_before_the_body_is_ignored() {
    let proxy = Proxy::start();
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "What is it?"}]});
    for (path, body) in [("/api/ask", question()), ("/api/streaming", question()), ("/v1/chat/completions", chat)] {
        let bytes = [b"\xef\xbb\xbf", body.to_string().as_bytes()].concat();
        assert_eq!(proxy.call(&post_bytes(path, bytes)).status, 200, "{path}");
    }
    assert!(proxy.history().iter().all(|pair| pair["question"] == "What is it?"));
}

#[test]
fn a_content_type_that_is_not_json_is_415() {
    with_unasked_upstream(&[], |proxy| {
        for path in LLM_PATHS {
            for kind in
                ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "text/json", "x"]
            {
                let request = post(path, &question()).header("Content-Type", kind);
                proxy.call(&request).expect_error(415, "unsupported_media_type");
            }
        }
    });
}

#[test]
fn a_content_type_that_is_json_is_taken_however_it_is_written() {
    let proxy = Proxy::start();
    for kind in ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;charset=UTF-8"] {
        for path in LLM_PATHS {
            let response = proxy.call(&post(path, &question()).header("Content-Type", kind));
            assert_eq!(response.status, 200, "{kind}: {response:?}");
        }
    }
}

#[test]
fn a_bad_field_is_422_and_param_names_it() {
    let cases = [
        (json!({}), "question"),
        (json!({"model": "m"}), "question"),
        (json!({"question": null}), "question"),
        (json!({"question": 5}), "question"),
        (json!({"question": ["a"]}), "question"),
        (json!({"question": {"text": "a"}}), "question"),
        (json!({"question": ""}), "question"),
        (json!({"question": "   "}), "question"),
        (json!({"question": "\n\t\r "}), "question"),
        (json!({"question": "\u{a0}\u{2003}"}), "question"),
        (json!({"question": "eleven char"}), "question"),
        (json!({"question": "🙂".repeat(11)}), "question"),
        (json!({"question": "a", "temprature": 1}), "temprature"),
        (json!({"question": "a", "Question": "b"}), "Question"),
        (json!({"question": "a", "stream": true}), "stream"),
        (json!({"question": "a", "": 1}), ""),
        (json!({"question": "a", "model": 5}), "model"),
        (json!({"question": "a", "model": ""}), "model"),
        (json!({"question": "a", "model": "  "}), "model"),
        (json!({"question": "a", "system": 5}), "system"),
        (json!({"question": "a", "system": ["b"]}), "system"),
        (json!({"question": "a", "temperature": "hot"}), "temperature"),
        (json!({"question": "a", "temperature": true}), "temperature"),
        (json!({"question": "a", "temperature": -0.1}), "temperature"),
        (json!({"question": "a", "temperature": 2.1}), "temperature"),
        (json!({"question": "a", "max_tokens": "many"}), "max_tokens"),
        (json!({"question": "a", "max_tokens": 1.5}), "max_tokens"),
        (json!({"question": "a", "max_tokens": 0}), "max_tokens"),
        (json!({"question": "a", "max_tokens": -1}), "max_tokens"),
    ];
    with_unasked_upstream(&[("MAX_QUESTION_CHARS", "10")], |proxy| {
        for path in LLM_PATHS {
            for (body, param) in &cases {
                let response = proxy.call(&post(path, body));
                let error = response.expect_error(422, "invalid_request");
                assert_eq!(error["param"], *param, "{body}: {error}");
                let message = error["message"].as_str().unwrap();
                assert!(message.contains(param), "the message names the field: {error}");
            }
        }
    });
}

#[test]
fn json_that_is_not_an_object_is_422() {
    with_unasked_upstream(&[], |proxy| {
        for path in LLM_PATHS {
            for body in [json!([]), json!("question"), json!(null), json!(42), json!(["question"])] {
                proxy.call(&post(path, &body)).expect_error(422, "invalid_request");
            }
        }
    });
}

#[test]
fn numbers_beyond_every_range_are_the_clients_mistake_and_never_ours() {
    with_unasked_upstream(&[], |proxy| {
        for path in LLM_PATHS {
            for number in ["1e400", "-1e400", "1e-400000", "18446744073709551616", "-9223372036854775809", "1e308"] {
                for field in ["question", "max_tokens"] {
                    let body = match field {
                        "question" => format!("{{\"question\":{number}}}"),
                        _ => format!("{{\"question\":\"a\",\"{field}\":{number}}}"),
                    };
                    let response = proxy.call(&post_bytes(path, body.clone()));
                    assert_eq!(response.expect_error(422, "invalid_request")["param"], field, "{body}");
                }
            }
        }
    });
}

#[test]
fn a_sane_request_id_of_the_client_is_kept() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1")]).start();
    for id in ["a", "req-1_2.3", "01ARZ3NDEKTSV4RRFFQ69G5FAV", &"x".repeat(128)] {
        let response = proxy.call(&post("/api/ask", &question()).header("X-Request-Id", id));
        assert_eq!(response.header("X-Request-Id"), Some(id));
        assert_eq!(response.expect_error(401, "unauthorized")["request_id"], id);
        let answered = post("/api/ask", &question()).key("secret1").header("X-Request-Id", id);
        assert_eq!(proxy.call(&answered).header("X-Request-Id"), Some(id));
    }
}

#[test]
fn an_insane_or_missing_request_id_is_replaced() {
    let proxy = Proxy::start();
    let mut seen = Vec::new();
    for id in ["", " ", "two words", "a\"b", "a;b", "<script>", "a/b", &"x".repeat(129)] {
        let response = proxy.call(&get("/nowhere").header("X-Request-Id", id));
        response.expect_error(404, "not_found");
        seen.push(response.header("X-Request-Id").expect("an id").to_owned());
    }
    let response = proxy.call(&get("/nowhere"));
    seen.push(response.header("X-Request-Id").expect("an id").to_owned());
    assert!(seen.iter().all(|id| is_sane_id(id) && id != "two words"), "{seen:?}");
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count, "each request has its own: {seen:?}");
}

#[test]
fn a_body_that_does_not_come_in_time_is_408() {
    let proxy = Proxy::start();
    let mut waiting = LLM_PATHS.map(|path| {
        let mut connection = proxy.connect().patient_for(Duration::from_secs(75));
        connection.send(&post_bytes(path, "{\"quest").header("Content-Length", "500"));
        connection
    });
    for connection in &mut waiting {
        connection.read_response().expect_error(408, "request_timeout");
        assert!(connection.is_closed_by_server(), "what comes later is not a request");
    }
}

#[test]
fn a_full_queue_is_503_overloaded_at_once_while_everything_else_answers() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::answering(move |request| {
        let mut steps = vec![Step::Wait(held.clone())];
        steps.extend(if request.is_streaming() { streamed(&["at", "last"]) } else { answer("at last") });
        steps
    });
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").set("QUEUE_SIZE", "1").start();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let ask = |number: usize| {
            let (tell, proxy) = (tell.clone(), &proxy);
            let path = LLM_PATHS[number % 2];
            scope.spawn(move || tell.send(proxy.call(&post(path, &question()))).expect("the test listens"));
        };
        ask(0);
        upstream.wait_for_calls(1);
        (1..6).for_each(ask);
        for _ in 0..4 {
            told.recv().unwrap().expect_error(503, "overloaded");
        }
        for target in ["/livez", "/readyz", "/api/history"] {
            assert_eq!(proxy.get(target).status, 200, "{target} waits behind nobody");
        }
        proxy.get("/nowhere").expect_error(404, "not_found");
        proxy.call(&post("/api/ask", &json!({}))).expect_error(422, "invalid_request");
        assert_eq!(upstream.calls(), 1);
        gate.open();
        for _ in 0..2 {
            let response = told.recv().unwrap();
            assert_eq!(response.status, 200, "running or queued, it is answered: {response:?}");
        }
    });
    assert_eq!(upstream.calls(), 2);
}

/// Also one that waits for its client's next question.
#[test]
fn a_worker_that_has_answered_is_no_reason_to_refuse_anybody() {
    let proxy = Proxy::with(&[("WORKERS", "1"), ("QUEUE_SIZE", "0"), ("MOCK_DELAY_MS", "0")]).start();
    let mut clients = [proxy.connect(), proxy.connect(), proxy.connect()];
    for number in 0..60 {
        let response = clients[number % 3].exchange(&post("/api/ask", &question()));
        assert_eq!(response.status, 200, "one question at a time, number {number}: {response:?}");
    }
}

/// A worker stays with who asks again at once, but not while somebody else waits.
#[test]
fn who_asks_on_and_on_keeps_nobody_waiting() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::answering(move |_| [vec![Step::Wait(held.clone())], answer("Yes")].concat());
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").set("QUEUE_SIZE", "1").start();
    let (mut greedy, mut other) = (proxy.connect(), proxy.connect());
    // All at once, so that each is there when the one before is answered.
    let on_and_on = post("/api/ask", &json!({"question": "And then?"})).bytes().repeat(5);
    greedy.send_bytes(on_and_on);
    upstream.wait_for_calls(1);
    other.send(&post("/api/ask", &question()));
    eventually("queued", || proxy.get("/readyz").json()["queue_length"] == 1);
    gate.open();
    assert_eq!(other.read_response().status, 200);
    for _ in 0..5 {
        assert_eq!(greedy.read_response().status, 200);
    }
    let asked: Vec<String> = upstream.requests().iter().map(|request| request.question()).collect();
    assert_eq!(asked[1], "What is it?", "{asked:?}");
}

#[test]
fn trouble_with_the_database_is_503_history_unavailable_and_passes_by_itself() {
    let proxy = Proxy::start();
    proxy.answer("Before?");
    let other = proxy.database();
    other.execute_batch("BEGIN EXCLUSIVE").expect("the lock is free");
    let ask = post("/api/ask", &question());
    let mut connection = proxy.connect().patient_for(Duration::from_secs(40));
    connection.exchange(&ask).expect_error(503, "history_unavailable");
    assert_eq!(proxy.get("/livez").status, 200);
    eventually("not ready while history cannot be written", || {
        let response = proxy.get("/readyz");
        response.status == 503 && response.header("Retry-After").is_some()
    });
    other.execute_batch("ROLLBACK").expect("the lock is given back");
    eventually("ready again", || proxy.get("/readyz").status == 200);
    assert_eq!(proxy.call(&ask).status, 200);
    assert_eq!(proxy.count_rows(), 2, "what was refused is not stored");
}

/// A trial write goes where pairs go: nobody pays for an answer that cannot be kept.
#[test]
fn where_pairs_cannot_be_kept_although_the_file_can_be_written_the_llm_is_asked_once() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = Proxy::facing(&upstream).start();
    let refuse = "CREATE TRIGGER no BEFORE INSERT ON history BEGIN SELECT raise(ABORT, 'no'); END";
    proxy.database().execute_batch(refuse).expect("made");
    for _ in 0..4 {
        proxy.ask("Well?").expect_error(503, "history_unavailable");
    }
    proxy.call(&streaming("Well?")).expect_error(503, "history_unavailable");
    assert_eq!((upstream.calls(), proxy.get("/readyz").status), (1, 503));
    proxy.database().execute_batch("DROP TRIGGER no").expect("gone");
    eventually("ready again", || proxy.get("/readyz").status == 200);
    assert_eq!(proxy.ask("Well?").status, 200);
    assert_eq!(proxy.count_rows(), 1, "what was tried is not there");
}

#[test]
fn a_stream_that_cannot_be_stored_ends_in_an_error_and_not_in_done() {
    let proxy = Proxy::start();
    let other = proxy.database();
    other.execute_batch("BEGIN EXCLUSIVE").expect("the lock is free");
    let connection = proxy.connect().patient_for(Duration::from_secs(40));
    let mut stream = connection.stream(&streaming("What is it?"));
    assert_eq!(stream.head.status, 200);
    stream.expect_failure("history_unavailable");
    other.execute_batch("ROLLBACK").expect("the lock is given back");
    eventually("streams are stored again", || {
        let mut again = proxy.stream("And now?");
        again.events().last().is_some_and(|last| last == "[DONE]")
    });
}

#[test]
fn errors_are_errors_for_http_1_0_clients_too() {
    let proxy = Proxy::start();
    proxy.call(&get("/nowhere").version_1_0().without("Host")).expect_error(404, "not_found");
    proxy.call(&post("/api/ask", &json!({})).version_1_0()).expect_error(422, "invalid_request");
}

/// Also where the head itself is refused, as far as it can be read.
#[test]
fn a_refused_head_is_answered_under_the_clients_own_id() {
    let proxy = Proxy::start();
    for (line, fields, status) in [
        ("POST /api/ask HTTP/1.1", "Host: a\r\nExpect: more\r\n", 417),
        ("GET /livez HTTP/2.0", "Host: a\r\n", 505),
        ("GET /livez HTTP/1.1", "", 400),
        ("HEAD /livez HTTP/1.1", "", 400),
    ] {
        let mut connection = proxy.connect();
        connection.send_bytes(format!("{line}\r\n{fields}X-Request-Id: mine-{status}\r\n\r\n"));
        let response = if line.starts_with("HEAD") { connection.read_bodyless() } else { connection.read_response() };
        assert_eq!((response.status, response.header("X-Request-Id")), (status, Some(&*format!("mine-{status}"))));
        assert!(connection.is_closed_by_server(), "and nothing more is said");
        let (method, path) = (line.split(' ').next().expect("a method"), line.split(' ').nth(1).expect("a path"));
        proxy.wait_for_line(|line| line.contains(&format!("method={method} path={path} status={status}")));
    }
}
