//! The error table: what the upstream does wrong, and what the client sees of it.

use crate::support::PATIENCE;
use crate::support::client::{Response, post, streaming};
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::upstream::{
    FakeUpstream, RefusingPort, Step, answer, choice_that_failed, completion, delta, event, piece, refusal, reply, reply_json,
    send, stream_head, streamed,
};
use rustix::net::sockopt;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

/// The same question to both endpoints.
fn on_both(proxy: &Proxy, check: impl Fn(Response)) {
    let ask = post("/api/ask", &json!({"question": "What is it?"}));
    for request in [ask, streaming("What is it?")] {
        let mut connection = proxy.connect().patient_for(PATIENCE * 3);
        check(connection.exchange(&request));
    }
}

/// Both endpoints answer this script with this error; nothing is remembered.
#[track_caller]
fn expect_both(steps: Vec<Step>, status: u16, code: &str) {
    expect_both_with(&[], steps, status, code);
}

#[track_caller]
fn expect_both_with(settings: &[(&str, &str)], steps: Vec<Step>, status: u16, code: &str) {
    let upstream = FakeUpstream::always(steps);
    let setup = Proxy::facing(&upstream);
    let setup = settings.iter().fold(setup, |setup, (name, value)| setup.set(name, value));
    let proxy = setup.start();
    on_both(&proxy, |response| {
        response.expect_error(status, code);
    });
    assert_eq!(upstream.calls(), 2, "once each");
    assert_eq!(proxy.count_rows(), 0, "a failure before the answer is not a pair");
}

fn answer_either(request_is_streaming: bool) -> Vec<Step> {
    if request_is_streaming { streamed(&["Yes"]) } else { answer("Yes") }
}

#[test]
fn every_status_of_the_upstream_has_its_mapping() {
    // The question is the status that the upstream gives.
    let upstream = FakeUpstream::answering(|request| {
        let status: u16 = request.question().parse().expect("a status");
        refusal(status, &format!("upstream said {status}"))
    });
    let proxy = Proxy::facing(&upstream).start();
    let mappings = [
        (400, 400, "upstream_rejected"),
        (413, 400, "upstream_rejected"),
        (422, 400, "upstream_rejected"),
        (429, 429, "upstream_rate_limited"),
        (401, 502, "upstream_error"),
        (402, 502, "upstream_error"),
        (403, 502, "upstream_error"),
        (404, 502, "upstream_error"),
        (500, 502, "upstream_error"),
        (502, 502, "upstream_error"),
        (504, 502, "upstream_error"),
        (520, 502, "upstream_error"),
        (503, 503, "upstream_unavailable"),
        (529, 503, "upstream_unavailable"),
        (408, 503, "upstream_timeout"),
    ];
    for path in ["/api/ask", "/api/streaming"] {
        for (theirs, ours, code) in mappings {
            let response = proxy.call(&post(path, &json!({"question": theirs.to_string()})));
            let error = response.expect_error(ours, code);
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(&format!("upstream said {theirs}")), "their words help: {error}");
        }
    }
    assert_eq!(upstream.calls(), 2 * mappings.len(), "without retries, once each");
}

#[test]
fn the_upstreams_words_reach_the_client_in_whatever_shape_they_came() {
    let shapes = [
        reply_json(400, &json!({"error": {"message": "the words", "code": 400}})),
        reply_json(400, &json!({"error": "the words"})),
        reply_json(400, &json!({"object": "error", "message": "the words", "code": 400})),
        reply_json(400, &json!({"detail": "the words"})),
        reply_json(400, &json!({"error": "", "message": "the words"})),
        reply(400, &[("Content-Type", "text/plain")], "the words"),
    ];
    for steps in shapes {
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        on_both(&proxy, |response| {
            let error = response.expect_error(400, "upstream_rejected");
            assert!(error["message"].as_str().unwrap().contains("the words"), "{error}");
        });
    }
}

