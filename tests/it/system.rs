//! Health, routing, and what holds for every path.

use crate::support::client::{get, post, streaming};
use crate::support::eventually;
use crate::support::gate::Gate;
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Step, answer, delta, end, event, finish, refusal, stream_head, usage};
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;

#[test]
fn livez_is_200() {
    assert_eq!(Proxy::start().get("/livez").status, 200);
}

#[test]
fn readyz_tells_the_mode_the_version_and_how_busy_it_is() {
    let response = Proxy::with(&[("WORKERS", "3")]).start().get("/readyz");
    assert_eq!(response.status, 200, "{response:?}");
    let state = response.json();
    assert_eq!(state["mode"], "mock");
    assert_eq!(state["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(state["history"], "ok");
    assert_eq!((&state["workers_busy"], &state["workers_total"]), (&json!(0), &json!(3)));
    assert_eq!(state["queue_length"], 0);
}

#[test]
fn readyz_counts_what_runs_and_what_waits() {
    let gate = Gate::new();
    let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
    let proxy = Proxy::facing(&upstream).set("WORKERS", "2").set("QUEUE_SIZE", "5").start();
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| proxy.answer("Well?"));
        }
        eventually("two run and three wait", || {
            let state = proxy.get("/readyz").json();
            (&state["workers_busy"], &state["queue_length"]) == (&json!(2), &json!(3))
        });
        assert_eq!(proxy.get("/readyz").json()["mode"], "upstream");
        gate.open();
    });
    eventually("all is quiet", || proxy.get("/readyz").json()["workers_busy"] == 0);
}

/// A thread that finds no mapping left when it begins ends the process.
#[test]
fn no_more_threads_are_allowed_than_the_system_has_mappings_for() {
    // Where nothing says how many, as in some sandboxes, there is nothing to go by.
    let most =
        std::fs::read_to_string("/proc/sys/vm/max_map_count").map_or(i64::MAX, |most| most.trim().parse().expect("a number"));
    let mut proxy = Proxy::with(&[("WORKERS", "32768"), ("MAX_CONNECTIONS", "100000")]).start();
    let workers = proxy.get("/readyz").json()["workers_total"].as_i64().expect("a number");
    let log = proxy.whole_log();
    assert!(log[0].contains("listening on"), "{log:?}");
    let is_limited = log.iter().any(|line| line.contains("vm.max_map_count"));
    if most >= 4 * (32_768 + 100_000) + 5000 {
        assert_eq!((workers, is_limited), (32_768, false));
    } else {
        assert!(workers <= most / 8 && is_limited, "{workers} {log:?}");
    }
}

/// A figure of the console that no metric has would be 0 for ever.
#[test]
fn the_console_reads_metrics_that_there_are() {
    let proxy = Proxy::start();
    proxy.answer("Who is counted?");
    let metrics = || proxy.get("/metrics").everything();
    eventually("the answer is counted", || metrics().contains("route=\"ask\",status=\"200\""));
    let metrics = metrics();
    let console = include_str!("../../src/api/pages/console.js");
    let names = [" sum(\"", "value(\""].into_iter().flat_map(|call| console.split(call).skip(1));
    let names: Vec<&str> = names.filter_map(|rest| rest.split('"').next()).collect();
    assert!(names.len() > 8, "{names:?}");
    for name in names {
        let samples = [format!("\nai_proxy_{name} "), format!("\nai_proxy_{name}{{")];
        assert!(samples.iter().any(|sample| metrics.contains(sample)), "{name}");
    }
}

