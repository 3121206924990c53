//! The log: one line a request, and no word of what was asked, answered or secret.

use crate::support::client::{Connection, get, post, streaming};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::hostile::{plug_in, plug_in_narrow, throw};
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::upstream::{
    FakeUpstream, Step, answer, completion, delta, end, event, finish, refusal, reply, reply_json, stream_head, streamed,
};
use serde_json::json;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

/// The one line about the request with this id, once it is written.
#[track_caller]
fn line_of(proxy: &Proxy, id: &str) -> String {
    let line = proxy.wait_for_line(|line| line.contains(id));
    let count = proxy.log().iter().filter(|line| line.contains(id)).count();
    assert_eq!(count, 1, "one line a request: {:#?}", proxy.log());
    line
}

#[track_caller]
fn expect_in(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// `2026-11-22T21:34:00` and what belongs to it, then the level.
fn has_time_and_level(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let time = words.next().unwrap_or_default();
    let digits =
        |range: std::ops::Range<usize>| time.get(range).is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    let dated = digits(0..4) && digits(5..7) && digits(8..10) && digits(11..13) && digits(14..16) && digits(17..19);
    let zoned = time.ends_with('Z') || time.get(19..).is_some_and(|rest| rest.contains(['+', '-']));
    let level = words.next().unwrap_or_default().trim_matches(['[', ']', ':']);
    dated && zoned && time.get(10..11) == Some("T") && ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level)
}

#[test]
fn every_line_has_a_time_and_a_level_and_stderr_is_silent() {
    let mut proxy = Proxy::start();
    proxy.answer("Well?");
    proxy.get("/nowhere");
    for line in proxy.whole_log() {
        assert!(has_time_and_level(&line), "{line}");
    }
    assert_eq!(proxy.stderr(), Vec::<String>::new());
}

#[test]
fn the_first_lines_say_the_address_the_mode_and_the_database() {
    let proxy = Proxy::start();
    let address = format!("listening on http://{}", proxy.address);
    proxy.wait_for_line(|line| line.contains(&address));
    proxy.wait_for_line(|line| line.contains("mock"));
    proxy.wait_for_line(|line| line.contains("history.db"));
}

#[test]
fn an_answered_request_is_one_line_with_everything_in_it() {
    let upstream = FakeUpstream::answering(|request| match request.is_streaming() {
        true => streamed(&["an answer"]),
        false => answer("an answer"),
    });
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1").start();
    for (id, path) in [("id-of-ask", "/api/ask"), ("id-of-stream", "/api/streaming")] {
        let request = post(path, &json!({"question": "a question"})).key("secret1").header("X-Request-Id", id);
        let response = proxy.call(&request);
        assert_eq!(response.status, 200);
        let line = line_of(&proxy, id);
        assert!(path != "/api/ask" || line.contains(&response.body.len().to_string()), "the bytes: {line}");
        expect_in(&line, &["INFO", "127.0.0.1", "alice", "POST", path, "200", "ms"]);
        assert!(line.contains("fake-model-1") || line.contains("gpt-4o-mini"), "the model: {line}");
    }
    let read = get("/api/history?q=secret_words").key("secret1").header("X-Request-Id", "id-of-history");
    proxy.call(&read);
    let line = line_of(&proxy, "id-of-history");
    expect_in(&line, &["alice", "GET", "/api/history", "200"]);
    assert!(!line.contains("secret_words"), "what is searched for is a question too: {line}");
}

#[test]
fn a_refused_request_is_one_line_with_its_error_code() {
    let upstream = FakeUpstream::always(refusal(500, "words of the upstream"));
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1").set("MAX_BODY_BYTES", "1000").start();
    let ask = post("/api/ask", &json!({"question": "a question"})).key("secret1");
    for (id, request, parts) in [
        ("id-1", ask.clone(), ["alice", "POST", "/api/ask", "502", "upstream_error"]),
        ("id-2", ask.clone().key("wrong"), ["127.0.0.1", "POST", "/api/ask", "401", "unauthorized"]),
        ("id-3", get("/nowhere"), ["127.0.0.1", "GET", "/nowhere", "404", "not_found"]),
        ("id-4", get("/api/ask"), ["127.0.0.1", "GET", "/api/ask", "405", "method_not_allowed"]),
        ("id-5", ask.clone().header("Content-Length", "2000"), ["alice", "POST", "/api/ask", "413", "body_too_large"]),
        ("id-6", ask.clone().header("Content-Type", "a/b"), ["alice", "POST", "/api/ask", "415", "unsupported_media_type"]),
        ("id-7", post("/api/ask", &json!({})).key("secret1"), ["alice", "POST", "/api/ask", "422", "invalid_request"]),
    ] {
        proxy.call(&request.header("X-Request-Id", id));
        expect_in(&line_of(&proxy, id), &parts);
    }
}

