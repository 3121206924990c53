//! An LLM behind https, as most are.

use crate::support::client::{post, streaming};
use crate::support::gate::Gate;
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::tls::{AUTHORITY, TlsFront};
use crate::support::upstream::{FakeUpstream, Step, answer, completion, delta, event, reply_json, send, stream_head, streamed};
use crate::support::{PATIENCE, eventually};
use rustls::HandshakeKind;
use serde_json::json;
use std::io::Read;

/// A server that asks `upstream` by https, and trusts it.
fn facing(upstream: &FakeUpstream, front: &TlsFront) -> Setup {
    Proxy::facing(upstream).set("OPENAI_BASE_URL", front.url()).set("UPSTREAM_CA_FILE", AUTHORITY)
}

#[test]
fn answers_and_streams_come_through_tls() {
    let upstream = FakeUpstream::answering(|request| match request.is_streaming() {
        true => streamed(&["One ", "two"]),
        false => answer("Yes"),
    });
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).set("WORKERS", "1").start();
    assert_eq!(proxy.answer("What is it?")["answer"], "Yes");
    assert_eq!(proxy.stream("Count!").events().last().map(String::as_str), Some("[DONE]"));
    assert_eq!(proxy.newest_of(2)["answer"], "One two");
    assert_eq!(upstream.requests()[1].header("Authorization"), Some(&*format!("Bearer {UPSTREAM_KEY}")));
    assert_eq!(front.handshakes(), [HandshakeKind::Full], "one connection is kept for both");
}

#[test]
fn what_is_large_comes_through_tls_too() {
    let (question, text) = ("q".repeat(90_000), "a".repeat(3_000_000));
    let head = format!("HTTP/1.1 200 OK\r\nX-Large: {}\r\n", "h".repeat(40_000));
    let body = completion(&text).to_string();
    let whole = format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let upstream = FakeUpstream::script(vec![vec![send(whole)], streamed(&[&text])]);
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).start();
    assert_eq!(proxy.answer(&question)["answer"], text);
    assert_eq!(proxy.stream(&question).events()[0], delta(&text));
    assert!(upstream.requests().iter().all(|request| request.question() == question));
}

#[test]
fn events_arrive_one_by_one_through_tls_and_a_client_that_leaves_ends_the_call() {
    let [first, second]: [Gate; 2] = Gate::several();
    let begun = vec![stream_head(), Step::Wait(first.clone()), event(&delta("One ")), Step::Wait(second.clone())];
    let upstream = FakeUpstream::always([begun, vec![event(&delta("two")), Step::Silence]].concat());
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).start();
    let mut connection = proxy.connect();
    connection.send(&streaming("Count!"));
    first.open();
    let mut stream = connection.into_stream();
    stream.expect_event(&delta("One "));
    second.open();
    stream.expect_event(&delta("two"));
    drop(stream);
    upstream.wait_until_left(1);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "client_gone");
}

#[test]
fn a_second_connection_resumes_the_session_of_the_first() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::answering(move |request| match request.question().as_str() {
        "Wait!" => [vec![Step::Wait(held.clone())], answer("Yes")].concat(),
        _ => answer("Yes"),
    });
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).set("WORKERS", "2").start();
    proxy.answer("First?");
    let mut waiting = proxy.connect();
    waiting.send(&post("/api/ask", &json!({"question": "Wait!"})));
    upstream.wait_for_calls(2);
    proxy.answer("Second?");
    eventually("a second handshake", || front.handshakes().len() == 2);
    assert_eq!(front.handshakes(), [HandshakeKind::Full, HandshakeKind::Resumed]);
    gate.open();
    assert_eq!(waiting.read_response().status, 200);
}

/// As a server writes it that counts its answer's bytes wrongly, or answers twice.
#[test]
fn what_nobody_asked_for_answers_nobody() {
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let upstream = FakeUpstream::answering(|request| {
            let own = completion(&request.question()).to_string();
            let stolen = completion("Stolen").to_string();
            let head = |length| format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
            // So large that the surplus begins where a buffer ends.
            let own = format!("{own:0$}", 4096 - head(4000).len());
            vec![send([head(own.len()), own, head(stolen.len()), stolen].concat())]
        });
        let front = TlsFront::speaking(version, &upstream);
        let proxy = facing(&upstream, &front).start();
        for question in ["One", "Two", "Three", "Four"] {
            assert_eq!(proxy.answer(question)["answer"], question);
        }
    }
}