#[test]
fn an_error_without_words_is_still_an_error() {
    expect_both(reply(500, &[], ""), 502, "upstream_error");
    expect_both(reply(500, &[("Content-Type", "application/json")], "{"), 502, "upstream_error");
    expect_both(reply_json(500, &json!({"error": null})), 502, "upstream_error");
    expect_both(reply_json(500, &json!([])), 502, "upstream_error");
    let upstream = FakeUpstream::always(reply(500, &[], ""));
    let error = Proxy::facing(&upstream).start().ask("Well?").expect_error(502, "upstream_error");
    assert_eq!(error["message"], "the LLM failed (500)");
}

/// As the servers of llama.cpp and Apache say whose idle connections keep a thread from others.
#[test]
fn a_connection_whose_requests_the_upstream_counts_is_not_kept() {
    for (keep_alive, connections) in [("timeout=5, max=100", 3), ("timeout=5", 1)] {
        let upstream = FakeUpstream::answering(move |request| {
            if request.method == "POST" && request.is_streaming() {
                let fields = format!("Transfer-Encoding: chunked\r\nKeep-Alive: {keep_alive}\r\n");
                let head = send(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{fields}\r\n"));
                return [head].into_iter().chain(streamed(&["Yes"]).into_iter().skip(1)).collect();
            }
            let body = if request.method == "GET" { json!({"data": []}) } else { completion("Yes") };
            reply(200, &[("Content-Type", "application/json"), ("Keep-Alive", keep_alive)], &body.to_string())
        });
        let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
        proxy.answer("Well?");
        proxy.stream("Well?").events();
        assert_eq!(proxy.get("/v1/models").status, 200);
        upstream.wait_until_closed(if connections > 1 { 3 } else { 0 });
        assert_eq!((upstream.calls(), upstream.connections()), (3, connections), "{keep_alive}");
    }
}

#[test]
fn an_error_of_any_size_stays_small() {
    let upstream = FakeUpstream::always(refusal(500, &"many words ".repeat(200_000)));
    let proxy = Proxy::facing(&upstream).start();
    on_both(&proxy, |response| {
        response.expect_error(502, "upstream_error");
        assert!(response.body.len() < 100_000, "{} bytes", response.body.len());
    });
}

#[test]
fn the_upstreams_key_and_the_credentials_in_its_url_never_reach_the_client() {
    let echo = format!("Incorrect API key: {UPSTREAM_KEY}, user url-user, password url-password");
    for steps in [
        refusal(401, &echo),
        refusal(400, &echo),
        refusal(429, &echo),
        reply(500, &[("Content-Type", "text/plain"), ("X-Echo", UPSTREAM_KEY)], &echo),
        reply_json(200, &json!({"error": {"message": echo, "code": 401}})),
        vec![stream_head(), event(&json!({"error": {"message": echo}}).to_string()), Step::Close],
    ] {
        let upstream = FakeUpstream::always(steps);
        let url = format!("http://url-user:url-password@{}/v1", upstream.address());
        let mut proxy = Proxy::facing(&upstream).set("OPENAI_BASE_URL", url).start();
        on_both(&proxy, |response| {
            assert_ne!(response.status, 200);
            let seen = response.everything();
            assert!(!seen.contains(UPSTREAM_KEY), "{seen}");
            assert!(!seen.contains("url-password"), "{seen}");
        });
        proxy.expect_no_line(|line| line.contains(UPSTREAM_KEY) || line.contains("url-password"));
    }
}

#[test]
fn the_upstreams_retry_after_is_passed_on_as_it_came() {
    for after in ["7", "Fri, 31 Dec 2100 23:59:59 GMT", "259200"] {
        let body = json!({"error": {"message": "slow down"}}).to_string();
        let upstream = FakeUpstream::always(reply(429, &[("Retry-After", after)], &body));
        let proxy = Proxy::facing(&upstream).start();
        on_both(&proxy, |response| {
            response.expect_error(429, "upstream_rate_limited");
            assert_eq!(response.header("Retry-After"), Some(after), "{response:?}");
        });
    }
}

#[test]
fn what_may_pass_is_retried_and_then_answered() {
    for status in [408, 429, 500, 502, 503, 504, 529] {
        let upstream =
            FakeUpstream::script(vec![refusal(status, "not now"), answer("Yes"), refusal(status, "not now"), streamed(&["Yes"])]);
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").start();
        on_both(&proxy, |response| assert_eq!(response.status, 200, "after {status}: {response:?}"));
        assert_eq!(upstream.calls(), 4);
        assert_eq!(proxy.count_rows(), 2, "one pair for each answer, none for an attempt");
    }
}

#[test]
fn the_retries_are_counted_and_the_last_failure_is_reported() {
    for (status, ours, code) in
        [(500, 502, "upstream_error"), (429, 429, "upstream_rate_limited"), (503, 503, "upstream_unavailable")]
    {
        let upstream = FakeUpstream::always(refusal(status, "never"));
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "2").start();
        proxy.ask("What is it?").expect_error(ours, code);
        assert_eq!(upstream.calls(), 3);
    }
}

