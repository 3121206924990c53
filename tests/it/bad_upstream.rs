//! A hostile upstream: whatever it sends, and however slowly, it costs a bounded time and memory, and one answer.

use crate::support::client::{Response, Sse, get, post, streaming};
use crate::support::gate::Gate;
use crate::support::hostile::{Chance, within};
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::upstream::{
    FakeUpstream, Step, answer, completion, delta, end, event, finish, piece, receive, reply, reply_json, send, stream_head,
    streamed,
};
use crate::support::{PATIENCE, eventually};
use serde_json::{Value, json};
use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// How much memory one answer may cost, in bytes: the largest one twice, and change.
const BOUNDED: usize = 64 << 20;

const JSON_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
const SSE_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";

/// The same question to both endpoints.
#[track_caller]
fn on_both(proxy: &Proxy, mut check: impl FnMut(&str, Response)) {
    let ask = post("/api/ask", &json!({"question": "What is it?"}));
    for (path, request) in [("/api/ask", ask), ("/api/streaming", streaming("What is it?"))] {
        check(path, proxy.connect().patient_for(PATIENCE * 2).exchange(&request));
    }
}

/// An error with a status of the table, and never our own fault.
#[track_caller]
fn expect_blame(response: &Response) {
    assert!(matches!(response.status, 502 | 503), "{response:?}");
    let code = response.json()["error"]["code"].as_str().expect("a code").to_owned();
    response.expect_error(response.status, &code);
    assert!(code.starts_with("upstream_"), "{response:?}");
}

// Slowness

#[test]
fn a_byte_a_second_is_given_up_when_the_time_is_over() {
    let drip = |start: &str, rest: &str| -> Vec<Step> {
        let slowly = rest.bytes().flat_map(|byte| [Step::Pause(Duration::from_secs(1)), send([byte])]);
        [send(start)].into_iter().chain(slowly).collect()
    };
    let long = "x".repeat(60);
    let slow = [
        ("a head", drip("HTTP/1.1 200 OK\r\nX-Slow: ", &long)),
        ("a body", drip(&format!("{JSON_HEAD}Content-Length: 1000\r\n\r\n{{"), &long)),
        ("a chunked body", drip(&format!("{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n1000\r\n{{"), &long)),
        ("a chunk's size", drip(&format!("{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n"), &"0".repeat(60))),
        ("an error", drip("HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", &long)),
    ];
    std::thread::scope(|scope| {
        for (what, steps) in slow {
            scope.spawn(move || {
                let upstream = FakeUpstream::always(steps);
                let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "2").start();
                let started = Instant::now();
                expect_blame(&proxy.ask("How long?"));
                assert!(started.elapsed() < Duration::from_secs(5), "{what}: {:?}", started.elapsed());
                upstream.wait_until_left(1);
            });
        }
    });
}

/// There is always something to read, and it never comes to a point.
#[test]
fn an_upstream_that_never_pauses_is_given_up_when_the_time_is_over() {
    let chunked = format!("{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n");
    for (what, start, again) in [
        ("interim answers", "", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".repeat(20_000)),
        ("go-ons", "", "HTTP/1.1 100 Continue\r\n\r\n".repeat(20_000)),
        ("trailers", &*chunked, "X: y\r\n".repeat(100_000)),
    ] {
        let upstream = FakeUpstream::always(vec![send(start), Step::Repeat(again.into_bytes())]);
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1").start();
        let before = proxy.memory();
        on_both(&proxy, |path, response| {
            expect_blame(&response);
            eprintln!("{what} {path}: {response:?}");
        });
        let started = Instant::now();
        upstream.wait_until_left(2);
        let mut probe = proxy.connect();
        eventually("the worker is free", || probe.exchange(&get("/readyz")).json()["workers_busy"] == 0);
        assert!(started.elapsed() < Duration::from_secs(3), "{what}: {:?}", started.elapsed());
        let cost = proxy.memory_peak().saturating_sub(before);
        assert!(cost < BOUNDED, "{what}: {} MiB of memory", cost >> 20);
    }
}

/// Bytes that are no piece of a body do not break its silence.
#[test]
fn a_stream_whose_trailers_have_no_end_is_given_up() {
    let head = JSON_HEAD.replace("application/json", "text/event-stream");
    let start = send(format!("{head}Transfer-Encoding: chunked\r\n\r\n"));
    for began in [false, true] {
        let said = if began { vec![start.clone(), event(&delta("Half"))] } else { vec![start.clone()] };
        let upstream = FakeUpstream::always([said, vec![send("0\r\n"), Step::Repeat(b"X: y\r\n".repeat(1000))]].concat());
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", "1").start();
        let response = proxy.call(&streaming("Well?"));
        assert!(response.everything().contains("upstream_timeout"), "{response:?}");
        upstream.wait_until_left(1);
    }
}

/// Its words are waited for a moment, not for the whole time that the question has.
#[test]
fn an_error_answer_without_an_end_leaves_time_for_another_model() {
    let upstream = FakeUpstream::answering(|request| match request.json()["model"] == "good" {
        true if request.is_streaming() => streamed(&["Yes"]),
        true => answer("Yes"),
        false => vec![send("HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\n{\"error\""), Step::Silence],
    });
    let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").set("UPSTREAM_RETRIES", "0");
    let proxy = setup.start();
    on_both(&proxy, |path, response| assert_eq!(response.status, 200, "{path}: {response:?}"));
}

#[test]
fn a_client_that_leaves_amid_an_error_answer_is_gone() {
    let upstream = FakeUpstream::always(vec![send("HTTP/1.1 400 No\r\nContent-Length: 500\r\n\r\n{\"error\""), Step::Silence]);
    let proxy = Proxy::facing(&upstream).start();
    // Several, since one may leave before the head of the answer is read.
    let paths = ["/api/ask", "/api/streaming"].repeat(8);
    for (number, path) in paths.iter().enumerate() {
        let mut client = proxy.connect();
        client.send(&post(path, &json!({"question": "Well?"})).header("X-Request-Id", &format!("left-{number}")));
        upstream.wait_for_calls(number + 1);
        drop(client);
        let line = proxy.wait_for_line(|line| line.contains(&format!("id=left-{number} ")));
        assert!(line.contains("status=499") && line.contains("code=client_gone"), "{line}");
    }
}

/// llama.cpp's servers told errors in a field of their own until 2025, and `[DONE]` all the same; others give an event that
/// name, and who stands between may know nothing of events.
#[test]
fn an_error_in_a_stream_is_one_in_whatever_form() {
    let error = r#"{"code":500,"message":"words of its own","type":"server_error"}"#;
    let forms = [
        piece(format!("error: {error}\n\n")),
        event(error),
        piece("event: error\ndata: {\"detail\":\"words of its own\"}\n\n"),
        piece("data: words of its own\nevent:error\n\n"),
    ];
    let amid = piece(format!("{{\"error\":{error}}}\n\n"));
    let cases = forms.iter().flat_map(|form| [(form, false), (form, true)]).chain([(&amid, true)]);
    for (told, began) in cases {
        let said = if began { vec![stream_head(), event(&delta("Half"))] } else { vec![stream_head()] };
        let upstream = FakeUpstream::always([said, vec![told.clone(), event("[DONE]"), end()]].concat());
        let proxy = Proxy::facing(&upstream).start();
        let response = proxy.call(&streaming("Well?"));
        let (status, text) = (response.status, response.everything());
        assert!(text.contains("words of its own") && !text.contains("[DONE]"), "{text}");
        assert_eq!(status, if began { 200 } else { 502 });
        if began {
            assert_eq!(proxy.newest_of(1)["finish_reason"], "upstream_error");
        }
    }
    let done = piece("event: error\ndata: [DONE]\n\n");
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), done, end()]);
    let proxy = Proxy::facing(&upstream).start();
    assert_eq!(proxy.call(&streaming("Well?")).status, 200);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "upstream_error");
}

