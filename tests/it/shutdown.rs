//! SIGTERM and SIGINT: what is in flight finishes, nothing new begins, all is written.

use crate::support::client::{Connection, get, post, streaming};
use crate::support::gate::Gate;
use crate::support::hostile::{plug_in_narrow, throw};
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Step, answer, delta, end, event, finish, stream_head};
use crate::support::{PATIENCE, eventually};
use rustix::process::Signal;
use serde_json::json;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Less than the grace by default: who waits for nothing must not use it up.
const SOON: Duration = Duration::from_secs(15);

/// Waits on an open connection until the server says that it drains.
#[track_caller]
fn wait_until_draining(connection: &mut Connection) {
    eventually("/readyz turns 503", || {
        let response = connection.exchange(&get("/readyz"));
        if response.status == 200 {
            return false;
        }
        assert_eq!(response.status, 503, "{response:?}");
        assert!(response.header("Retry-After").is_some(), "{response:?}");
        true
    });
}

/// A connection that the server has accepted and served, now idle.
fn open(proxy: &Proxy) -> Connection {
    let mut connection = proxy.connect();
    assert_eq!(connection.exchange(&get("/livez")).status, 200);
    connection
}

#[test]
fn what_is_in_flight_finishes_and_nothing_new_begins() {
    for signal in [Signal::TERM, Signal::INT] {
        let gate = Gate::new();
        let mut steps = vec![Step::Wait(gate.clone())];
        steps.extend(answer("at last"));
        let upstream = FakeUpstream::always(steps);
        let mut proxy = Proxy::facing(&upstream).start();
        let mut asking = proxy.connect();
        asking.send(&post("/api/ask", &json!({"question": "In flight?"})));
        upstream.wait_for_calls(1);
        let [mut looking, mut late, mut later] = [open(&proxy), open(&proxy), open(&proxy)];
        proxy.signal(signal);
        wait_until_draining(&mut looking);
        assert_eq!(looking.exchange(&get("/readyz")).json()["status"], "draining");
        assert_eq!(looking.exchange(&get("/livez")).status, 200, "it lives");
        let ask = post("/api/ask", &json!({"question": "Too late?"}));
        for (connection, request) in [(&mut late, &ask), (&mut later, &streaming("Too late?"))] {
            let refusal = connection.exchange(request);
            refusal.expect_error(503, "shutting_down");
            // Who has a pool of connections would try again on this one.
            assert_eq!(refusal.header("Connection"), Some("close"));
            assert!(connection.is_closed_by_server());
        }
        eventually("new connections are refused", || TcpStream::connect(proxy.address).is_err());
        gate.open();
        let response = asking.read_response();
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(response.json()["answer"], "at last");
        assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
        assert_eq!(upstream.calls(), 1);
        assert_eq!(proxy.count_rows(), 1);
    }
}

/// A request is in flight from its head on.
#[test]
fn a_body_that_is_still_coming_is_waited_for() {
    let mut proxy = Proxy::start();
    let [mut looking, mut asking] = [open(&proxy), open(&proxy)];
    let whole = post("/api/ask", &json!({"question": "Still coming?"})).header("Expect", "100-continue").bytes();
    let (begun, rest) = whole.split_at(whole.len() - 10);
    asking.send_bytes(begun);
    assert_eq!(asking.read_bodyless().status, 100, "its head was read");
    proxy.signal(Signal::TERM);
    wait_until_draining(&mut looking);
    asking.send_bytes(rest);
    assert_eq!(asking.read_response().status, 200);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    assert_eq!(proxy.count_rows(), 1);
}

#[test]
fn a_stream_in_flight_finishes() {
    let gate = Gate::new();
    let steps = vec![
        stream_head(),
        event(&delta("First ")),
        Step::Wait(gate.clone()),
        event(&delta("last")),
        event(&finish("stop")),
        event("[DONE]"),
        end(),
    ];
    let upstream = FakeUpstream::always(steps);
    let mut proxy = Proxy::facing(&upstream).start();
    let mut looking = open(&proxy);
    let mut stream = proxy.stream("In flight?");
    stream.expect_event(&delta("First "));
    proxy.signal(Signal::TERM);
    wait_until_draining(&mut looking);
    gate.open();
    assert_eq!(stream.events(), [delta("last"), finish("stop"), "[DONE]".to_owned()]);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    let kept: String = proxy.database().query_row("SELECT answer FROM history", [], |row| row.get(0)).expect("a row");
    assert_eq!(kept, "First last");
}

#[test]
fn what_waits_in_the_queue_finishes_too() {
    let gate = Gate::new();
    let mut steps = vec![Step::Wait(gate.clone())];
    steps.extend(answer("at last"));
    let upstream = FakeUpstream::always(steps);
    let mut proxy = Proxy::facing(&upstream).set("WORKERS", "1").set("QUEUE_SIZE", "1").start();
    let ask = post("/api/ask", &json!({"question": "In flight?"}));
    let mut first = proxy.connect();
    first.send(&ask);
    upstream.wait_for_calls(1);
    let mut queued = proxy.connect();
    queued.send(&ask);
    eventually("the second one waits in the queue", || proxy.get("/readyz").json()["queue_length"] == 1);
    proxy.signal(Signal::TERM);
    gate.open();
    for waiting in [&mut first, &mut queued] {
        assert_eq!(waiting.read_response().status, 200);
    }
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    assert_eq!(proxy.count_rows(), 2);
}

