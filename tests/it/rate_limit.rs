//! `RATE_LIMIT_PER_MINUTE`: a bucket of questions for each key, and what the client is told of it.

use crate::support::client::{Head, Request, Response, get, post, post_bytes, streaming};
use crate::support::proxy::{Proxy, Setup};
use crate::support::upstream::{FakeUpstream, Received, Step, answer, completion, refusal, reply, reply_json, streamed};
use serde_json::json;
use std::time::Duration;

const LIMIT: &str = "x-ratelimit-limit-requests";
const REMAINING: &str = "x-ratelimit-remaining-requests";
const RESET: &str = "x-ratelimit-reset-requests";

fn limited(per_minute: u32) -> Setup {
    Setup::new().set("RATE_LIMIT_PER_MINUTE", per_minute.to_string())
}

fn ask() -> Request {
    post("/api/ask", &json!({"question": "What is it?"}))
}

fn chat(stream: bool) -> Request {
    post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "What is it?"}], "stream": stream}))
}

/// Every way to ask.
fn all_ways() -> [Request; 4] {
    [ask(), streaming("What is it?"), chat(false), chat(true)]
}

fn values_of<'a>(head: &'a Head, name: &str) -> Vec<&'a str> {
    let named = head.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.as_str()).collect()
}

/// `x-ratelimit-reset-requests` in seconds: `1.5s`, `20ms`, `6m0s`.
#[track_caller]
fn seconds_of(text: &str) -> f64 {
    let (mut seconds, mut number, mut unit) = (0.0, String::new(), String::new());
    for c in format!("{text}\0").chars() {
        if (c.is_ascii_digit() || c == '.' || c == '\0') && !unit.is_empty() {
            let amount: f64 = number.parse().unwrap_or_else(|_| panic!("not a duration: {text}"));
            let factor = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)].into_iter().find(|(name, _)| *name == unit);
            seconds += amount * factor.unwrap_or_else(|| panic!("not a duration: {text}")).1;
            (number, unit) = (String::new(), String::new());
        }
        if c.is_ascii_digit() || c == '.' { number.push(c) } else { unit.push(c) }
    }
    seconds
}

/// The three headers, each once; gives what remains.
#[track_caller]
fn expect_limit(head: &Head, per_minute: u32) -> u32 {
    for name in [LIMIT, REMAINING, RESET] {
        assert_eq!(values_of(head, name).len(), 1, "{name} once: {head:?}");
    }
    assert_eq!(head.header(LIMIT), Some(per_minute.to_string().as_str()), "{head:?}");
    let reset = seconds_of(head.header(RESET).unwrap());
    assert!((0.0..=60.1).contains(&reset), "{head:?}");
    head.header(REMAINING).unwrap().parse().expect("a number")
}

/// A refusal by the limit; gives its `Retry-After`.
#[track_caller]
fn expect_limited(response: &Response, per_minute: u32) -> u64 {
    let error = response.expect_error(429, "rate_limited");
    assert_eq!(error["type"], "rate_limit_error");
    assert_eq!(expect_limit(&response.head, per_minute), 0);
    // In whole seconds, as SDKs read it.
    let after = response.header("Retry-After").and_then(|after| after.parse().ok());
    after.unwrap_or_else(|| panic!("no Retry-After: {response:?}"))
}

#[test]
fn the_limit_counts_down_and_then_refuses() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let proxy = limited(3).facing(&upstream).start();
    for remaining in [2, 1, 0] {
        let response = proxy.call(&ask());
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(expect_limit(&response.head, 3), remaining);
    }
    for _ in 0..3 {
        let after = expect_limited(&proxy.call(&ask()), 3);
        assert!((1..=20).contains(&after), "one every 20 s: {after}");
    }
    assert_eq!((upstream.calls(), proxy.count_rows()), (3, 3), "who is refused costs nothing");
}

#[test]
fn all_ways_to_ask_share_one_bucket_and_all_are_told() {
    let upstream = FakeUpstream::answering(|request| if request.is_streaming() { streamed(&["Yes"]) } else { answer("Yes") });
    let proxy = limited(4).facing(&upstream).start();
    for (request, remaining) in all_ways().iter().zip([3, 2, 1, 0]) {
        let response = proxy.call(request);
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(expect_limit(&response.head, 4), remaining);
    }
    for request in all_ways() {
        expect_limited(&proxy.call(&request), 4);
    }
    assert_eq!(upstream.calls(), 4);
}

#[test]
fn what_asks_nothing_is_not_limited() {
    let proxy = limited(1).start();
    assert_eq!(proxy.call(&ask()).status, 200);
    expect_limited(&proxy.call(&ask()), 1);
    for target in ["/api/history", "/v1/models", "/livez", "/readyz"] {
        for _ in 0..3 {
            let response = proxy.get(target);
            assert_eq!((response.status, response.header(LIMIT)), (200, None), "{target}");
        }
    }
}

#[test]
fn each_key_has_a_bucket_of_its_own() {
    let proxy = limited(2).set("API_KEYS", "alice:secret1,bob:secret2").start();
    for remaining in [1, 0] {
        assert_eq!(expect_limit(&proxy.call(&ask().key("secret1")).head, 2), remaining);
    }
    expect_limited(&proxy.call(&ask().key("secret1")), 2);
    for remaining in [1, 0] {
        let response = proxy.call(&chat(false).key("secret2"));
        assert_eq!((response.status, expect_limit(&response.head, 2)), (200, remaining));
    }
    expect_limited(&proxy.call(&ask().key("secret2")), 2);
}