/// The answer is out, and the upstream goes on within the very chunk that nobody needs.
#[test]
fn an_upstream_that_drips_on_after_the_end_does_not_keep_the_worker() {
    let mut steps = streamed(&["All"]);
    steps.pop();
    steps.extend([send("1;a"), Step::Repeat(b"a".to_vec())]);
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for _ in 0..3 {
        let events = proxy.stream("All?").events();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    }
    upstream.wait_until_left(3);
    eventually("the worker is free", || proxy.get("/readyz").json()["workers_busy"] == 0);
    assert_eq!(proxy.count_rows(), 3);
}

#[test]
fn a_stream_that_only_seems_to_live_ends_with_its_client() {
    std::thread::scope(|scope| {
        for (what, again) in [("comments", ": c\n\n"), ("blank lines", "\n"), ("other fields", "event: x\nid: 1\nretry: 5\n")] {
            scope.spawn(move || {
                let slowly = [Step::Pause(Duration::from_millis(200)), send(again)];
                let steps: Vec<Step> = [send(SSE_HEAD)].into_iter().chain(slowly.into_iter().cycle().take(100)).collect();
                let upstream = FakeUpstream::always(steps);
                let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
                let mut stream = proxy.stream("Alive?");
                stream.expect_heartbeat();
                stream.expect_heartbeat();
                drop(stream);
                let left = Instant::now();
                upstream.wait_until_left(1);
                assert!(left.elapsed() < Duration::from_secs(3), "{what}: {:?}", left.elapsed());
            });
        }
    });
}

// Size

/// What has no end: a start, and what is sent again and again behind it at full speed.
fn endless() -> Vec<(&'static str, String, Vec<u8>)> {
    let much = 1 << 20;
    let chunk = [&b"100000\r\n"[..], &vec![b' '; much], b"\r\n"].concat();
    let chunked = format!("{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n");
    vec![
        ("1 GB as announced", format!("{JSON_HEAD}Content-Length: 1073741824\r\n\r\n"), vec![b' '; much]),
        ("chunks", chunked.clone(), chunk.clone()),
        ("a chunk of 2^63", format!("{chunked}8000000000000000\r\n"), vec![b' '; much]),
        ("a chunk's size", chunked.clone(), vec![b'0'; much]),
        ("a chunk's extension", format!("{chunked}1;"), vec![b'0'; much]),
        ("until the close", format!("{JSON_HEAD}\r\n"), vec![b'['; much]),
        ("an error", "HTTP/1.1 500 No\r\n\r\n".into(), vec![b'e'; much]),
        ("a refusal", "HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n".into(), chunk),
        ("a status line", "HTTP/1.1 200 ".into(), vec![b'x'; much]),
        ("headers", "HTTP/1.1 200 OK\r\n".into(), b"a: b\r\n".repeat(100_000)),
        ("a header", "HTTP/1.1 200 OK\r\nX: ".into(), vec![b'x'; much]),
        ("no HTTP", String::new(), vec![0; much]),
    ]
}

#[test]
fn an_answer_without_end_is_502_and_costs_little_memory() {
    for (what, start, block) in endless() {
        let upstream = FakeUpstream::always(vec![send(start), Step::Repeat(block)]);
        let proxy = Proxy::facing(&upstream).start();
        let before = proxy.memory();
        on_both(&proxy, |path, response| {
            assert!(matches!(response.status, 400 | 502 | 503), "{what} {path}: {response:?}");
            assert!(response.body.len() < 4096, "{what} {path}: {} bytes", response.body.len());
        });
        upstream.wait_until_left(2);
        let cost = proxy.memory_peak().saturating_sub(before);
        eprintln!("{what}: {} KiB of memory", cost >> 10);
        assert!(cost < BOUNDED, "{what}: {} MiB of memory", cost >> 20);
        assert_eq!(proxy.count_rows(), 0);
    }
}