#[test]
fn the_metrics_count_what_happened() {
    let silence = Gate::new();
    let upstream = FakeUpstream::script(vec![
        refusal(500, "once more"),
        answer("Yes"),
        refusal(400, "too long"),
        refusal(401, "wrong key"),
        vec![stream_head(), event(&delta("Yes")), event(&finish("stop")), event(&usage()), event("[DONE]"), end()],
        vec![Step::Wait(silence.clone())],
    ]);
    let proxy = Proxy::facing(&upstream).set("UPSTREAM_RETRIES", "1").start();
    proxy.answer("Really?");
    proxy.ask("Is it too long?").expect_error(400, "upstream_rejected");
    proxy.get("/v1/models").expect_error(502, "upstream_error");
    assert_eq!(proxy.stream("And now?").events().last().map(String::as_str), Some("[DONE]"));
    let mut leaving = proxy.connect();
    leaving.send(&post("/api/ask", &json!({"question": "Who waits?"})));
    upstream.wait_for_calls(6);
    drop(leaving);
    proxy.get("/nowhere").expect_error(404, "not_found");
    let mut text = String::new();
    eventually("the one who left is counted, and only this request is in flight", || {
        text = String::from_utf8(proxy.get("/metrics").body).expect("text");
        text.contains("{route=\"ask\",status=\"499\"} 1\n") && text.contains("requests_in_flight 1\n")
    });
    silence.open();
    for line in [
        r#"requests_total{route="ask",status="200"} 1"#,
        r#"requests_total{route="ask",status="400"} 1"#,
        r#"requests_total{route="ask",status="503"} 0"#,
        r#"requests_total{route="models",status="502"} 1"#,
        r#"requests_total{route="streaming",status="200"} 1"#,
        r#"requests_total{route="none",status="404"} 1"#,
        r#"request_duration_seconds_count{route="ask"} 3"#,
        "time_to_first_token_seconds_count 1",
        "queue_wait_seconds_count 5",
        "upstream_attempts_total 6",
        "upstream_retries_total 1",
        r#"upstream_errors_total{code="upstream_rejected"} 1"#,
        r#"upstream_errors_total{code="upstream_error"} 1"#,
        "upstream_cancelled_total 1",
        r#"tokens_total{model="gpt-4o-mini",kind="prompt"} 28"#,
        r#"tokens_total{model="gpt-4o-mini",kind="completion"} 6"#,
        "history_commits_total 2",
        "history_rows_total 2",
        "history_batch_size_sum 2",
        "history_commit_seconds_count 2",
    ] {
        assert!(text.lines().any(|counted| counted == format!("ai_proxy_{line}")), "{line}\n{text}");
    }
}

/// Of two lines of the same name and labels a reader would take the last.
#[test]
fn each_series_stands_in_the_metrics_once() {
    let proxy = Proxy::with(&[("OPENAI_FALLBACK_MODELS", "spare, other,spare,gpt-4o-mini")]).start();
    proxy.answer("Who is counted?");
    let text = proxy.get("/metrics").everything();
    let mut series: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("ai_proxy_")?.split(' ').next()).collect();
    assert!(series.contains(&r#"tokens_total{model="spare",kind="prompt"}"#), "{text}");
    let all = series.len();
    series.sort_unstable();
    series.dedup();
    assert_eq!(series.len(), all, "{text}");
    let models = proxy.get("/v1/models").json()["data"].as_array().map(Vec::len);
    assert_eq!(models, Some(3), "each is listed once");
}

#[test]
fn head_answers_like_get_without_the_body() {
    let proxy = Proxy::start();
    proxy.answer("Something?");
    let mut connection = proxy.connect();
    for target in ["/livez", "/readyz", "/api/history", "/api/history?limit=5"] {
        let with_body = connection.exchange(&get(target));
        let without = connection.exchange(&get(target).method("HEAD"));
        assert_eq!(without.status, with_body.status, "{target}");
        assert_eq!(without.header("Content-Type"), with_body.header("Content-Type"), "{target}");
    }
    let refused = connection.exchange(&get("/api/history?limit=0").method("HEAD"));
    assert_eq!(refused.status, 422);
    assert_eq!(connection.exchange(&get("/livez")).status, 200, "no stray byte was left behind");
    for (target, status) in [("/nowhere", 404), ("/api/ask", 405)] {
        let mut connection = proxy.connect();
        assert_eq!(connection.exchange(&get(target).method("HEAD").header("Connection", "close")).status, status);
        assert!(connection.is_closed_by_server(), "no body follows");
    }
    let mut broken = proxy.connect();
    broken.send_bytes("HEAD /livez HTTP/1.1\r\nno colon\r\n\r\n");
    assert_eq!(broken.read_head().status, 400);
    assert!(broken.is_closed_by_server(), "no body follows");
}

/// One key's answer is not another's, and what was ready need not be.
#[test]
fn no_answer_is_for_a_cache_on_the_way() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1")]).start();
    let ask = post("/api/ask", &json!({"question": "Hi"})).key("secret1");
    for request in [
        ask.clone(),
        get("/api/history").key("secret1"),
        get("/api/history"),
        get("/v1/models").key("secret1"),
        get("/livez"),
        get("/readyz"),
        get("/metrics").key("secret1"),
        get("/nowhere"),
    ] {
        let response = proxy.call(&request);
        assert_eq!(response.header("Cache-Control"), Some("no-store"), "{response:?}");
        assert!(response.header("Date").is_some_and(|date| httpdate::parse_http_date(date).is_ok()), "{response:?}");
    }
    for path in ["/", "/console.js", "/openapi.json"] {
        assert_ne!(proxy.get(path).header("Cache-Control"), Some("no-store"), "{path} has its own");
    }
}

