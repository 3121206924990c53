//! `kill -9` under load loses nothing that a client was told.

use crate::support::PATIENCE;
use crate::support::client::{Connection, post};
use crate::support::proxy::{Proxy, Setup};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Sender, channel};

/// What a client has read to its end: the question, and the id where there was one.
struct Acknowledged {
    question: String,
    id: Option<i64>,
}

/// Asks until the server is gone. Odd clients ask for streams.
fn ask_until_the_end(address: SocketAddr, client: usize, round: usize, told: &Sender<Acknowledged>) -> Option<()> {
    let mut connection = TcpStream::connect(address).ok()?;
    for number in 0.. {
        let question = format!("round {round} client {client} number {number}");
        let path = if client % 2 == 1 { "/api/streaming" } else { "/api/ask" };
        let body = json!({ "question": question }).to_string();
        let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        connection.write_all(format!("{head}{body}").as_bytes()).ok()?;
        let id = match path {
            "/api/ask" => Some(read_pair(&mut connection)?["id"].as_i64()?),
            _ => read_until_done(&mut connection)?,
        };
        told.send(Acknowledged { question, id }).ok()?;
    }
    None
}

/// A response with a length, or nothing where the server died in it.
fn read_pair(connection: &mut TcpStream) -> Option<Value> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(head) = seen.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let text = String::from_utf8_lossy(&seen[..head]).to_lowercase();
            assert!(text.starts_with("http/1.1 200"), "only death may stop it: {text}");
            let (_, length) = text.split_once("content-length:").expect("a length");
            let length: usize = length.lines().next()?.trim().parse().expect("a number");
            if seen.len() >= head + 4 + length {
                return Some(serde_json::from_slice(&seen[head + 4..]).expect("JSON"));
            }
        }
        let count = connection.read(&mut buffer).ok().filter(|count| *count > 0)?;
        seen.extend(&buffer[..count]);
    }
}

/// Acknowledged is a stream as soon as `[DONE]` can be read.
fn read_until_done(connection: &mut TcpStream) -> Option<Option<i64>> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&seen);
        assert!(!text.contains("\"error\""), "only death may stop it: {text}");
        if text.contains("[DONE]") && text.ends_with("0\r\n\r\n") {
            return Some(None);
        }
        let done = text.contains("[DONE]");
        match connection.read(&mut buffer) {
            Ok(count) if count > 0 => seen.extend(&buffer[..count]),
            _ => return done.then_some(None),
        }
    }
}

#[test]
fn every_acknowledged_pair_survives_kill_9_under_load() {
    let mut setup: Setup = Proxy::with(&[("WORKERS", "8"), ("QUEUE_SIZE", "100"), ("MAX_CONNECTIONS", "100")]);
    let mut acknowledged: Vec<Acknowledged> = Vec::new();
    for round in 0..6 {
        let mut proxy = setup.start();
        let (tell, told) = channel();
        let address = proxy.address;
        let clients: Vec<_> = (0..8)
            .map(|client| {
                let tell = tell.clone();
                std::thread::spawn(move || ask_until_the_end(address, client, round, &tell))
            })
            .collect();
        drop(tell);
        // The load runs: a different number of answers in each round, then the end.
        let next = |_| told.recv_timeout(PATIENCE).expect("the server answers");
        acknowledged.extend((0..20 + 17 * round).map(next));
        proxy.kill();
        for client in clients {
            client.join().expect("a client fails only by the death of the server");
        }
        acknowledged.extend(told.iter());
        let database = proxy.database();
        proxy.expect_intact();
        let mut find = database.prepare("SELECT id FROM history WHERE question = ?1").expect("the table");
        for pair in &acknowledged {
            let found = find.query_row([&pair.question], |row| row.get::<_, i64>(0));
            let found = found.unwrap_or_else(|error| panic!("round {round}: {} is lost: {error}", pair.question));
            assert!(pair.id.is_none_or(|id| id == found), "{}: told {:?}, kept {found}", pair.question, pair.id);
        }
        drop(find);
        drop(database);
        setup = proxy.setup();
    }
    let proxy = setup.start();
    proxy.answer("Still in service?");
    assert!(proxy.count_rows() > acknowledged.len() as i64);
    let searched = proxy.get("/api/history?q=round&limit=1000").json();
    assert!(searched["items"].as_array().is_some_and(|items| items.len() >= 100), "the search index survived too");
}

#[test]
fn a_crash_right_after_the_answer_does_not_take_it_back() {
    let mut setup = Setup::new();
    for round in 0..5 {
        let mut proxy = setup.start();
        let mut connection = Connection::open(proxy.address);
        let request = post("/api/ask", &json!({"question": format!("Question {round}?")}));
        assert_eq!(connection.exchange(&request).status, 200);
        proxy.kill();
        setup = proxy.setup();
        let again = setup.start();
        assert_eq!(again.history()[0]["question"], format!("Question {round}?"));
        setup = again.setup();
    }
}