#[test]
fn a_stream_of_nothing_or_of_too_much_is_cut_and_costs_little_memory() {
    let much = 1 << 20;
    for (what, start, again) in [
        ("comments", "", b": c\n".repeat(much / 4)),
        ("a comment", ":", vec![b'c'; much]),
        ("blank lines", "", vec![b'\n'; much]),
        ("blank lines of the other kind", "", vec![b'\r'; much]),
        ("an event of 100 MB", "data: ", vec![b'x'; much]),
        ("an event of many lines", "", b"data: x\n".repeat(much / 8)),
        ("an event of empty lines", "", b"data\n".repeat(much / 5)),
        ("fields that are no data", "", b"event: x\n".repeat(much / 9)),
        ("a field without a name", "", vec![b'x'; much]),
        ("zeros", "", vec![0; much]),
    ] {
        for begun in [false, true] {
            let first = format!("data: {}\n\n", delta("Begun."));
            let start = format!("{SSE_HEAD}{}{start}", if begun { &first } else { "" });
            let upstream = FakeUpstream::always(vec![send(start), Step::Repeat(again.clone())]);
            // No heartbeats: where nothing comes to an end, the client's patience has to.
            let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "3600").start();
            let before = proxy.memory();
            let started = Instant::now();
            let mut patient = proxy.connect().patient_for(PATIENCE * 2);
            if begun {
                let mut stream = patient.stream(&streaming("Much?"));
                stream.expect_event(&delta("Begun."));
                let error = stream.expect_failure("upstream_bad_answer");
                assert!(error["message"].as_str().is_some_and(|m| m.len() < 2000), "{error}");
                assert_eq!(proxy.newest_of(1)["finish_reason"], "upstream_error");
            } else {
                patient.exchange(&streaming("Much?")).expect_error(502, "upstream_bad_answer");
            }
            upstream.wait_until_left(1);
            assert!(started.elapsed() < PATIENCE * 2, "{what}: {:?}", started.elapsed());
            let cost = proxy.memory_peak().saturating_sub(before);
            assert!(cost < BOUNDED, "{what}: {} MiB of memory", cost >> 20);
        }
    }
}

/// Answers of the largest size whose JSON takes little of it for each value: the start, what is repeated, and the end.
const CROWDED: &[(&str, &str, &str)] = &[
    ("{\"choices\":[{}", ",{}", "]}"),
    ("{\"choices\":[{\"message\":{\"content\":\"Yes\"}}", ",{\"delta\":{}}", "]}"),
    ("{\"error\":[[0]", ",[0]", "]}"),
    ("{\"error\":{\"code\":500", ",\"a\":0", "}}"),
    ("{\"error\":{\"code\":400,\"message\":\"Overfull\",\"a\":[0", ",{}", "]}}"),
    ("{\"error\":\"", "x", "\"}"),
    ("{\"choices\":[{\"message\":{\"content\":[{}", ",{}", "]}}]}"),
    ("{\"choices\":[{\"message\":{\"tool_calls\":[{}", ",{}", "]}}]}"),
    ("{\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":127}", ",{\"index\":127}", "]}}]}"),
    ("{\"choices\":[{\"message\":{\"tool_calls\":[{\"function\":{\"arguments\":\"", "\\\"", "\"}}]}}]}"),
    ("{\"data\":0", ",\"\":0", "}"),
    ("{\"data\":[0", ",{}", "]}"),
];

/// Values that are small in JSON are large in memory, and so is what history would keep of them.
#[test]
fn a_crowded_answer_costs_little_more_than_its_bytes() {
    for (start, again, end) in CROWDED {
        let body = format!("{start}{}{end}", again.repeat(((16 << 20) - 200) / again.len()));
        let stream = vec![send(SSE_HEAD), send(format!("data: {body}\n\ndata: [DONE]\n\n")), Step::Close];
        let whole = reply(200, &[("Content-Type", "application/json")], &body);
        drop(body);
        let upstream = FakeUpstream::answering(move |request| match &*request.method {
            "POST" if request.is_streaming() => stream.clone(),
            _ => whole.clone(),
        });
        let requests = match start.starts_with("{\"data\"") {
            true => vec![get("/v1/models")],
            false => vec![post("/api/ask", &json!({"question": "Much?"})), streaming("Much?")],
        };
        for request in requests {
            let proxy = Proxy::facing(&upstream).start();
            let before = proxy.memory();
            let started = Instant::now();
            let response = proxy.connect().patient_for(PATIENCE * 3).exchange(&request);
            assert!(matches!(response.status, 200 | 502), "{start}: {:.300?}", response.everything());
            let cost = proxy.memory_peak().saturating_sub(before);
            let sent = response.body.len();
            eprintln!("{start}: {} in {:?}, {} KiB sent, {} MiB", response.status, started.elapsed(), sent >> 10, cost >> 20);
            assert!(cost < 2 * BOUNDED, "{start}: {} MiB of memory", cost >> 20);
        }
    }
}

/// What a tool is called by and with is kept until the stream ends, so it counts as answer.
#[test]
fn tool_calls_without_end_are_too_large_an_answer() {
    let much = 1 << 20;
    let call = |index: usize, rest: &str| json_event(&format!("{{\"index\":{index},{rest}}}"));
    let (x, zeros) = ("x".repeat(much), "\\u0000".repeat(much / 6));
    let over = [send(format!("data: {}\n\ndata: [DONE]\n\n", finish("stop"))), Step::Close];
    for (what, events) in [
        ("ids", (0..40).map(|i| call(i, &format!("\"id\":\"{x}\""))).collect::<Vec<_>>()),
        ("names", (0..40).map(|i| call(i, &format!("\"function\":{{\"name\":\"{x}\"}}"))).collect()),
        ("arguments", (0..40).map(|_| call(0, &format!("\"function\":{{\"arguments\":\"{zeros}\"}}"))).collect()),
    ] {
        let events = events.into_iter().map(|event| send(format!("data: {event}\n\n")));
        let upstream = FakeUpstream::always([send(SSE_HEAD)].into_iter().chain(events).chain(over.clone()).collect());
        let proxy = Proxy::facing(&upstream).start();
        let before = proxy.memory();
        let error = proxy.stream("How many?").expect_failure("upstream_error");
        assert!(error["message"].as_str().is_some_and(|message| message.contains("larger than")), "{what}: {error}");
        let cost = proxy.memory_peak().saturating_sub(before);
        eprintln!("{what}: {} MiB", cost >> 20);
        assert!(cost < 2 * BOUNDED, "{what}: {} MiB of memory", cost >> 20);
    }
}

/// The data of an event with a piece of a tool call.
fn json_event(call: &str) -> String {
    format!("{{\"choices\":[{{\"index\":0,\"delta\":{{\"tool_calls\":[{call}]}}}}]}}")
}

