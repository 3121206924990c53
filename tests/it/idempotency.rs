//! `Idempotency-Key`: the same request twice is asked once, whatever happens in between.

use crate::support::client::{Connection, Request, Response, get, post, post_bytes};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Received, Step, answer, completion, refusal, reply_json, streamed};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};

const ASK: &str = "/api/ask";
const CHAT: &str = "/v1/chat/completions";

fn ask(question: &str) -> Request {
    post(ASK, &json!({ "question": question }))
}

fn chat(question: &str) -> Request {
    post(CHAT, &json!({"model": "m", "messages": [{"role": "user", "content": question}]}))
}

/// The same question at both endpoints that know the header.
fn both(question: &str) -> [Request; 2] {
    [ask(question), chat(question)]
}

fn keyed(request: &Request, key: &str) -> Request {
    request.clone().header("Idempotency-Key", key)
}

/// Answers with a number, so that no answer is like another.
fn numbering() -> FakeUpstream {
    let count = AtomicUsize::new(0);
    FakeUpstream::answering(move |request: &Received| {
        let text = format!("Answer {}", count.fetch_add(1, Ordering::SeqCst) + 1);
        if request.is_streaming() { streamed(&[&text]) } else { answer(&text) }
    })
}

#[track_caller]
fn expect_200(response: Response) -> Vec<u8> {
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.header("Content-Type").is_some_and(|kind| kind.starts_with("application/json")), "{response:?}");
    response.body
}

#[track_caller]
fn expect_422(response: &Response) {
    let error = response.expect_error(422, "invalid_request");
    assert_eq!(error["param"], "Idempotency-Key");
}

/// As an id that is used twice after all would make it: the pair is another key's.
#[test]
fn no_key_is_given_the_pair_of_another() {
    let upstream = numbering();
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1,bob:secret2").start();
    let request = keyed(&ask("What is it?").key("secret1"), "order-1");
    expect_200(proxy.call(&request));
    proxy.database().execute("UPDATE history SET key_name = 'bob', answer = 'private'", []).expect("one row");
    let again = proxy.call(&request);
    assert_eq!((again.status, &again.json()["answer"]), (200, &json!("Answer 2")));
}

#[test]
fn a_repetition_is_answered_from_history_byte_for_byte() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).start();
        let request = keyed(&request, "order-1");
        let first = expect_200(proxy.call(&request));
        for _ in 0..3 {
            assert_eq!(expect_200(proxy.call(&request)), first);
        }
        assert_eq!((upstream.calls(), proxy.count_rows()), (1, 1), "asked once, kept once");
        let other = expect_200(proxy.call(&keyed(&request, "order-2")));
        assert_ne!(other, first, "another key is another request");
        assert_eq!((upstream.calls(), proxy.count_rows()), (2, 2));
    }
}

#[test]
fn an_answer_of_any_bytes_is_repeated_as_it_was() {
    let said = concat!(
        " {\"id\" : \"x\",\"created\":1.0e9,\"twice\":1,\"twice\":2,\r\n",
        r#""choices":[{"index":0,"message":{"content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}]}},{"index":1,"message":{"content":"caf\u00e9 🙂"}}]}"#,
        "\n"
    );
    let upstream = FakeUpstream::always(crate::support::upstream::reply(200, &[("Content-Type", "application/json")], said));
    let proxy = Proxy::facing(&upstream).start();
    for _ in 0..2 {
        let body = expect_200(proxy.call(&keyed(&chat("What is it?"), "k")));
        assert_eq!(String::from_utf8_lossy(&body), said);
    }
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn without_the_header_each_request_is_asked() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).start();
        assert_ne!(expect_200(proxy.call(&request)), expect_200(proxy.call(&request)));
        assert_eq!(upstream.calls(), 2);
    }
}

#[test]
fn the_mock_is_asked_once_as_well() {
    let proxy = Proxy::start();
    for request in both("What is it?") {
        let request = keyed(&request, &format!("{:?}", request).len().to_string());
        let first = expect_200(proxy.call(&request));
        assert_eq!(expect_200(proxy.call(&request)), first);
    }
    assert_eq!(proxy.count_rows(), 2);
}

#[test]
fn a_restart_forgets_nothing() {
    for request in both("What is it?") {
        let upstream = numbering();
        let mut proxy = Proxy::facing(&upstream).start();
        let request = keyed(&request, "k");
        let first = expect_200(proxy.call(&request));
        proxy.kill();
        let mut proxy = proxy.setup().start();
        assert_eq!(expect_200(proxy.call(&request)), first);
        proxy.stop();
        let proxy = proxy.setup().start();
        assert_eq!(expect_200(proxy.call(&request)), first);
        expect_422(&proxy.call(&keyed(&ask("Something else?"), "k")));
        assert_eq!((upstream.calls(), proxy.count_rows()), (1, 1));
    }
}