#[test]
fn an_idle_server_ends_at_once_and_closes_its_database_cleanly() {
    let mut proxy = Proxy::start();
    proxy.answer("Before?");
    assert_eq!(proxy.history().len(), 1, "a reader is kept");
    let _idle = [open(&proxy), open(&proxy), proxy.connect()];
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    for rest in ["history.db-wal", "history.db-shm"] {
        assert!(!proxy.setup().folder().join(rest).exists(), "{rest} is left behind");
    }
    assert_eq!(proxy.count_rows(), 1);
    assert_eq!(proxy.stderr(), Vec::<String>::new());
}

/// What is left then is told so, and kept as far as it came.
#[test]
fn the_grace_has_an_end() {
    let upstream = FakeUpstream::answering(|request| match request.is_streaming() {
        true => vec![stream_head(), event(&delta("Half")), Step::Silence],
        false => vec![Step::Silence],
    });
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "1").set("WORKERS", "2").start();
    let ask = post("/api/ask", &json!({"question": "Never answered?"}));
    let [mut asking, mut queued] = [proxy.connect(), proxy.connect()];
    asking.send(&ask);
    let mut stream = proxy.stream("Never ended?");
    stream.expect_event(&delta("Half"));
    upstream.wait_for_calls(2);
    queued.send(&ask);
    eventually("one waits in the queue", || proxy.get("/readyz").json()["queue_length"] == 1);
    proxy.signal(Signal::TERM);
    asking.read_response().expect_error(503, "shutting_down");
    queued.read_response().expect_error(503, "shutting_down");
    stream.expect_failure("shutting_down");
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    assert_eq!(upstream.calls(), 2);
    let kept = "SELECT answer || ', ' || finish_reason FROM history";
    let kept: String = proxy.database().query_row(kept, [], |row| row.get(0)).expect("a row");
    assert_eq!((kept.as_str(), proxy.count_rows()), ("Half, shutting_down", 1));
    proxy.expect_intact();
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let upstream = FakeUpstream::always(vec![Step::Silence]);
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "120").start();
    let mut asking = proxy.connect();
    asking.send(&post("/api/ask", &json!({"question": "Never answered?"})));
    upstream.wait_for_calls(1);
    let mut looking = open(&proxy);
    proxy.signal(Signal::TERM);
    wait_until_draining(&mut looking);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_for_exit(PATIENCE).code(), Some(130));
}

#[test]
fn a_client_that_sends_nothing_does_not_hold_it() {
    let mut proxy = Proxy::with(&[("SHUTDOWN_GRACE_SECS", "2")]).start();
    let _silent = open(&proxy);
    let mut dripping = proxy.connect();
    dripping.send_bytes("POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{\"que");
    assert_eq!(proxy.get("/livez").status, 200);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
}

#[test]
fn who_waits_at_the_end_of_the_grace_is_told_whatever_it_waits_for() {
    let upstream = FakeUpstream::always(vec![Step::Silence]);
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "1").start();
    let ask = post("/api/ask", &json!({"question": "Never answered?"}));
    let once = ask.clone().header("Idempotency-Key", "one");
    let mut waiting = [proxy.connect(), proxy.connect(), proxy.connect()];
    let [first, equal, beginning] = &mut waiting;
    first.send(&once);
    upstream.wait_for_calls(1);
    equal.send(&once);
    let whole = ask.header("Expect", "100-continue").bytes();
    beginning.send_bytes(&whole[..whole.len() - 10]);
    assert_eq!(beginning.read_bodyless().status, 100, "its head was read");
    let waiting_now = "ai_proxy_requests_in_flight 4\n";
    eventually("all of them wait", || String::from_utf8_lossy(&proxy.get("/metrics").body).contains(waiting_now));
    proxy.signal(Signal::TERM);
    for connection in &mut waiting {
        connection.read_response().expect_error(503, "shutting_down");
    }
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn a_stream_whose_client_does_not_read_is_kept_at_the_end_of_the_grace() {
    let mut steps = vec![stream_head()];
    steps.extend(std::iter::repeat_with(|| event(&delta(&"much ".repeat(2000)))).take(800));
    steps.push(Step::Silence);
    let upstream = FakeUpstream::always(steps);
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "1").start();
    let client = plug_in_narrow(proxy.address);
    throw(&client, &[&streaming("Who reads all that?").bytes()]);
    upstream.wait_for_calls(1);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    let kept = "SELECT finish_reason FROM history WHERE answer LIKE 'much much %'";
    let kept: String = proxy.database().query_row(kept, [], |row| row.get(0)).expect("a row");
    assert_eq!(kept, "shutting_down");
    let lines = proxy.log().into_iter().filter(|line| line.contains("code=shutting_down")).count();
    assert_eq!(lines, 1);
}