#[test]
fn an_answer_of_any_depth_is_an_answer_or_502() {
    let nested =
        |open: &str, depth: usize, middle: &str, close: &str| format!("{}{middle}{}", open.repeat(depth), close.repeat(depth));
    let mut bodies = Vec::new();
    for depth in [50, 60, 62, 64, 124, 128, 100_000] {
        for value in [
            nested("[", depth, "1", "]"),
            nested("{\"a\":", depth, "1", "}"),
            nested("[{\"text\":", depth, "\"x\"", "}]"),
            nested("[{\"a\":", depth, "\"x\"", "}]"),
        ] {
            bodies.push(format!("{{\"choices\":{value}}}"));
            bodies.push(format!("{{\"error\":{value}}}"));
            bodies.push(format!("{{\"x\":{value},\"choices\":[{{\"message\":{{\"content\":\"Yes\"}}}}]}}"));
            bodies.push(format!("{{\"choices\":[{{\"message\":{{\"content\":{value}}},\"delta\":{{\"content\":{value}}}}}]}}"));
            bodies.push(format!("{{\"choices\":[{{\"message\":{{\"tool_calls\":{value}}}}}]}}"));
        }
    }
    let upstream = FakeUpstream::script(
        bodies
            .iter()
            .flat_map(|body| {
                let whole = reply(200, &[("Content-Type", "application/json")], body);
                let stream = vec![send(SSE_HEAD), send(format!("data: {body}\n\ndata: [DONE]\n\n")), Step::Close];
                let failure = reply(500, &[], body);
                [whole, stream, failure]
            })
            .collect(),
    );
    let proxy = Proxy::facing(&upstream).start();
    for body in &bodies {
        let shown = &body[..body.len().min(60)];
        let whole = proxy.ask("How deep?");
        assert!(matches!(whole.status, 200 | 502), "{shown}: {whole:?}");
        let stream = proxy.call(&streaming("How deep?"));
        assert!(matches!(stream.status, 200 | 502), "{shown}: {stream:?}");
        proxy.ask("How deep?").expect_error(502, "upstream_error");
    }
    assert_eq!(upstream.calls(), 3 * bodies.len());
}

// Nonsense

#[test]
fn garbage_is_the_upstreams_fault_and_nobody_elses() {
    let mut chance = Chance::new(21);
    let mut said: Vec<Vec<u8>> = (0..60)
        .map(|_| {
            let size = chance.below(600);
            chance.bytes(size)
        })
        .collect();
    let json = format!("{JSON_HEAD}Content-Length: ");
    for text in [
        "HTTP/1.1 200\r\n\r\n",
        "HTTP/1.1 099 No\r\n\r\n",
        "HTTP/1.1 -200 No\r\n\r\n",
        "HTTP/9.9 200 OK\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\n",
        "ICY 200 OK\r\n\r\n",
        "\r\n\r\n\r\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
        "HTTP/1.1 600 What\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: \0\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\n: x\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n{}",
        "\u{15}\u{3}\u{1}\0\u{2}\u{2}\u{28}",
    ] {
        said.push(text.as_bytes().to_vec());
    }
    for length in ["-1", "abc", "99999999999999999999", "9223372036854775808", "", "2, 2", "+2"] {
        said.push(format!("{json}{length}\r\n\r\n{{}}").into_bytes());
    }
    let steps: Vec<Vec<Step>> = said.iter().flat_map(|said| vec![vec![send(said.clone()), Step::Close]; 2]).collect();
    let upstream = FakeUpstream::script(steps);
    let mut proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    for said in &said {
        on_both(&proxy, |path, response| {
            assert!(matches!(response.status, 502 | 503), "{path} of {:?}: {response:?}", String::from_utf8_lossy(said));
            expect_blame(&response);
        });
    }
    assert_eq!(upstream.calls(), 2 * said.len());
    assert_eq!(proxy.count_rows(), 0);
    proxy.expect_no_line(|line| line.contains("bug:"));
}