#[test]
fn a_query_string_never_breaks_routing() {
    let proxy = Proxy::start();
    for query in ["?", "?a=b", "?a&&=&=b", "?%zz", "?%", "?a=/api/ask", "?a=b?c=d", "?x=%00%ff"] {
        assert_eq!(proxy.get(&format!("/livez{query}")).status, 200, "{query}");
        assert_eq!(proxy.get(&format!("/api/history{query}")).status, 200, "{query}");
        let ask = post(&format!("/api/ask{query}"), &json!({"question": "Well?"}));
        assert_eq!(proxy.call(&ask).status, 200, "{query}");
        proxy.get(&format!("/nowhere{query}")).expect_error(404, "not_found");
        proxy.get(&format!("/api/ask{query}")).expect_error(405, "method_not_allowed");
    }
}

#[test]
fn a_body_that_nobody_asked_for_does_not_become_the_next_request() {
    let proxy = Proxy::start();
    let smuggled = "GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut connection = proxy.connect();
    let request = get("/livez").header("Content-Length", &smuggled.len().to_string()).body(smuggled);
    let response = connection.exchange(&request);
    assert_eq!(response.status, 200);
    match response.header("Connection") {
        Some("close") => assert!(connection.is_closed_by_server()),
        _ => assert_eq!(connection.exchange(&get("/livez")).status, 200),
    }
}

#[test]
fn connection_close_is_honoured() {
    let proxy = Proxy::start();
    for request in [get("/livez"), post("/api/ask", &json!({"question": "Well?"})), streaming("Well?")] {
        let mut connection = proxy.connect();
        assert_eq!(connection.exchange(&request.header("Connection", "close")).status, 200);
        assert!(connection.is_closed_by_server());
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_costs_one_connection_only() {
    let proxy = Proxy::start();
    let mut gone = proxy.connect();
    gone.send(&post("/api/ask", &json!({"question": "Well?"})).header("Content-Length", "500"));
    gone.finish_sending();
    assert!(gone.is_closed_by_server());
    let reset = proxy.connect();
    reset.reset();
    let mut half = proxy.connect();
    half.send_bytes("POST /api/ask HT");
    drop(half);
    assert_eq!(proxy.get("/livez").status, 200);
    proxy.answer("Still there?");
    assert_eq!(proxy.count_rows(), 1, "half a question is none");
}

/// As one whose container is paused: its clients were not silent.
#[test]
fn a_server_that_was_stopped_goes_on_with_what_its_clients_began() {
    let proxy = Proxy::start();
    let question = post("/api/ask", &json!({"question": "Well?"})).bytes();
    let mut idle = proxy.connect();
    assert_eq!(idle.exchange(&get("/livez")).status, 200);
    let mut begun = [20, question.len() - 10].map(|length| (proxy.connect(), question.split_at(length)));
    begun.iter_mut().for_each(|(connection, (beginning, _))| connection.send_bytes(beginning));
    // All three are waited for.
    std::thread::sleep(Duration::from_millis(100));
    proxy.signal(Signal::STOP);
    std::thread::sleep(Duration::from_millis(100));
    proxy.signal(Signal::CONT);
    for (mut connection, (_, rest)) in begun {
        connection.send_bytes(rest);
        let response = connection.read_response();
        assert_eq!(response.status, 200, "{response:?}");
    }
    assert_eq!(idle.exchange(&get("/livez")).status, 200);
}

#[test]
fn clients_that_come_and_go_are_all_answered() {
    let proxy = Proxy::start();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for number in 0..500 {
                    match number % 10 {
                        0 => assert!(!proxy.answer("Well?").is_null()),
                        _ => assert_eq!(proxy.get("/livez").status, 200),
                    }
                }
            });
        }
    });
}

#[test]
fn clients_that_crash_before_they_are_served_hold_nobody_up() {
    let proxy = Proxy::start();
    // Were each of them to cost a tenth of a second, the next would wait in vain.
    (0..500).for_each(|_| proxy.connect().reset());
    assert_eq!(proxy.get("/livez").status, 200);
}

#[test]
fn at_max_connections_the_present_go_on_and_the_next_waits_for_a_place() {
    let proxy = Proxy::with(&[("MAX_CONNECTIONS", "2")]).start();
    let [mut first, mut second] = [proxy.connect(), proxy.connect()];
    assert_eq!(first.exchange(&get("/livez")).status, 200);
    assert_eq!(second.exchange(&get("/livez")).status, 200);
    let mut third = proxy.connect();
    third.send(&get("/livez"));
    for connection in [&mut first, &mut second] {
        let ask = post("/api/ask", &json!({"question": "Well?"}));
        assert_eq!(connection.exchange(&ask).status, 200);
    }
    assert_eq!(second.exchange(&get("/readyz")).json()["connections"], 2, "the third is not let in");
    drop(first);
    assert_eq!(third.read_response().status, 200);
}