/// Sends the same request on so many connections; returns when the first is with the upstream and all are open.
fn send_all(proxy: &Proxy, upstream: &FakeUpstream, request: &Request, count: usize) -> Vec<Connection> {
    let connections: Vec<Connection> = (0..count)
        .map(|_| {
            let mut connection = proxy.connect();
            connection.send(request);
            connection
        })
        .collect();
    upstream.wait_for_calls(1);
    eventually("all connections are open", || {
        let open = proxy.get("/readyz").json()["connections"].as_u64();
        open.is_some_and(|open| open > count as u64)
    });
    connections
}

#[test]
fn a_repetition_waits_while_the_first_runs() {
    for request in both("What is it?") {
        let gate = Gate::new();
        let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
        let proxy = Proxy::facing(&upstream).start();
        let waiting = send_all(&proxy, &upstream, &keyed(&request, "k"), 8);
        // Waiting takes no worker.
        assert_eq!(proxy.get("/readyz").json()["workers_busy"], 1);
        // Who asks something else does not wait; the upstream has it at once.
        let mut other = proxy.connect();
        other.send(&keyed(&request, "another"));
        upstream.wait_for_calls(2);
        gate.open();
        let mut bodies: Vec<Vec<u8>> = waiting.into_iter().map(|mut one| expect_200(one.read_response())).collect();
        bodies.dedup();
        assert_eq!(bodies.len(), 1, "all get the same answer");
        expect_200(other.read_response());
        assert_eq!((upstream.calls(), proxy.count_rows()), (2, 2));
    }
}

#[test]
fn a_repetition_never_waits_in_the_place_that_the_first_needs() {
    let proxy = Proxy::with(&[("WORKERS", "1")]).start();
    let (mut one, mut other) = (proxy.connect(), proxy.connect());
    for round in 0..30 {
        // The only worker has just served this connection, and is near.
        expect_200(one.exchange(&ask("Something else?")));
        let request = keyed(&ask("What is it?"), &format!("k{round}"));
        other.send(&request);
        one.send(&request);
        assert_eq!(expect_200(one.read_response()), expect_200(other.read_response()));
    }
    assert_eq!(proxy.count_rows(), 60);
}

#[test]
fn where_the_first_fails_one_of_those_that_wait_asks() {
    for request in both("What is it?") {
        let gate = Gate::new();
        let failing = [vec![Step::Wait(gate.clone())], refusal(500, "no")].concat();
        let upstream = FakeUpstream::script(vec![failing, answer("Yes")]);
        let proxy = Proxy::facing(&upstream).start();
        let waiting = send_all(&proxy, &upstream, &keyed(&request, "k"), 5);
        gate.open();
        let responses: Vec<Response> = waiting.into_iter().map(|mut one| one.read_response()).collect();
        let (fine, failed): (Vec<_>, Vec<_>) = responses.into_iter().partition(|response| response.status == 200);
        assert_eq!((fine.len(), failed.len()), (4, 1));
        failed[0].expect_error(502, "upstream_error");
        assert!(fine.iter().all(|response| response.body == fine[0].body));
        assert_eq!((upstream.calls(), proxy.count_rows()), (2, 1));
    }
}

#[test]
fn where_the_first_ones_client_leaves_the_next_asks() {
    for request in both("What is it?") {
        let upstream = FakeUpstream::script(vec![vec![Step::Silence], answer("Yes")]);
        let proxy = Proxy::facing(&upstream).start();
        let request = keyed(&request, "k");
        let mut first = proxy.connect();
        first.send(&request);
        upstream.wait_for_calls(1);
        let mut second = proxy.connect();
        second.send(&request);
        drop(first);
        expect_200(second.read_response());
        assert_eq!((upstream.calls(), proxy.count_rows()), (2, 1));
    }
}

#[test]
fn a_repetition_whose_client_leaves_does_not_wait_on() {
    for request in both("What is it?") {
        let gate = Gate::new();
        let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
        let proxy = Proxy::facing(&upstream).start();
        let request = keyed(&request, "k");
        let mut first = proxy.connect();
        first.send(&request);
        upstream.wait_for_calls(1);
        let mut second = proxy.connect();
        second.send(&request.clone().header("X-Request-Id", "second"));
        drop(second);
        proxy.wait_for_line(|line| line.contains("id=second") && line.contains("client_gone"));
        gate.open();
        expect_200(first.read_response());
        assert_eq!((upstream.calls(), proxy.count_rows()), (1, 1));
    }
}