#[test]
fn two_retries_are_the_default() {
    let upstream = FakeUpstream::always(refusal(500, "never"));
    let proxy = Proxy::facing(&upstream).unset("UPSTREAM_RETRIES").start();
    proxy.ask("What is it?").expect_error(502, "upstream_error");
    assert_eq!(upstream.calls(), 3);
}

#[test]
fn what_will_not_pass_is_not_retried() {
    for status in [400, 401, 402, 403, 404, 413, 422] {
        let upstream = FakeUpstream::always(refusal(status, "no"));
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "3").start();
        on_both(&proxy, |response| assert!(response.status == 400 || response.status == 502, "{response:?}"));
        assert_eq!(upstream.calls(), 2, "{status} is final");
    }
}

#[test]
fn a_stream_that_has_begun_is_not_retried() {
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), Step::Close]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "3").start();
    proxy.stream("What is it?").events();
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_retry_after_that_fits_is_waited_for() {
    let soon = reply(503, &[("Retry-After", "1")], "");
    let upstream = FakeUpstream::script(vec![soon, answer("Yes")]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").start();
    let started = Instant::now();
    proxy.answer("What is it?");
    assert!(started.elapsed() >= Duration::from_secs(1), "asked again after {:?}", started.elapsed());
    assert_eq!(upstream.calls(), 2);
}

#[test]
fn a_wait_in_milliseconds_comes_first() {
    let soon = reply(429, &[("Retry-After", "3600"), ("retry-after-ms", "1")], "");
    let upstream = FakeUpstream::script(vec![soon, answer("Yes")]);
    Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").start().answer("What is it?");
    assert_eq!(upstream.calls(), 2);
}

/// As OpenAI's own clients have it: who is overrun is not to be asked at once, and clocks differ.
#[test]
fn a_retry_after_of_nothing_is_none() {
    for (name, value) in [("Retry-After", "0"), ("Retry-After", "Thu, 01 Jan 1970 00:00:00 GMT"), ("retry-after-ms", "0")] {
        let upstream = FakeUpstream::always(reply(429, &[(name, value)], ""));
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "2").start();
        let started = Instant::now();
        let response = proxy.ask("What is it?");
        // The shortest of both waits.
        assert!(started.elapsed() >= Duration::from_millis(125 + 250), "{value}: gave up after {:?}", started.elapsed());
        response.expect_error(429, "upstream_rate_limited");
        assert_eq!(response.header(name), Some(value));
        assert_eq!(upstream.calls(), 3);
    }
}