#[test]
fn damaged_answers_are_whole_answers_or_failures_and_never_hang() {
    let mut chance = Chance::new(22);
    let poison: &[&[u8]] = &[
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b"\n\n",
        b"data: ",
        b"data: [DONE]\n\n",
        b"0\r\n\r\n",
        b"ffffffff\r\n",
        b"-1",
        b"{",
        b"}",
        b"\"",
        b",",
        b"\xff",
        b": c\n",
        b"event: x\n",
        b"null",
        b"[]",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
    ];
    let body = completion("Sound").to_string();
    let whole = format!("{JSON_HEAD}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
    let chunks = format!("{JSON_HEAD}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).into_bytes();
    let steps = streamed(&["So", "und"]);
    let stream: Vec<u8> = steps
        .into_iter()
        .flat_map(|step| match step {
            Step::Send(bytes) => bytes,
            _ => Vec::new(),
        })
        .collect();
    let mut script = Vec::new();
    let mut sent = Vec::new();
    for round in 0..240 {
        let mut bytes = [&whole, &chunks, &stream][round % 3].clone();
        for _ in 0..1 + chance.below(3) {
            chance.damage(&mut bytes, poison);
        }
        let mut steps: Vec<Step> = chance.pieces(&bytes).into_iter().map(send).collect();
        steps.push(Step::Close);
        script.push(steps);
        sent.push((round % 3 == 2, bytes));
    }
    let upstream = FakeUpstream::script(script);
    let setup = Proxy::facing(&upstream).set("WORKERS", "1").set("UPSTREAM_TIMEOUT_SECS", "5");
    let mut proxy = setup.set("UPSTREAM_IDLE_SECS", "5").start();
    let mut whole_ones = 0;
    for (is_stream, bytes) in sent {
        let shown = String::from_utf8_lossy(&bytes);
        let calls = upstream.calls();
        let started = Instant::now();
        let response = match is_stream {
            true => proxy.call(&streaming("Sound?")),
            false => proxy.ask("Sound?"),
        };
        assert!(started.elapsed() < Duration::from_secs(8), "{shown:?}: {:?}", started.elapsed());
        assert_eq!(upstream.calls(), calls + 1, "one call for {shown:?}");
        match response.status {
            200 => whole_ones += 1,
            400 | 429 => assert!(!shown.starts_with("HTTP/1.1 200"), "{shown:?}: {response:?}"),
            _ => expect_blame(&response),
        }
        if is_stream && response.status == 200 {
            let text = String::from_utf8(response.body.clone()).expect("UTF-8, whatever came in");
            let last = text.trim_end().rsplit("data: ").next().unwrap_or_default();
            assert!(text.ends_with("\n\n"), "ended between two events: {text:?} for {shown:?}");
            assert!(last == "[DONE]" || last.contains("\"error\""), "{text:?} for {shown:?}");
        }
    }
    eprintln!("{whole_ones} of 240 damaged answers were answers all the same");
    assert!((10..230).contains(&whole_ones), "the damage is too small or too large: {whole_ones}");
    proxy.expect_no_line(|line| line.contains("bug:"));
}

#[test]
fn a_gzip_that_nobody_asked_for_is_502_and_is_not_unpacked() {
    // gzip of `{"choices":[{"message":{"content":"Yes"}}]}` as `printf ... | gzip -nc` makes it.
    let packed: [u8; 62] = [
        0x1f, 0x8b, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0xab, 0x56, 0x4a, 0xce, 0xc8, 0xcf, 0x4c, 0x4e, 0x2d, 0x56,
        0xb2, 0x8a, 0xae, 0x56, 0xca, 0x4d, 0x2d, 0x2e, 0x4e, 0x4c, 0x4f, 0x55, 0xb2, 0xaa, 0x56, 0x4a, 0xce, 0xcf, 0x2b, 0x49,
        0xcd, 0x2b, 0x51, 0xb2, 0x52, 0x8a, 0x04, 0x4a, 0xd6, 0xd6, 0xc6, 0xd6, 0x02, 0x00, 0xa8, 0x13, 0xcb, 0xae, 0x2b, 0x00,
        0x00, 0x00,
    ];
    for kind in ["application/json", "text/event-stream"] {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n",
            packed.len()
        );
        let upstream = FakeUpstream::always(vec![send([head.as_bytes(), &packed].concat())]);
        let proxy = Proxy::facing(&upstream).start();
        on_both(&proxy, |_, response| {
            response.expect_error(502, "upstream_bad_answer");
        });
        for request in upstream.requests() {
            let asked = request.header("Accept-Encoding").unwrap_or("identity").to_owned();
            assert_eq!(asked, "identity", "we ask for none");
        }
    }
}

#[test]
fn a_redirect_is_502_and_the_key_stays_at_home() {
    let elsewhere = FakeUpstream::always(answer("Give me your key"));
    for status in [300, 301, 302, 303, 304, 305, 307, 308] {
        for location in
            [elsewhere.url(), format!("//{}/v1", elsewhere.address()), "/v1/elsewhere".into(), "\u{1}".into(), String::new()]
        {
            let upstream = FakeUpstream::always(reply(status, &[("Location", &location)], ""));
            let proxy = Proxy::facing(&upstream).start();
            on_both(&proxy, |_, response| expect_blame(&response));
            assert!(proxy.get("/v1/models").status >= 500);
            assert_eq!(upstream.calls(), 3, "asked once for each, and nothing is followed");
        }
    }
    assert_eq!(elsewhere.connections(), 0);
}

// Connections

/// An upstream that answers the first request of each connection and does `deed` behind it, at once or when the next comes.
fn one_answer_a_connection(streams: bool, at_once: bool, deed: fn(TcpStream)) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/v1", listener.local_addr().expect("its address"));
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let steps = if streams { streamed(&["Yes"]) } else { answer("Yes") };
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            counted.fetch_add(1, Ordering::SeqCst);
            let steps = steps.clone();
            std::thread::spawn(move || {
                let mut reading = BufReader::new(stream.try_clone().expect("a second handle"));
                receive(&mut reading)?;
                for step in steps {
                    let Step::Send(bytes) = step else { panic!("only what is sent") };
                    (&stream).write_all(&bytes).ok()?;
                }
                if !at_once {
                    receive(&mut reading)?;
                }
                drop(reading);
                deed(stream);
                Some(())
            });
        }
    });
    (url, connections)
}