#[test]
fn whose_answer_is_cut_at_the_end_of_the_grace_did_not_leave() {
    let upstream = FakeUpstream::always(answer(&"much ".repeat(1 << 20)));
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "0").start();
    let client = plug_in_narrow(proxy.address);
    throw(&client, &[&post("/api/ask", &json!({"question": "Who reads all that?"})).bytes()]);
    client.peek(&mut [0]).expect("its answer begins");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    let log = proxy.whole_log();
    let line = log.iter().find(|line| line.contains("path=/api/ask")).expect("its line");
    assert!(line.contains(" status=200 ") && line.ends_with(" code=shutting_down"), "{line}");
}

/// What is stored is answered, also where the commit came after the grace was over.
#[test]
fn answers_that_wait_for_the_disk_at_the_end_of_the_grace_go_out() {
    let mut proxy = Proxy::with(&[("SHUTDOWN_GRACE_SECS", "0")]).start();
    let database = proxy.database();
    database.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
    let mut asking = [proxy.connect(), proxy.connect(), proxy.connect()];
    asking.iter_mut().for_each(|connection| connection.send(&post("/api/ask", &json!({"question": "Kept?"}))));
    // Each question is one prompt token, which is counted when the LLM has answered.
    let answered = "kind=\"prompt\"} 3\n";
    eventually("all of them wait", || String::from_utf8_lossy(&proxy.get("/metrics").body).contains(answered));
    proxy.signal(Signal::TERM);
    proxy.wait_for_line(|line| line.contains("were not finished in time"));
    database.execute_batch("ROLLBACK").expect("the lock is given back");
    drop(database);
    for connection in &mut asking {
        assert_eq!(connection.read_response().status, 200);
    }
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
    assert_eq!(proxy.count_rows(), 3);
    assert_eq!(
        proxy.log().iter().filter(|line| line.contains("path=/api/ask status=200") && line.ends_with("code=-")).count(),
        3
    );
}

/// One after the other they would wait twice as long as those who are ended have.
#[test]
fn who_waits_for_a_locked_database_behind_others_is_told_before_the_end() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let mut proxy = Proxy::facing(&upstream).set("SHUTDOWN_GRACE_SECS", "0").start();
    let other = proxy.database();
    other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
    let mut clients = [proxy.connect(), proxy.connect(), proxy.connect()];
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&post("/api/ask", &json!({"question": "Locked?"})));
        upstream.wait_for_calls(number + 1);
        // So that the first is at the lock before the next has its answer.
        std::thread::sleep(Duration::from_millis(100));
    }
    proxy.signal(Signal::TERM);
    for client in &mut clients {
        client.read_response().expect_error(503, "history_unavailable");
    }
    assert_eq!(proxy.wait_for_exit(SOON).code(), Some(0), "{:?}", proxy.stderr());
}

/// Sends requests on one connection until that ends; the ids of those whose answers came whole.
fn ask_to_the_end(mut connection: TcpStream, client: usize) -> Vec<String> {
    let mut answered = Vec::new();
    loop {
        let id = format!("{client}-{}", answered.len());
        let request = format!(
            "POST /api/ask HTTP/1.1\r\nHost: a\r\nX-Request-Id: {id}\r\nContent-Length: 16\r\n\r\n{{\"question\":\"a\"}}"
        );
        if connection.write_all(request.as_bytes()).is_err() {
            return answered;
        }
        let (mut answer, mut piece) = (String::new(), [0; 4096]);
        // All bodies are JSON objects, and no head has a brace.
        while !answer.ends_with('}') {
            match connection.read(&mut piece) {
                Ok(read @ 1..) => answer.push_str(&String::from_utf8_lossy(&piece[..read])),
                _ => return answered,
            }
        }
        answered.push(id);
    }
}

/// Who goes on asking on a connection from before may be the last thing that happens.
#[test]
fn whoever_is_answered_has_a_line_in_the_log_also_at_the_very_end() {
    for _ in 0..8 {
        let mut proxy = Proxy::with(&[("MOCK_DELAY_MS", "0")]).start();
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let connection = TcpStream::connect(proxy.address).expect("connected");
                std::thread::spawn(move || ask_to_the_end(connection, client))
            })
            .collect();
        proxy.wait_for_line(|line| line.contains("id=5-9 "));
        proxy.signal(Signal::TERM);
        assert_eq!(proxy.wait_for_exit(PATIENCE).code(), Some(0));
        let log = proxy.whole_log();
        let told: HashSet<&str> = log.iter().filter_map(|line| line.split_once(" id=")?.1.split(' ').next()).collect();
        for id in clients.into_iter().flat_map(|client| client.join().expect("no panic")) {
            assert!(told.contains(&*id), "{id} was answered and has no line");
        }
    }
}