#[test]
fn a_retry_after_beyond_the_time_left_is_not_waited_for() {
    for after in ["3600", "99999999999999999999"] {
        let upstream = FakeUpstream::always(reply(429, &[("Retry-After", after), ("retry-after-ms", "3600000")], ""));
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "3").start();
        let response = proxy.ask("What is it?");
        response.expect_error(429, "upstream_rate_limited");
        assert_eq!(response.header("Retry-After"), Some(after));
        assert_eq!(response.header("retry-after-ms"), Some("3600000"), "which some ask alone");
        assert_eq!(upstream.calls(), 1, "an early retry would only be refused again");
    }
}

#[test]
fn a_refused_connection_is_503_upstream_unavailable() {
    let nobody = RefusingPort::new();
    for retries in ["0", "1"] {
        let setup = Setup::new().set("OPENAI_API_KEY", UPSTREAM_KEY).set("OPENAI_BASE_URL", nobody.url());
        let proxy = setup.set("UPSTREAM_RETRIES", retries).start();
        on_both(&proxy, |response| {
            response.expect_error(503, "upstream_unavailable");
        });
    }
}

#[test]
fn a_name_that_does_not_resolve_is_503_upstream_unavailable() {
    let setup = Setup::new().set("OPENAI_API_KEY", UPSTREAM_KEY).set("UPSTREAM_RETRIES", "0");
    // Where name servers do not answer, the C library takes a minute to say so.
    let setup = setup.set("RES_OPTIONS", "timeout:1 attempts:1");
    let proxy = setup.set("OPENAI_BASE_URL", "http://nothing.invalid/v1").start();
    on_both(&proxy, |response| {
        let error = response.expect_error(503, "upstream_unavailable").to_string();
        assert!(error.contains("cannot be resolved: ") && error.contains("check OPENAI_BASE_URL"), "{error}");
    });
}

#[test]
fn an_upstream_that_does_not_speak_tls_is_503_upstream_unavailable() {
    let plain = FakeUpstream::always(answer("Yes"));
    let url = format!("https://{}/v1", plain.address());
    let mut proxy = Proxy::facing(&plain).set("OPENAI_BASE_URL", url).start();
    proxy.ask("What is it?").expect_error(503, "upstream_unavailable");
    proxy.expect_no_line(|line| line.contains(UPSTREAM_KEY));
}

#[test]
fn a_connection_that_ends_before_the_answer_is_503_upstream_unavailable() {
    expect_both(vec![Step::Reset], 503, "upstream_unavailable");
    expect_both(vec![Step::Close], 503, "upstream_unavailable");
    // As one does that speaks TLS only.
    let upstream = FakeUpstream::always(vec![Step::Close]);
    let error = Proxy::facing(&upstream).start().ask("What is it?").expect_error(503, "upstream_unavailable");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("http or https")), "{error}");
}

#[test]
fn an_upstream_that_is_too_slow_is_503_upstream_timeout() {
    let settings = [("UPSTREAM_TIMEOUT_SECS", "1")];
    expect_both_with(&settings, vec![Step::Silence], 503, "upstream_timeout");
}

#[test]
fn an_answer_that_stops_coming_is_503_upstream_timeout() {
    let begun = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{\"choices\":";
    let upstream = FakeUpstream::always(vec![send(begun), Step::Silence]);
    let setup = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "1");
    let proxy = setup.set("UPSTREAM_TIMEOUT_SECS", "1").start();
    proxy.ask("What is it?").expect_error(503, "upstream_timeout");
    upstream.wait_until_left(1);
}

#[test]
fn all_attempts_together_do_not_outlast_the_timeout() {
    let upstream = FakeUpstream::always(vec![Step::Silence]);
    let setup = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1");
    let proxy = setup.set("UPSTREAM_RETRIES", "10").start();
    let started = Instant::now();
    on_both(&proxy, |response| {
        response.expect_error(503, "upstream_timeout");
    });
    assert!(started.elapsed() < Duration::from_secs(8), "took {:?}", started.elapsed());
    upstream.wait_until_left(2);
}