#[test]
fn a_kept_connection_that_is_closed_at_any_moment_costs_no_client_an_error() {
    fn close(stream: TcpStream) {
        drop(stream);
    }
    fn reset(stream: TcpStream) {
        // What is still on its way would be lost with the reset, and no answer of ours could be whole.
        let mut unsent: libc::c_int = 1;
        // SAFETY: the kernel writes one c_int to the given place.
        while unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) } == 0 && unsent > 0 {
            std::thread::yield_now();
        }
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger");
    }
    fn say_408(stream: TcpStream) {
        let _ = (&stream).write_all(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    type Deed = (&'static str, bool, fn(TcpStream));
    let deeds: [Deed; 6] = [
        ("closes behind the answer", true, close),
        ("resets behind the answer", true, reset),
        ("says 408 behind the answer", true, say_408),
        ("closes when the next one comes", false, close),
        ("resets when the next one comes", false, reset),
        ("says 408 when the next one comes", false, say_408),
    ];
    for (what, at_once, deed) in deeds {
        for streams in [false, true] {
            let (url, connections) = one_answer_a_connection(streams, at_once, deed);
            let setup = Setup::new().set("OPENAI_BASE_URL", url).set("OPENAI_API_KEY", UPSTREAM_KEY).set("UPSTREAM_RETRIES", "0");
            let proxy = setup.set("WORKERS", "1").start();
            let mut connection = proxy.connect();
            for number in 0..30 {
                let path = if streams { "/api/streaming" } else { "/api/ask" };
                let response = connection.exchange(&post(path, &json!({"question": "Still there?"})));
                assert_eq!(response.status, 200, "{what}, number {number}: {response:?}");
                assert!(!streams || response.body.ends_with(b"data: [DONE]\n\n"), "{what}: {response:?}");
            }
            assert_eq!(proxy.count_rows(), 30);
            let connections = connections.load(Ordering::SeqCst);
            assert!(connections >= 30, "{what}: the connections were closed, so there were {connections}");
        }
    }
}

/// It has the question, and whoever pays for it decides whether it is asked again.
#[test]
fn who_has_thought_before_its_kept_connection_dies_is_not_asked_again() {
    let upstream = FakeUpstream::answering(|request| match request.question().as_str() {
        "Die" => vec![Step::Pause(Duration::from_millis(1200)), Step::Close],
        _ => answer("Yes"),
    });
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "0").set("WORKERS", "1").start();
    assert_eq!(proxy.ask("Well?").status, 200);
    proxy.ask("Die").expect_error(503, "upstream_unavailable");
    assert_eq!(upstream.requests().len(), 2);
}

#[test]
fn connections_that_are_closed_at_random_under_load_cost_no_client_an_error() {
    let upstream = FakeUpstream::answering(|request| {
        let mut steps = if request.is_streaming() { streamed(&["Yes"]) } else { answer("Yes") };
        // Decided by the question's number: some connections stay, some go at once, some a little later.
        let number: u64 = request.question().rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number");
        match number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61 {
            0 => steps.push(Step::Close),
            1 => steps.push(Step::Reset),
            2 => steps.extend([Step::Pause(Duration::from_millis(number % 5)), Step::Close]),
            3 => steps.extend([Step::Pause(Duration::from_millis(number % 5)), Step::Reset]),
            _ => {}
        }
        steps
    });
    let proxy = Proxy::facing(&upstream).set("WORKERS", "4").set("QUEUE_SIZE", "100").start();
    std::thread::scope(|scope| {
        for client in 0..6 {
            let proxy = &proxy;
            scope.spawn(move || {
                let mut connection = proxy.connect();
                for number in 0..100 {
                    let path = ["/api/ask", "/api/streaming"][number % 2];
                    let response =
                        connection.exchange(&post(path, &json!({"question": format!("Number {}", client * 1000 + number)})));
                    assert_eq!(response.status, 200, "client {client}, {number}: {response:?}");
                }
            });
        }
    });
    assert_eq!(proxy.count_rows(), 600);
}

/// Who says more than he was asked must not have it taken for the answer to another question.
#[test]
fn what_comes_behind_an_answer_is_nobodys_answer() {
    let evil = || reply_json(200, &completion("Evil"));
    let done = |tail: Vec<Step>| [streamed(&["Good"]), tail].concat();
    let glued = |steps: Vec<Step>| -> Vec<Step> {
        let bytes = steps.into_iter().flat_map(|step| match step {
            Step::Send(bytes) => bytes,
            _ => Vec::new(),
        });
        vec![Step::Send(bytes.collect())]
    };
    for in_one_write in [true, false] {
        let (telling, scripts) = mpsc::channel();
        let upstream = FakeUpstream::answering(move |request| {
            let steps = match request.is_streaming() {
                true => done(evil()),
                false => [answer("Good"), evil()].concat(),
            };
            let mut steps = if in_one_write { glued(steps) } else { steps };
            let (told, sent) = mpsc::channel();
            steps.push(Step::Tell(told));
            let _ = telling.send(sent);
            steps
        });
        let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
        for round in 0..8 {
            on_both(&proxy, |path, response| {
                assert_eq!(response.status, 200, "{round} {path}: {response:?}");
                let said = String::from_utf8_lossy(&response.body).into_owned();
                assert!(said.contains("Good") && !said.contains("Evil"), "{round} {path}: {said}");
                // What comes after the next question cannot be told from its answer. Where it cannot be sent, all is well, too.
                let _ = scripts.recv().expect("it was asked").recv();
            });
        }
    }
}

/// It may be the answer to something else, and the true one come for the next question.
#[test]
fn what_is_no_answer_ends_its_connection() {
    let html = reply(200, &[], "<html>Login</html>");
    for (path, said) in [
        ("/api/ask", html.clone()),
        ("/api/ask", streamed(&["Streamed"])),
        ("/api/streaming", html),
        ("/api/streaming", answer("Not streamed")),
    ] {
        let upstream = FakeUpstream::answering(move |request| match request.question().as_str() {
            "First" => said.clone(),
            question => answer(question),
        });
        let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
        proxy.call(&post(path, &json!({"question": "First"}))).expect_error(502, "upstream_bad_answer");
        assert_eq!(proxy.answer("Second")["answer"], "Second");
        assert_eq!(upstream.connections(), 2, "{path}");
    }
    // Nor is the next model asked over it.
    let upstream = FakeUpstream::script(vec![reply(200, &[], r#"{"error":{"code":503,"message":"Busy"}}"#), answer("Yes")]);
    let proxy = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").start();
    assert_eq!(proxy.answer("Well?")["answer"], "Yes");
    assert_eq!(upstream.connections(), 2);
}

#[test]
fn an_upstream_that_refuses_before_it_has_read_is_understood() {
    let refusal = json!({"error": {"message": "far too long for me"}}).to_string();
    let head = format!("HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{refusal}", refusal.len());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}/v1", listener.local_addr().expect("its address"));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let _ = (&stream).write_all(head.as_bytes());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // Closed over unread bytes, once the caller had time to see the answer.
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let setup = Setup::new().set("OPENAI_BASE_URL", url).set("OPENAI_API_KEY", UPSTREAM_KEY).set("UPSTREAM_RETRIES", "0");
    let proxy = setup.set("MAX_QUESTION_CHARS", "1000000").start();
    let question = "x".repeat(900_000);
    for path in ["/api/ask", "/api/streaming"] {
        let response = proxy.call(&post(path, &json!({ "question": question })));
        let error = response.expect_error(400, "upstream_rejected");
        assert!(error["message"].as_str().is_some_and(|message| message.contains("far too long")), "{error}");
    }
}

// When to come back

#[test]
fn whatever_retry_after_says_the_answer_comes_in_time() {
    let dates = ["Fri, 31 Dec 2100 23:59:59 GMT", "Thu, 01 Jan 1970 00:00:00 GMT", "Friday, 31-Dec-99 23:59:59 GMT"];
    let numbers = [
        "259200",
        "0",
        "-1",
        "1e308",
        "NaN",
        "inf",
        "-inf",
        "9223372036854775807",
        "18446744073709551616",
        "0.000001",
        "99999999999999999999999999",
    ];
    let nonsense = ["soon", "3 days", "1,5", "\"7\"", "7;8", "Fri, 99 Foo 2100 99:99:99 GMT"];
    for after in dates.iter().chain(&numbers).chain(&nonsense) {
        for (status, ours) in [(429, 429), (503, 503)] {
            let upstream = FakeUpstream::always(reply(status, &[("Retry-After", after)], "{\"error\":{\"message\":\"later\"}}"));
            let setup = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1");
            let proxy = setup.set("UPSTREAM_TIMEOUT_SECS", "5").start();
            let started = Instant::now();
            let response = proxy.ask("Now?");
            assert_eq!(response.status, ours, "{after}: {response:?}");
            assert_eq!(response.header("Retry-After"), Some(*after), "as it came");
            assert!(started.elapsed() < Duration::from_secs(5), "{after}: {:?}", started.elapsed());
            let calls = upstream.calls();
            assert!((1..=2).contains(&calls), "{after}: {calls} calls");
            if ["259200", dates[0]].contains(after) {
                assert_eq!(calls, 1, "{after} is not waited for, and not ignored");
            }
        }
    }
}

// Chance

/// Streams that say the same in every way that the standard allows, in pieces of any size, are the same stream.
#[test]
fn a_stream_is_what_it_says_however_it_is_written_and_cut() {
    let mut chance = Chance::new(23);
    for round in 0..40 {
        let words: Vec<String> = (0..1 + chance.below(8))
            .map(|_| {
                (0..chance.below(12)).map(|_| *chance.pick(&['a', ' ', 'é', '🙂', '\u{2028}', 'ж', '"', '\\', '\n'])).collect()
            })
            .collect();
        let mut data: Vec<String> = words.iter().map(|word| delta(word)).collect();
        data.push(finish("stop"));
        let mut body = Vec::new();
        if chance.one_in(4) {
            body.extend("\u{feff}".as_bytes());
        }
        for data in data.iter().map(String::as_str).chain(["[DONE]"]) {
            let newline = *chance.pick(&["\n", "\r\n", "\r"]);
            for _ in 0..chance.below(3) {
                body.extend(
                    chance.pick(&[": comment", ":", "event: message", "id: 7", "retry: 10", "unknown", "datum: x"]).as_bytes(),
                );
                body.extend(newline.as_bytes());
            }
            if chance.one_in(5) {
                body.extend(newline.as_bytes());
            }
            body.extend(chance.pick(&["data: ", "data:"]).as_bytes());
            body.extend(data.as_bytes());
            body.extend([newline, newline].concat().as_bytes());
        }
        let chunked = chance.one_in(2);
        let mut steps = vec![if chunked { stream_head() } else { send(SSE_HEAD) }];
        for bytes in chance.pieces(&body) {
            steps.push(if chunked { piece(bytes) } else { send(bytes) });
        }
        steps.push(if chunked { end() } else { Step::Close });
        let upstream = FakeUpstream::always(steps);
        let proxy = Proxy::facing(&upstream).start();
        let mut stream = proxy.stream("The same?");
        let mut seen = stream.events();
        assert_eq!(seen.pop().as_deref(), Some("[DONE]"), "round {round}: {:?}", String::from_utf8_lossy(&body));
        assert_eq!(seen, data, "round {round}: {:?}", String::from_utf8_lossy(&body));
        assert_eq!(proxy.newest_of(1)["answer"], Value::from(words.concat()));
    }
}

/// Everything at once: good and bad answers side by side, on few workers. The good ones are not touched by the bad ones.
#[test]
fn good_answers_come_through_beside_bad_ones() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::answering(move |request| match request.question().as_str() {
        "silence" => vec![Step::Silence],
        "garbage" => vec![send([0xff; 3000]), Step::Close],
        "flood" => vec![send(SSE_HEAD), Step::Repeat(vec![b'x'; 1 << 20])],
        "reset" => vec![Step::Reset],
        "half" => vec![stream_head(), event(&delta("Half")), Step::Wait(held.clone()), Step::Close],
        _ if request.is_streaming() => streamed(&["Good"]),
        _ => answer("Good"),
    });
    let setup = Proxy::facing(&upstream).set("WORKERS", "12").set("QUEUE_SIZE", "200");
    let proxy = setup.set("UPSTREAM_TIMEOUT_SECS", "3").set("UPSTREAM_IDLE_SECS", "3").start();
    std::thread::scope(|scope| {
        for kind in ["silence", "garbage", "flood", "reset", "half", "good", "good", "good"] {
            let proxy = &proxy;
            scope.spawn(move || {
                for number in 0..if kind == "silence" { 2 } else { 20 } {
                    let path = ["/api/ask", "/api/streaming"][number % 2];
                    if kind == "half" {
                        let mut stream = proxy.stream(kind);
                        assert_eq!(stream.next_piece(), Some(Sse::Event(delta("Half"))));
                        continue;
                    }
                    let response = proxy.connect().patient_for(PATIENCE * 2).exchange(&post(path, &json!({ "question": kind })));
                    match kind {
                        "good" => assert!(response.status == 200 && response.everything().contains("Good"), "{response:?}"),
                        _ => expect_blame(&response),
                    }
                }
            });
        }
    });
    gate.open();
    let mut probe = proxy.connect();
    within(Duration::from_secs(20), "all workers are free", || probe.exchange(&get("/readyz")).json()["workers_busy"] == 0);
}

/// What stands beside the answer: fields of the answer, of its choice, and of what was said; then the words that are
/// kept, and the usage as counted.
type Odd = (&'static str, &'static str, &'static str, &'static str, Option<[u64; 3]>);

const ODD: &[Odd] = &[
    (r#""usage":{"prompt_tokens":1.0,"completion_tokens":2.0,"total_tokens":3.0}"#, "", "", "", Some([1, 2, 3])),
    (r#""usage":{"prompt_tokens":"many","completion_tokens":2}"#, "", "", "", Some([0, 2, 2])),
    (r#""usage":{"prompt_tokens":-1,"completion_tokens":1e400}"#, "", "", "", None),
    (r#""usage":{}"#, "", "", "", None),
    (r#""usage":"none""#, "", "", "", None),
    (r#""model":7"#, "", "", "", None),
    (r#""error":" ""#, "", "", "", None),
    (r#""error":false"#, "", "", "", None),
    (r#""error":{ }"#, "", "", "", None),
    ("", r#""finish_reason":1"#, "", "", None),
    ("", r#""index":-1"#, "", "", None),
    ("", r#""index":"0""#, "", "", None),
    ("", "", r#""tool_calls":{}"#, "", None),
    ("", "", r#""tool_calls":[{"id":7,"index":0}]"#, r#"{"tool_calls":[{"arguments":null,"id":null,"name":null}]}"#, None),
    (
        "",
        "",
        r#""tool_calls":[{"index":0,"id":"c","custom":null,"function":{"name":"f","arguments":{"a": 1},"input":null}}]"#,
        r#"{"tool_calls":[{"arguments":"{\"a\": 1}","id":"c","name":"f"}]}"#,
        None,
    ),
    (
        "",
        "",
        r#""tool_calls":[{"index":0,"id":"c","function":null,"custom":{"name":"f","input":"x"}}]"#,
        r#"{"tool_calls":[{"arguments":"x","id":"c","name":"f"}]}"#,
        None,
    ),
    ("", "", r#""function_call":{"name":"f","arguments":7}"#, r#"{"tool_calls":[{"arguments":"7","id":null,"name":"f"}]}"#, None),
    ("", "", r#""refusal":{}"#, "", None),
];

#[test]
fn what_only_the_history_wants_breaks_no_answer_where_it_is_odd() {
    let fields = |first: &str, more: &str| if more.is_empty() { first.to_owned() } else { format!("{first},{more}") };
    for (top, choice, said, kept, usage) in ODD {
        let answer_with = |name: &str| {
            let said = fields(r#""content":"Yes""#, said);
            let choice = fields(&format!("\"{name}\":{{{said}}}"), choice);
            format!("{{{}}}", fields(&format!("\"choices\":[{{{choice}}}]"), top))
        };
        let (whole, begun) = (answer_with("message"), answer_with("delta"));
        let stream = vec![stream_head(), event(&begun), event("[DONE]"), end()];
        let upstream = FakeUpstream::script(vec![reply(200, &[("Content-Type", "application/json")], &whole), stream]);
        let proxy = Proxy::facing(&upstream).start();
        let answer = if kept.is_empty() { "Yes".to_owned() } else { format!("Yes\n{kept}") };
        let usage = usage.map_or(
            Value::Null,
            |[prompt, completion, total]| json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}),
        );
        assert_eq!(proxy.answer("Odd?")["answer"], answer, "{whole}");
        assert_eq!(proxy.stream("Odd?").events(), [begun, "[DONE]".to_owned()]);
        for pair in proxy.history() {
            assert_eq!((&pair["answer"], &pair["usage"]), (&json!(answer), &usage), "{whole}: {pair}");
            assert_eq!(pair["finish_reason"], Value::Null, "{whole}: {pair}");
        }
        assert_eq!(proxy.count_rows(), 2, "{whole}");
    }
}

/// Servers that cut a text into UTF-16 units may cut a character.
#[test]
fn half_a_character_costs_no_answer() {
    let said = |name: &str| {
        format!(r#"{{"choices":[{{"index":0,"{name}":{{"content":"Yes \ud83d!"}},"finish_reason":"stop"}}],"model":"m\udc00"}}"#)
    };
    let stream = vec![stream_head(), event(&said("delta")), event("[DONE]"), end()];
    let upstream = FakeUpstream::script(vec![reply(200, &[("Content-Type", "application/json")], &said("message")), stream]);
    let proxy = Proxy::facing(&upstream).start();
    let whole = proxy.answer("Half?");
    assert_eq!(proxy.stream("Half?").events(), [said("delta"), "[DONE]".to_owned()], "byte for byte");
    let streamed = proxy.newest_of(2);
    for pair in [whole, streamed] {
        let answer = pair["answer"].as_str().expect("an answer");
        assert!(answer.starts_with("Yes \u{fffd}") && answer.ends_with('!'), "{pair}");
        assert!(pair["model"].as_str().is_some_and(|model| model.starts_with("m\u{fffd}")), "{pair}");
    }
}

#[test]
fn blanks_around_done_and_events_of_blanks_do_no_harm() {
    let steps =
        vec![stream_head(), event(" "), event(&delta("Yes")), event("\t"), event(&finish("stop")), event("[DONE] "), end()];
    let upstream = FakeUpstream::always(steps);
    let proxy = Proxy::facing(&upstream).start();
    let events = proxy.stream("Blank?").events();
    assert_eq!(events.iter().map(|event| event.trim()).collect::<Vec<_>>(), [&delta("Yes"), &finish("stop"), "[DONE]"]);
    assert_eq!(proxy.newest_of(1)["finish_reason"], "stop");
}

/// Servers label what they send in many ways.
#[test]
fn what_comes_in_place_of_a_stream_is_told_by_its_first_byte() {
    let error = json!({"error": {"code": 400, "message": "No such voice"}}).to_string();
    for label in ["Application/JSON", "application/problem+json; charset=utf-8", "text/plain", "text/event-stream"] {
        for body in [&*error, &format!("\r\n {error}")] {
            let upstream = FakeUpstream::always(reply(200, &[("Content-Type", label)], body));
            let proxy = Proxy::facing(&upstream).start();
            let error = proxy.call(&streaming("Well?")).expect_error(502, "upstream_bad_answer");
            assert!(error["message"].as_str().is_some_and(|message| message.contains("No such voice")), "{label}: {error}");
        }
        let stream = format!("\n\ndata: {}\n\ndata: {}\n\ndata: [DONE]\n\n", delta("Yes"), finish("stop"));
        let upstream = FakeUpstream::always(reply(200, &[("Content-Type", label)], &stream));
        let proxy = Proxy::facing(&upstream).start();
        assert_eq!(proxy.stream("Well?").events(), [delta("Yes"), finish("stop"), "[DONE]".to_owned()], "{label}");
    }
}

#[test]
fn json_that_drips_in_place_of_a_stream_is_given_up_when_the_time_is_over() {
    for label in ["application/json", "text/event-stream"] {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {label}\r\n\r\n{{");
        let drip = [Step::Pause(Duration::from_millis(200)), send(" ")].into_iter().cycle().take(300);
        let upstream = FakeUpstream::always([send(head)].into_iter().chain(drip).collect());
        let proxy = Proxy::facing(&upstream).set("UPSTREAM_TIMEOUT_SECS", "1").start();
        let started = Instant::now();
        proxy.call(&streaming("How long?")).expect_error(503, "upstream_timeout");
        assert!(started.elapsed() < Duration::from_secs(10), "{label}: {:?}", started.elapsed());
        upstream.wait_until_left(1);
    }
}