#[test]
fn who_has_no_key_empties_nobodys_bucket() {
    let proxy = limited(1).set("API_KEYS", "alice:secret1").start();
    for _ in 0..3 {
        let response = proxy.call(&ask().key("wrong"));
        response.expect_error(401, "unauthorized");
        assert_eq!(response.header(LIMIT), None, "{response:?}");
    }
    assert_eq!(proxy.call(&ask().key("secret1")).status, 200);
}

#[test]
fn failures_are_told_the_limit_too() {
    let upstream = FakeUpstream::always(refusal(400, "no"));
    let proxy = limited(10).facing(&upstream).start();
    for (request, remaining) in all_ways().iter().zip([9, 8, 7, 6]) {
        let response = proxy.call(request);
        response.expect_error(400, "upstream_rejected");
        assert_eq!(expect_limit(&response.head, 10), remaining);
    }
    let response = proxy.call(&post_bytes("/api/ask", "{"));
    response.expect_error(400, "invalid_json");
    expect_limit(&response.head, 10);
}

/// An upstream with limits of its own in each answer.
fn with_own_limits(request: &Received) -> Vec<Step> {
    let theirs = [(LIMIT, "5000"), (REMAINING, "4999"), (RESET, "12ms"), ("x-ratelimit-remaining-tokens", "159976")];
    if request.question() == "Fail!" {
        return reply(429, &theirs, r#"{"error":{"message":"slow down"}}"#);
    }
    if !request.is_streaming() {
        return reply(200, &theirs, &completion("Yes").to_string());
    }
    let mut head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n".to_owned();
    theirs.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    [vec![Step::Send(format!("{head}\r\n").into_bytes())], streamed(&["Yes"])[1..].to_vec()].concat()
}

#[test]
fn our_limit_stands_in_for_the_upstreams_of_the_same_name() {
    let upstream = FakeUpstream::answering(with_own_limits);
    let proxy = limited(10).facing(&upstream).start();
    for (request, remaining) in [chat(false), chat(true)].iter().zip([9, 8]) {
        let response = proxy.call(request);
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(expect_limit(&response.head, 10), remaining);
        assert_eq!(values_of(&response.head, "x-ratelimit-remaining-tokens"), ["159976"], "what is not ours stays");
    }
    let failing = post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Fail!"}]}));
    let response = proxy.call(&failing);
    response.expect_error(429, "upstream_rate_limited");
    assert_eq!(expect_limit(&response.head, 10), 7);
}

#[test]
fn without_a_limit_of_ours_the_upstreams_is_passed_on() {
    let upstream = FakeUpstream::answering(with_own_limits);
    let proxy = Proxy::facing(&upstream).start();
    for request in [chat(false), chat(true)] {
        let response = proxy.call(&request);
        assert_eq!(values_of(&response.head, LIMIT), ["5000"], "{response:?}");
        assert_eq!(values_of(&response.head, RESET), ["12ms"], "{response:?}");
    }
}

#[test]
fn without_a_limit_nothing_is_refused_and_nothing_is_told() {
    for proxy in [Proxy::start(), limited(0).start()] {
        for request in all_ways().iter().cycle().take(40) {
            let response = proxy.call(request);
            assert_eq!((response.status, response.header(LIMIT)), (200, None), "{response:?}");
        }
    }
}

#[test]
fn the_bucket_fills_again_as_the_client_was_told() {
    // One a second. Time itself is tested here.
    let proxy = limited(60).start();
    let mut connection = proxy.connect();
    let refused = (0..500).map(|_| connection.exchange(&ask())).find(|response| response.status != 200);
    let after = expect_limited(&refused.expect("the bucket empties faster than it fills"), 60);
    assert_eq!(after, 1);
    std::thread::sleep(Duration::from_secs(after));
    assert_eq!(connection.exchange(&ask()).status, 200, "as promised");
}

#[test]
fn a_client_that_comes_all_at_once_gets_what_is_in_the_bucket() {
    let upstream = FakeUpstream::always(reply_json(200, &completion("Yes")));
    let proxy = limited(5).facing(&upstream).start();
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..20).map(|_| scope.spawn(|| proxy.call(&ask()).status)).collect();
        calls.into_iter().map(|call| call.join().expect("a status")).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 5);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 15);
    assert_eq!(upstream.calls(), 5);
}

#[test]
fn a_limit_that_is_none_is_refused_at_start() {
    for value in ["-1", "ten", "1.5", "1000001"] {
        let ended = Proxy::with(&[("RATE_LIMIT_PER_MINUTE", value)]).run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains("RATE_LIMIT_PER_MINUTE") && line.contains(value), "{line}");
    }
}

#[test]
fn a_stream_under_way_is_not_cut_by_the_limit() {
    let gate = crate::support::gate::Gate::new();
    let steps = streamed(&["One ", "two"]);
    let steps = [&steps[..2], &[Step::Wait(gate.clone())], &steps[2..]].concat();
    let upstream = FakeUpstream::always(steps);
    let proxy = limited(1).facing(&upstream).start();
    let mut stream = proxy.connect().stream(&chat(true));
    assert!(stream.next_event().is_some());
    expect_limited(&proxy.call(&chat(true)), 1);
    expect_limited(&proxy.call(&get("/api/ask").method("POST").header("Content-Length", "0")), 1);
    gate.open();
    assert_eq!(stream.events().last().map(String::as_str), Some("[DONE]"));
}
