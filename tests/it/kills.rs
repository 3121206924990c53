//! `kill -9` at random moments under load: what a client has read is there, and the database is whole.

use crate::support::client::{Connection, post};
use crate::support::hostile::{Chance, hear, plug_in, responses, throw};
use crate::support::proxy::{Proxy, Setup};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

const ROUNDS: usize = 30;

/// What a client could read before the end: the id where there was one, the question, the answer.
struct Told {
    id: Option<i64>,
    question: String,
    answer: String,
}

/// A whole response where it came, and nothing where the server died in it.
fn whole_response(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let head = seen.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(head) = head {
            let text = String::from_utf8_lossy(&seen[..head]).to_ascii_lowercase();
            assert!(text.starts_with("http/1.1 200"), "only death may stop it: {}", String::from_utf8_lossy(&seen));
            let length = text.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next()?.parse::<usize>().ok());
            let complete = match length {
                Some(length) => seen.len() >= head + 4 + length,
                None => seen.ends_with(b"\r\n0\r\n\r\n"),
            };
            // A stream is acknowledged as soon as `[DONE]` can be read, whatever becomes of the connection.
            if complete {
                return Some(seen);
            }
            if length.is_none() && seen.windows(14).any(|bytes| bytes == b"data: [DONE]\n\n") {
                seen.extend(b"\r\n0\r\n\r\n");
                return Some(seen);
            }
        }
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => seen.extend(&buffer[..count]),
            _ => return None,
        }
    }
}

fn answer_of(stream: &str) -> String {
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    let events = data.map(|data| serde_json::from_str::<Value>(data).unwrap_or_else(|_| panic!("no event: {data}")));
    events.filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

/// Asks until the server is gone: whole answers and streams, in our words and in OpenAI's.
fn ask_until_the_end(address: SocketAddr, name: &str, told: &Sender<Told>) -> Option<()> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_nodelay(true).ok()?;
    for number in 0.. {
        let question = format!("{name} number {number}");
        let (path, body) = match number % 4 {
            0 => ("/api/ask", json!({ "question": question })),
            1 => ("/api/streaming", json!({ "question": question })),
            2 => ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": question}]})),
            _ => ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": question}], "stream": true})),
        };
        let body = body.to_string();
        let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        throw(&stream, &[head.as_bytes(), body.as_bytes()]);
        let seen = whole_response(&mut stream)?;
        let text = String::from_utf8_lossy(&seen).into_owned();
        let json = || -> Value { serde_json::from_str(text.split_once("\r\n\r\n").expect("a body").1).expect("JSON") };
        let (id, answer) = match number % 4 {
            0 => (json()["id"].as_i64(), json()["answer"].as_str().expect("an answer").to_owned()),
            2 => (None, json()["choices"][0]["message"]["content"].as_str().expect("an answer").to_owned()),
            _ => (None, answer_of(&text)),
        };
        assert!(number % 4 != 0 || id.is_some(), "{text}");
        told.send(Told { id, question, answer }).ok()?;
    }
    None
}

#[test]
fn thirty_kills_at_random_moments_take_back_nothing_that_was_told() {
    let mut chance = Chance::new(9);
    let mut setup: Setup = Proxy::with(&[("WORKERS", "8"), ("QUEUE_SIZE", "100")]);
    let mut all: HashMap<String, Told> = HashMap::new();
    for round in 0..ROUNDS {
        let mut proxy = setup.start();
        let address = proxy.address;
        let (tell, told) = channel();
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let tell = tell.clone();
                std::thread::spawn(move || ask_until_the_end(address, &format!("round {round} client {client}"), &tell))
            })
            .collect();
        drop(tell);
        // Somewhere in the load: after a number of answers, and a moment that nobody chose.
        for _ in 0..chance.below(60) {
            let told = told.recv_timeout(crate::support::PATIENCE).expect("the server answers");
            all.insert(told.question.clone(), told);
        }
        std::thread::sleep(Duration::from_micros(chance.below(15_000) as u64));
        proxy.kill();
        for client in clients {
            client.join().expect("a client fails only by the death of the server");
        }
        all.extend(told.iter().map(|told| (told.question.clone(), told)));
        let database = proxy.database();
        let check: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("the database opens");
        assert_eq!(check, "ok", "round {round}");
        let words = database.execute("INSERT INTO history_words(history_words) VALUES('integrity-check')", []);
        words.unwrap_or_else(|error| panic!("round {round}: the search index is broken: {error}"));
        let mut kept = database.prepare("SELECT id, answer, finish_reason FROM history WHERE question = ?1").expect("the table");
        for told in all.values() {
            let row = kept.query_row([&told.question], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, Option<String>>(2)?))
            });
            let (id, answer, finish) = row.unwrap_or_else(|error| panic!("round {round}: {} is lost: {error}", told.question));
            assert!(told.id.is_none_or(|told| told == id), "{}: told {:?}, kept {id}", told.question, told.id);
            assert_eq!(answer, told.answer, "{}", told.question);
            assert_eq!(finish.as_deref(), Some("stop"), "{}", told.question);
        }
        drop(kept);
        drop(database);
        setup = proxy.setup();
    }
    let proxy = setup.start();
    eprintln!("{} answers were told in {ROUNDS} rounds, {} rows are kept", all.len(), proxy.count_rows());
    assert!(all.len() > ROUNDS * 20, "the load was thin: {} answers", all.len());
    proxy.answer("Still in service?");
    let found = proxy.get("/api/history?q=round&limit=1000").json();
    assert_eq!(found["items"].as_array().map(Vec::len), Some(1000), "the words are found as well");
}

/// The id of a row that was told is never given to another, not even to one that replaces it.
#[test]
fn ids_go_on_where_they_were_after_a_kill() {
    let mut setup = Proxy::with(&[("HISTORY_MAX_ROWS", "3")]);
    let mut last = 0;
    for _ in 0..6 {
        let mut proxy = setup.start();
        for _ in 0..5 {
            let mut connection = Connection::open(proxy.address);
            let id = connection.exchange(&post("/api/ask", &json!({"question": "Which?"}))).json()["id"].as_i64().expect("an id");
            assert!(id > last, "{id} after {last}");
            last = id;
        }
        proxy.kill();
        setup = proxy.setup();
    }
}

/// Killed while it starts: the database is made whole, or not at all.
#[test]
fn a_kill_during_the_start_leaves_a_database_that_opens() {
    let mut chance = Chance::new(10);
    for _ in 0..10 {
        let setup = Setup::new();
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_ai-proxy"))
            .current_dir(setup.folder())
            .env_clear()
            .env("PORT", "0")
            .env("DATABASE_PATH", "history.db")
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("the program starts");
        std::thread::sleep(Duration::from_micros(chance.below(40_000) as u64));
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
        let proxy = setup.start();
        let stream = plug_in(proxy.address);
        throw(&stream, &[b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]);
        assert_eq!(responses(&hear(&stream).0)[0].status, 200);
        proxy.answer("Does it work?");
    }
}