#[test]
fn who_has_waited_as_long_as_an_answer_may_take_waits_no_longer() {
    let upstream = FakeUpstream::always(vec![Step::Silence]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1").start();
    let [request, _] = both("What is it?").map(|request| keyed(&request, "k"));
    let mut callers: Vec<Connection> = (0..5).map(|_| proxy.connect()).collect();
    callers.iter_mut().for_each(|caller| caller.send(&request));
    let code = |caller: &mut Connection| caller.read_response().json()["error"]["code"].as_str().map(str::to_owned);
    let codes: Vec<Option<String>> = callers.iter_mut().map(code).collect();
    let count = |wanted: &str| codes.iter().filter(|code| code.as_deref() == Some(wanted)).count();
    // The first asks in vain, one more may come to its turn, and the others are told.
    assert!(matches!((count("upstream_timeout"), count("overloaded")), (1, 4) | (2, 3)), "{codes:?}");
    // What was given up is not in anybody's way.
    proxy.call(&request).expect_error(503, "upstream_timeout");
}

#[test]
fn another_body_under_the_same_key_is_422() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).start();
        let first = expect_200(proxy.call(&keyed(&request, "k")));
        for other in both("Something else?") {
            expect_422(&proxy.call(&keyed(&other, "k")));
        }
        let [at_ask, at_chat] = both("What is it?");
        for same_elsewhere in [at_ask, at_chat] {
            let response = proxy.call(&keyed(&same_elsewhere, "k"));
            if response.status != 200 {
                expect_422(&response);
            }
        }
        assert_eq!(expect_200(proxy.call(&keyed(&request, "k"))), first, "the first is not spoiled by it");
        assert_eq!((upstream.calls(), proxy.count_rows()), (1, 1));
    }
}

/// It runs until the history has said so.
#[test]
fn a_request_that_is_refused_for_its_body_does_not_stand_in_for_the_first() {
    let proxy = Proxy::start();
    let [right, wrong] = ["right", "wrong"].map(|word| keyed(&ask(&word.repeat(20_000)), "k"));
    let first = expect_200(proxy.call(&right));
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| (0..200).for_each(|_| expect_422(&proxy.call(&wrong))));
        while !refused.is_finished() {
            assert_eq!(expect_200(proxy.call(&right)), first);
        }
    });
}

#[test]
fn another_body_is_422_at_once_while_the_first_runs() {
    let gate = Gate::new();
    let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
    let proxy = Proxy::facing(&upstream).start();
    let mut first = proxy.connect();
    first.send(&keyed(&ask("What is it?"), "k"));
    upstream.wait_for_calls(1);
    expect_422(&proxy.call(&keyed(&ask("Something else?"), "k")));
    expect_422(&proxy.call(&keyed(&chat("What is it?"), "k")));
    gate.open();
    expect_200(first.read_response());
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn the_same_key_of_another_client_is_another_request() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1,bob:secret2").start();
        let request = keyed(&request, "k");
        let alices = expect_200(proxy.call(&request.clone().key("secret1")));
        let bobs = expect_200(proxy.call(&request.clone().key("secret2")));
        assert_ne!(alices, bobs, "nobody is given another's answer");
        assert_eq!(expect_200(proxy.call(&request.clone().key("secret1"))), alices);
        assert_eq!(expect_200(proxy.call(&request.clone().key("secret2"))), bobs);
        assert_eq!(upstream.calls(), 2);
        proxy.call(&request.clone().key("secret3")).expect_error(401, "unauthorized");
    }
}

#[test]
fn one_client_does_not_wait_for_anothers_request_of_the_same_key() {
    let gate = Gate::new();
    let held = [vec![Step::Wait(gate.clone())], answer("Alice's")].concat();
    let upstream = FakeUpstream::script(vec![held, answer("Bob's")]);
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1,bob:secret2").start();
    let request = keyed(&ask("What is it?"), "k");
    let mut alice = proxy.connect();
    alice.send(&request.clone().key("secret1"));
    upstream.wait_for_calls(1);
    let bobs = proxy.call(&request.key("secret2")).json();
    assert_eq!(bobs["answer"], "Bob's");
    gate.open();
    assert_eq!(alice.read_response().json()["answer"], "Alice's");
}

#[test]
fn what_failed_is_asked_again() {
    let failures = [refusal(500, "no"), refusal(429, "no"), refusal(400, "no"), vec![Step::Close], reply_json(200, &json!({}))];
    for request in both("What is it?") {
        for failure in &failures {
            let failure = [&failure[..], &[Step::Close]].concat();
            let upstream = FakeUpstream::script(vec![failure, answer("Yes")]);
            let proxy = Proxy::facing(&upstream).start();
            let request = keyed(&request, "k");
            let failed = proxy.call(&request);
            assert!(failed.status >= 400, "{failed:?}");
            upstream.wait_until_closed(1);
            expect_200(proxy.call(&request));
            expect_200(proxy.call(&request));
            assert_eq!((upstream.calls(), proxy.count_rows()), (2, 1));
        }
    }
}