#[test]
fn a_cut_body_is_502_upstream_bad_answer() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    let body = completion("Yes").to_string();
    let half = &body[..body.len() / 2];
    let counted = format!("{head}Content-Length: {}\r\n\r\n{half}", body.len());
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
    for steps in [
        vec![send(counted.clone()), Step::Close],
        vec![send(counted), Step::Reset],
        vec![send(chunked.clone()), piece(half), Step::Close],
        // All of the JSON is there, the end of the body is not.
        vec![send(chunked), piece(&body), Step::Close],
        vec![send(format!("{head}Connection: close\r\n\r\n{half}")), Step::Close],
    ] {
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        proxy.ask("What is it?").expect_error(502, "upstream_bad_answer");
        assert_eq!(proxy.count_rows(), 0);
    }
}

#[test]
fn an_answer_that_is_none_is_502_upstream_bad_answer_on_both_endpoints() {
    let json_head = [("Content-Type", "application/json")];
    for steps in [
        reply(200, &[("Content-Type", "text/html")], "<html>Login</html>"),
        reply(200, &json_head, "not json"),
        reply(200, &json_head, ""),
        reply(200, &json_head, "\"Paris\""),
        reply(200, &json_head, "[]"),
        reply_json(200, &json!({})),
        reply_json(200, &json!({"choices": []})),
        reply_json(200, &json!({"choices": null})),
        reply_json(200, &json!({"choices": [{}]})),
        reply_json(200, &json!({"choices": "Paris"})),
        reply_json(200, &json!({"error": {"message": "no credits", "code": 402}})),
        reply_json(200, &json!({"error": {"message": "no credits", "code": "x"}, "choices": []})),
        reply_json(200, &json!({"error": "no credits"})),
        reply_json(200, &choice_that_failed(402)),
        reply(204, &[], ""),
    ] {
        expect_both(steps, 502, "upstream_bad_answer");
    }
}

#[test]
fn an_answer_that_is_not_utf8_is_502_upstream_bad_answer() {
    let body = completion("PARIS").to_string().into_bytes();
    let body: Vec<u8> = body.iter().map(|&byte| if byte == b'P' { 0xff } else { byte }).collect();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    let upstream = FakeUpstream::always(vec![send([head.into_bytes(), body].concat())]);
    let proxy = Proxy::facing(&upstream).start();
    proxy.ask("What is it?").expect_error(502, "upstream_bad_answer");
}

#[test]
fn the_words_of_an_error_inside_a_200_reach_the_client() {
    let error = json!({"error": {"message": "the words", "code": 502, "metadata": {"provider_name": "x"}}});
    let upstream = FakeUpstream::always(reply_json(200, &error));
    let proxy = Proxy::facing(&upstream).start();
    on_both(&proxy, |response| {
        let error = response.expect_error(502, "upstream_bad_answer");
        assert!(error["message"].as_str().unwrap().contains("the words"), "{error}");
    });
}

/// Who sees by the head that it will not take the body need not read it.
#[test]
fn an_answer_that_comes_before_the_whole_request_was_taken_is_read() {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}/v1", upstream.local_addr().unwrap());
    let calls = thread::spawn(move || {
        for call in 1.. {
            let (mut client, _) = upstream.accept().unwrap();
            // The sender is to find its end closed before all is sent.
            sockopt::set_socket_recv_buffer_size(&client, 4096).unwrap();
            let mut head = [0; 2048];
            let read = client.read(&mut head).unwrap();
            if head[..read].starts_with(b"GET /v1/models") {
                return call - 1;
            }
            client.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large").unwrap();
        }
        0
    });
    let proxy = Setup::new()
        .set("OPENAI_BASE_URL", &base)
        .set("OPENAI_API_KEY", "k")
        .set("MAX_QUESTION_CHARS", "3000000")
        .set("MAX_BODY_BYTES", "4000000")
        .start();
    for _ in 0..4 {
        let error = proxy.ask(&"long ".repeat(400_000)).expect_error(400, "upstream_rejected");
        assert!(error["message"].as_str().unwrap().contains("too large"), "{error}");
    }
    proxy.get("/v1/models");
    assert_eq!(calls.join().unwrap(), 4, "once each");
}