#[test]
fn a_stream_that_breaks_or_is_left_is_one_line_too() {
    let upstream = FakeUpstream::script(vec![
        vec![stream_head(), event(&delta("Half")), Step::Close],
        vec![stream_head(), event(&delta("Half")), Step::Silence],
    ]);
    let proxy = Proxy::facing(&upstream).set("STREAM_HEARTBEAT_SECS", "1").start();
    proxy.call(&streaming("a question").header("X-Request-Id", "id-broken"));
    let line = line_of(&proxy, "id-broken");
    expect_in(&line, &["/api/streaming", "200", "upstream_"]);
    let mut stream = proxy.connect().stream(&streaming("a question").header("X-Request-Id", "id-left"));
    stream.expect_event(&delta("Half"));
    drop(stream);
    let line = line_of(&proxy, "id-left");
    expect_in(&line, &["/api/streaming", "200"]);
}

/// Its end cannot be sent, but what came before was.
#[test]
fn a_stream_whose_client_is_gone_at_its_end_says_what_was_sent() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::always(vec![
        stream_head(),
        event(&delta("All")),
        event(&finish("stop")),
        Step::Wait(held),
        event("[DONE]"),
        end(),
    ]);
    let proxy = Proxy::facing(&upstream).start();
    let stream = plug_in(proxy.address);
    throw(&stream, &[&streaming("a question").header("X-Request-Id", "id-reset").bytes()]);
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(&finish("stop")) {
        let mut piece = [0; 4096];
        let read = (&stream).read(&mut piece).expect("a stream");
        heard.extend_from_slice(&piece[..read]);
    }
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger");
    drop(stream);
    gate.open();
    let line = line_of(&proxy, "id-reset");
    assert!(!line.contains(" bytes=0 "), "{line}");
}

#[test]
fn an_answer_that_its_client_did_not_take_is_logged_as_such() {
    let proxy = Proxy::start();
    proxy.answer("Much?");
    let grown = "UPDATE history SET answer = hex(zeroblob(2 << 20))";
    assert_eq!(proxy.database().execute(grown, []).expect("the row is there"), 1);
    let stream = plug_in_narrow(proxy.address);
    throw(&stream, &[b"GET /api/history HTTP/1.1\r\nHost: a\r\nX-Request-Id: id-untaken\r\n\r\n"]);
    stream.peek(&mut [0]).expect("its answer begins");
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger");
    drop(stream);
    expect_in(&line_of(&proxy, "id-untaken"), &["status=200", "bytes=0", "code=client_gone"]);
}

/// A client's name for a model is no other field of its line.
#[test]
fn the_name_of_a_model_is_one_word_of_the_log() {
    let mut nameless = completion("Yes");
    nameless.as_object_mut().expect("an object").remove("model");
    let upstream = FakeUpstream::always(reply_json(200, &nameless));
    let proxy = Proxy::facing(&upstream).start();
    for (id, model, shown) in [("id-1", "a b\n code=c", "a_b__code=c"), ("id-2", &*"x".repeat(150), &*"x".repeat(100))] {
        let question = json!({"question": "Well?", "model": model});
        assert_eq!(proxy.call(&post("/api/ask", &question).header("X-Request-Id", id)).status, 200);
        expect_in(&line_of(&proxy, id), &[&format!(" model={shown} code=-")]);
    }
}

/// All that there are in the end.
fn warnings(proxy: &mut Proxy) -> Vec<String> {
    proxy.whole_log().into_iter().filter(|line| line.contains("[WARN]")).collect()
}

#[test]
fn the_log_says_why_the_llm_gave_no_answer_and_not_in_its_words() {
    for (status, said) in
        [(401, "refused the server's key; check OPENAI_API_KEY (401)"), (404, "has nothing there"), (500, "failed (500)")]
    {
        let body = json!({"error": {"message": "words of its own"}}).to_string();
        let upstream = FakeUpstream::always(reply(status, &[("X-Request-Id", "req_of-the-llm")], &body));
        let mut proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "0").start();
        proxy.ask("Well?");
        let told = warnings(&mut proxy);
        assert!(told.len() == 1 && told[0].contains(said) && !told[0].contains("of its own"), "{told:?}");
        assert!(told[0].ends_with("its request req_of-the-llm"), "what its support asks for: {told:?}");
    }
}