#[test]
fn what_was_refused_does_not_take_the_key() {
    let upstream = numbering();
    let proxy = Proxy::facing(&upstream).start();
    for (target, good) in [(ASK, ask("What is it?")), (CHAT, chat("What is it?"))] {
        let key = format!("k{target}");
        for bad in ["{", "{}"] {
            let refused = proxy.call(&keyed(&post_bytes(target, bad), &key));
            assert!(matches!(refused.status, 400 | 422), "{refused:?}");
        }
        expect_200(proxy.call(&keyed(&good, &key)));
    }
    assert_eq!(upstream.calls(), 2);
}

#[test]
fn after_a_day_the_key_is_free_again() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).start();
        let request = keyed(&request, "k");
        let first = expect_200(proxy.call(&request));
        let age = |seconds: i64| {
            let database = proxy.database();
            database.busy_timeout(crate::support::PATIENCE).expect("a timeout");
            let changed = database.execute("UPDATE idempotency SET created_at = created_at - ?1", [seconds]);
            assert_eq!(changed, Ok(1), "the note is there");
        };
        age(86_400 - 60);
        assert_eq!(expect_200(proxy.call(&request)), first, "a minute before");
        age(120);
        assert_ne!(expect_200(proxy.call(&request)), first, "a minute after");
        expect_200(proxy.call(&keyed(&request, "k")));
        assert_eq!((upstream.calls(), proxy.count_rows()), (2, 2));
    }
}

#[test]
fn a_pair_that_retention_took_is_asked_again() {
    for request in both("What is it?") {
        let upstream = numbering();
        let proxy = Proxy::facing(&upstream).set("HISTORY_MAX_ROWS", "1").start();
        let request = keyed(&request, "k");
        let first = expect_200(proxy.call(&request));
        expect_200(proxy.call(&ask("Something else?")));
        eventually("the older pair is gone", || proxy.count_rows() == 1);
        assert_ne!(expect_200(proxy.call(&request)), first);
        assert_eq!(upstream.calls(), 3);
    }
}

#[test]
fn streams_are_not_answered_from_history() {
    let upstream = numbering();
    let proxy = Proxy::facing(&upstream).start();
    let own = post("/api/streaming", &json!({"question": "What is it?"}));
    let theirs = post(CHAT, &json!({"messages": [{"role": "user", "content": "What is it?"}], "stream": true}));
    for request in [own, theirs] {
        for _ in 0..2 {
            let mut stream = proxy.connect().stream(&keyed(&request, "k"));
            assert_eq!(stream.head.status, 200);
            assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
        }
    }
    assert_eq!(upstream.calls(), 4);
}

#[test]
fn a_key_has_1_to_255_printable_characters() {
    let upstream = numbering();
    let proxy = Proxy::facing(&upstream).start();
    for request in both("What is it?") {
        for key in ["", "   ", "a\tb", "\u{e9}", &"k".repeat(256)] {
            expect_422(&proxy.call(&keyed(&request, key)));
        }
    }
    assert_eq!(upstream.calls(), 0);
    for (key, request) in ["k".repeat(255), "a \"b\"; DROP TABLE history --".to_owned()].iter().zip(both("What is it?")) {
        let first = expect_200(proxy.call(&keyed(&request, key)));
        assert_eq!(expect_200(proxy.call(&keyed(&request, key))), first);
    }
    assert_eq!(upstream.calls(), 2);
}

#[test]
fn a_repetition_is_in_the_history_once_and_says_the_model_in_the_log() {
    let upstream = FakeUpstream::always(reply_json(200, &completion("Yes")));
    let proxy = Proxy::facing(&upstream).start();
    let request = keyed(&chat("What is it?"), "k").header("X-Request-Id", "again-1");
    expect_200(proxy.call(&keyed(&chat("What is it?"), "k")));
    let response = proxy.call(&request);
    assert_eq!(response.header("X-Request-Id"), Some("again-1"));
    let line = proxy.wait_for_line(|line| line.contains("id=again-1"));
    assert!(line.contains("status=200") && line.contains("model=fake-model-1"), "{line}");
    assert!(!line.contains("What is it?"));
    let items: Value = proxy.call(&get("/api/history")).json()["items"].clone();
    assert_eq!(items.as_array().map(Vec::len), Some(1));
}