#[test]
fn an_answer_that_is_not_http_is_a_failure_of_the_upstream() {
    for said in ["SSH-2.0-OpenSSH_9.9\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Ty", "HTTP/1.1 999999 ?\r\n\r\n"] {
        let upstream = FakeUpstream::always(vec![send(said), Step::Close]);
        let proxy = Proxy::facing(&upstream).start();
        on_both(&proxy, |response| {
            assert!(response.status == 502 || response.status == 503, "{response:?}");
            let code = response.json()["error"]["code"].as_str().map(str::to_owned);
            response.expect_error(response.status, &code.expect("a code"));
        });
    }
}

#[test]
fn an_ipv6_address_of_the_upstream_stands_in_brackets() {
    // Where there is none there is nothing to ask.
    let Ok(listener) = std::net::TcpListener::bind((std::net::Ipv6Addr::LOCALHOST, 0)) else { return };
    let address = listener.local_addr().expect("its address");
    let asked = std::thread::spawn(move || listener.accept().map(drop));
    let nobody = FakeUpstream::always(answer("never"));
    let proxy = Proxy::facing(&nobody).set("OPENAI_BASE_URL", format!("http://{address}/v1")).start();
    let error = proxy.ask("What is it?").expect_error(503, "upstream_unavailable");
    assert!(!error["message"].as_str().is_some_and(|text| text.contains("resolved")), "{error}");
    // So it was connected to.
    asked.join().expect("it does not panic").expect("accepted");
}

/// Tokens of cloud providers have thousands of characters.
#[test]
fn a_long_key_is_sent_as_it_is() {
    let upstream = FakeUpstream::answering(|request| answer_either(request.is_streaming()));
    let key = "k".repeat(12_000);
    let proxy = Proxy::facing(&upstream).set("OPENAI_API_KEY", &key).start();
    on_both(&proxy, |response| assert_eq!(response.status, 200, "{response:?}"));
    assert!(upstream.requests().iter().all(|request| request.header("Authorization") == Some(&*format!("Bearer {key}"))));
}

#[test]
fn the_key_does_not_follow_a_redirect() {
    let elsewhere = FakeUpstream::answering(|request| answer_either(request.is_streaming()));
    let location = format!("{}/chat/completions", elsewhere.url());
    for status in [301, 302, 303, 307, 308] {
        let upstream = FakeUpstream::always(reply(status, &[("Location", &location)], ""));
        let proxy = Proxy::facing(&upstream).start();
        on_both(&proxy, |response| assert_eq!(response.status, 502, "{response:?}"));
    }
    let keys = elsewhere.requests().iter().filter(|request| request.header("Authorization").is_some()).count();
    assert_eq!(keys, 0);
}

#[test]
fn service_goes_on_after_every_kind_of_failure() {
    let failures = [
        refusal(500, "no"),
        vec![Step::Reset],
        vec![Step::Close],
        reply(200, &[], "not json"),
        vec![send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"), Step::Close],
    ];
    // Each on a connection of its own: what ends a kept one may be asked again.
    let last = |steps: &[Step]| [steps, &[Step::Close]].concat();
    let script = failures.iter().flat_map(|failure| [last(failure), last(&answer("Yes"))]).collect();
    let upstream = FakeUpstream::script(script);
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for (number, _) in failures.iter().enumerate() {
        assert!(proxy.ask("Fails?").status >= 500);
        upstream.wait_until_closed(2 * number + 1);
        assert_eq!(proxy.answer("Works?")["answer"], "Yes");
        upstream.wait_until_closed(2 * number + 2);
    }
    let answers: Vec<Value> = proxy.history().iter().map(|pair| pair["answer"].clone()).collect();
    assert_eq!(answers, vec![json!("Yes"); failures.len()]);
}