/// Its support would look for the wrong one.
#[test]
fn what_was_not_answered_has_no_id_of_the_attempt_before() {
    let refused = reply(500, &[("X-Request-Id", "req_of-the-first"), ("Connection", "close")], "");
    let upstream = FakeUpstream::script(vec![refused, vec![Step::Close]]);
    let mut proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").start();
    proxy.ask("Well?").expect_error(503, "upstream_unavailable");
    let told = warnings(&mut proxy);
    assert!(told.len() == 1 && !told[0].contains("its request"), "{told:?}");
}

/// Also where it answered 200, and where a stream had begun.
#[test]
fn the_log_says_why_what_came_is_no_answer() {
    let error = r#"{"error":{"code":400,"message":"words of its own"}}"#;
    let begun = |end: Step| vec![stream_head(), event(&delta("Half")), end];
    let cases: [(bool, Vec<Step>, &str); 10] = [
        (false, reply(200, &[], "words of its own"), "the LLM gave no answer: its answer is not a chat completion"),
        (false, reply(200, &[], r#"{"choices":"words of its own"}"#), "its answer is not a chat completion"),
        (false, reply(200, &[], error), "it answered with an error"),
        (false, reply(200, &[], r#"{"choices":[]}"#), "its answer has no choices"),
        (true, vec![stream_head(), event(error), end()], "its stream broke off with an error"),
        (true, begun(event(error)), "its stream broke off with an error"),
        (true, reply(200, &[("Content-Type", "text/html")], "words of its own"), "stream ended without any event"),
        (true, reply(200, &[], ""), "stream ended without any event"),
        (true, begun(Step::Close), "the LLM's stream broke off"),
        (true, begun(Step::Silence), "the LLM's stream was silent for 1 s"),
    ];
    for (streams, steps, said) in cases {
        let upstream = FakeUpstream::always(steps);
        let idle = if said.contains("silent") { "1" } else { "60" };
        let mut proxy = Proxy::facing(&upstream).set("UPSTREAM_IDLE_SECS", idle).start();
        proxy.call(&if streams { streaming("Well?") } else { post("/api/ask", &json!({"question": "Well?"})) });
        let told = warnings(&mut proxy);
        assert!(told.len() == 1 && told[0].contains(said) && !told[0].contains("of its own"), "{said}: {told:?}");
    }
}

#[test]
fn the_log_says_after_what_another_model_is_asked() {
    let failures = [refusal(500, "no"), reply_json(200, &json!({"error": {"code": 500, "message": "no"}}))];
    for (failure, said) in failures.into_iter().zip(["failed (500)", "it answered with an error"]) {
        for path in ["/api/ask", "/api/streaming"] {
            let failure = failure.clone();
            let upstream = FakeUpstream::answering(move |request| match request.json()["model"] == "good" {
                true if request.is_streaming() => streamed(&["Yes"]),
                true => reply_json(200, &completion("Yes")),
                false => failure.clone(),
            });
            let setup = Proxy::facing(&upstream).set("OPENAI_FALLBACK_MODELS", "good").set("UPSTREAM_RETRIES", "0");
            let mut proxy = setup.start();
            assert_eq!(proxy.call(&post(path, &json!({"question": "Well?"}))).status, 200);
            let told = warnings(&mut proxy);
            assert!(told.len() == 2 && told[0].contains(said), "{path}: {told:?}");
            assert!(told[1].contains("\"good\" is asked next, after upstream_"), "{path}: {told:?}");
        }
    }
}

#[test]
fn no_question_answer_header_or_secret_is_in_any_line_at_any_level() {
    for level in ["info", "debug", "trace"] {
        let upstream = FakeUpstream::answering(|request| {
            let echo = format!("said the upstream: {UPSTREAM_KEY} url-password");
            match (request.question().as_str(), request.is_streaming()) {
                ("word-of-refusal", _) => refusal(401, &echo),
                ("word-of-bad-answer", _) => reply_json(200, &json!({"error": {"message": echo}})),
                (_, true) => streamed(&["word-of-the-answer"]),
                (_, false) => {
                    let mut said = completion("word-of-the-answer");
                    said["choices"][0]["message"]["note"] = json!("word-of-the-note");
                    reply_json(200, &said)
                }
            }
        });
        let url = format!("http://url-user:url-password@{}/v1", upstream.address());
        let setup = Proxy::facing(&upstream).set("OPENAI_BASE_URL", url).set("LOG_LEVEL", level);
        let mut proxy = setup.set("API_KEYS", "alice:secret-of-alice").set("SYSTEM_PROMPT", "word-of-the-system").start();
        for path in ["/api/ask", "/api/streaming"] {
            for question in ["word-of-the-question", "word-of-refusal", "word-of-bad-answer"] {
                let request = post(path, &json!({"question": question}));
                proxy.call(&request.clone().key("secret-of-alice").header("X-Word", "word-of-a-header"));
                proxy.call(&request.key("word-of-a-wrong-key"));
            }
            let unknown = json!({"question": "word-of-the-question", "word-of-a-field": "word-of-a-value"});
            proxy.call(&post(path, &unknown).key("secret-of-alice"));
        }
        proxy.call(&get("/api/history?q=word-of-the-query").key("secret-of-alice"));
        proxy.call(&get("/livez").header("Cookie", "word-of-a-cookie"));
        proxy.connect().send_bytes("GET /livez HTTP/1.1\r\nword-of-a-malformed-header\r\n\r\n");
        proxy.stop();
        let lines = [proxy.log(), proxy.stderr()].concat();
        assert!(lines.iter().any(|line| line.contains("/api/ask")), "it did log: {lines:#?}");
        for line in lines {
            for secret in [UPSTREAM_KEY, "secret-of-alice", "url-password", "word-of-"] {
                assert!(!line.contains(secret), "{level}: {secret} in: {line}");
            }
        }
    }
}

#[test]
fn nothing_that_a_client_sends_can_forge_a_line() {
    let mut proxy = Proxy::start();
    let forged = "2030-01-01T00:00:00Z INFO forged";
    proxy.get("/a%0a2030-01-01T00:00:00Z%20INFO%20forged");
    proxy.call(&get("/b").header("X-Request-Id", forged));
    proxy.connect().send_bytes(format!("GET /c\r{forged} HTTP/1.1\r\nHost: a\r\n\r\n"));
    proxy.connect().send_bytes(format!("GET /\x1b[31m{forged} HTTP/1.1\r\nHost: a\r\n\r\n"));
    proxy.get("/last");
    proxy.wait_for_line(|line| line.contains("/last"));
    proxy.expect_no_line(|line| line.starts_with("2030") || line.contains(['\x1b', '\r']));
}

#[test]
fn the_level_says_what_is_written() {
    for (level, is_told) in [("info", false), ("debug", true)] {
        let upstream = FakeUpstream::script(vec![refusal(500, "no"), answer("Yes")]);
        let mut proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").set("LOG_LEVEL", level).start();
        proxy.answer("Well?");
        let log = proxy.whole_log();
        assert_eq!(log.iter().any(|line| line.contains("[DEBUG] attempt 1 failed")), is_told, "{level}: {log:#?}");
    }
}

/// Ends with the test.
struct Started(std::process::Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Requests do not wait for whoever was to read the log; who reads it in the end is told what is missing.
#[test]
fn a_stdout_that_nobody_reads_costs_lines_and_no_answers() {
    const ASKING: usize = 64;
    const ROUNDS: usize = 8;
    let setup = Setup::new();
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_ai-proxy"))
        .current_dir(setup.folder())
        .env_clear()
        .envs([("PORT", "0"), ("DATABASE_PATH", "history.db"), ("MOCK_DELAY_MS", "0")])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut started = Started(child);
    let mut stdout = BufReader::new(started.0.stdout.take().expect("stdout"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a line");
    let address = line.trim().rsplit("http://").next().and_then(|address| address.parse().ok()).expect("an address");
    let database = rusqlite::Connection::open(setup.folder().join("history.db")).expect("it opens");
    let question = post("/api/ask", &json!({"question": "Well?"})).header("X-Request-Id", &"a".repeat(120));
    // A pipe takes 64 KiB by itself.
    for round in 0..ROUNDS {
        // What waits for the lock is stored together, and its lines are written together.
        database.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        let mut asking: Vec<_> = (0..ASKING).map(|_| Connection::open(address)).collect();
        asking.iter_mut().for_each(|connection| connection.send(&question));
        eventually("all wait", || {
            let metrics = Connection::open(address).exchange(&get("/metrics")).everything();
            metrics.contains(&format!("ai_proxy_requests_in_flight {}\n", ASKING + 1))
        });
        database.execute_batch("ROLLBACK").expect("the lock is given back");
        for mut connection in asking {
            assert_eq!(connection.read_response().status, 200, "round {round}");
        }
    }
    let mut lines = Vec::new();
    let (mut read, mut lost) = (0, 0);
    while read + lost < ASKING * ROUNDS {
        // What was lost is said when the next line finds room.
        if lost == 0 {
            Connection::open(address).exchange(&get("/livez"));
        }
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line");
        read += usize::from(line.contains("/api/ask"));
        if let Some((before, _)) = line.split_once(" lines of the log are lost") {
            lost += before.rsplit(' ').next().and_then(|number| number.parse::<usize>().ok()).expect("how many");
        }
        lines.push(line);
    }
    assert!(lines.iter().all(|line| line.starts_with("20") && line.ends_with('\n')), "whole lines: {lines:#?}");
    assert!(lost > 0, "the test writes more than a pipe takes");
}