#[test]
fn an_answer_before_an_alert_is_one() {
    let upstream = FakeUpstream::always([answer("Yes"), vec![Step::Close]].concat());
    let front = TlsFront::failing(&upstream);
    let proxy = facing(&upstream, &front).start();
    assert_eq!(proxy.answer("What is it?")["answer"], "Yes");
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_handshake_that_stalls_is_upstream_timeout_and_a_client_that_leaves_ends_it() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("https://{}/v1", silent.local_addr().expect("its address"));
    let setup = Setup::new().set("OPENAI_API_KEY", UPSTREAM_KEY).set("OPENAI_BASE_URL", url).set("WORKERS", "1");
    let proxy = setup.set("UPSTREAM_TIMEOUT_SECS", "1").start();
    proxy.ask("What is it?").expect_error(503, "upstream_timeout");
    let (mut first, _) = silent.accept().expect("the first call");
    let proxy = proxy.setup().set("UPSTREAM_TIMEOUT_SECS", "600").start();
    let mut connection = proxy.connect();
    connection.send(&post("/api/ask", &json!({"question": "And now?"})));
    let (mut second, _) = silent.accept().expect("the second call");
    for call in [&mut first, &mut second] {
        call.set_read_timeout(Some(PATIENCE)).expect("a bound");
        call.read_exact(&mut [0]).expect("a hello");
    }
    drop(connection);
    for call in [&mut first, &mut second] {
        call.read_to_end(&mut Vec::new()).expect("and the end");
    }
}

#[test]
fn a_connection_that_the_upstream_closed_meanwhile_is_replaced() {
    let close = |text| [reply_json(200, &completion(text)), vec![Step::Close]].concat();
    let upstream = FakeUpstream::script(vec![close("One"), close("Two")]);
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).start();
    assert_eq!(proxy.answer("First?")["answer"], "One");
    upstream.wait_until_closed(1);
    assert_eq!(proxy.answer("Second?")["answer"], "Two");
    assert_eq!(upstream.calls(), 2);
}

#[test]
fn a_stream_that_breaks_off_under_tls_is_told_so() {
    let begun = vec![stream_head(), event(&delta("One ")), Step::Close];
    let upstream = FakeUpstream::always(begun);
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).start();
    let mut stream = proxy.stream("Count!");
    stream.expect_event(&delta("One "));
    stream.expect_failure("upstream_error");
}

#[test]
fn who_is_not_trusted_is_not_asked() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let front = TlsFront::of(&upstream);
    let proxy = facing(&upstream, &front).unset("UPSTREAM_CA_FILE").set("UPSTREAM_RETRIES", "2").start();
    let response = proxy.ask("What is it?");
    assert_eq!(response.header("x-should-retry"), Some("false"), "{response:?}");
    let error = response.expect_error(503, "upstream_unavailable");
    let message = error["message"].as_str().expect("a text");
    assert!(message.contains("certificate") && message.contains("UPSTREAM_CA_FILE"), "{message}");
    assert_eq!(upstream.calls(), 0);
    assert!(proxy.get("/metrics").everything().contains("\nai_proxy_upstream_attempts_total 1\n"), "it is not tried again");
}

#[test]
fn a_file_without_certificates_is_refused_at_the_start() {
    let cut = std::fs::read_to_string(AUTHORITY).expect("the authority").replace("-----END", "");
    for (content, why) in [("", "no certificate"), ("hello\n", "no certificate"), (&cut, "not PEM")] {
        let setup = Setup::new().file("ca.pem", content);
        let ended = setup.clone().set("UPSTREAM_CA_FILE", "ca.pem").run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains("UPSTREAM_CA_FILE: ca.pem: ") && line.contains(why), "{line}");
    }
    let ended = Setup::new().set("UPSTREAM_CA_FILE", "absent.pem").run(&[]);
    assert!(ended.expect_refusal(2).contains("UPSTREAM_CA_FILE: absent.pem: it cannot be read"));
}
