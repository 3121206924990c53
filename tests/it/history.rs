//! `GET /api/history`: limit, before, search, and who sees what.

use crate::support::client::{get, post, streaming};
use crate::support::eventually;
use crate::support::proxy::{Proxy, Setup};
use crate::support::upstream::{FakeUpstream, answer};
use serde_json::{Value, json};
use std::fs;
use std::time::Instant;

/// A proxy whose answers say nothing but what the question says after `->`.
fn echoing() -> (FakeUpstream, Proxy) {
    echoing_with(&[])
}

fn echoing_with(settings: &[(&str, &str)]) -> (FakeUpstream, Proxy) {
    let upstream = FakeUpstream::answering(|request| {
        let question = request.question();
        answer(question.split_once("->").map_or("ok", |(_, told)| told))
    });
    let proxy = Proxy::with(settings).facing(&upstream).start();
    (upstream, proxy)
}

fn ask_all(proxy: &Proxy, questions: &[&str]) {
    for question in questions {
        proxy.answer(question);
    }
}

/// Percent-encodes everything, so that any text is a query.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

fn questions(page: &Value) -> Vec<&str> {
    let items = page["items"].as_array().expect("items");
    items.iter().map(|pair| pair["question"].as_str().expect("a question")).collect()
}

#[track_caller]
fn page(proxy: &Proxy, query: &str) -> Value {
    let response = proxy.get(&format!("/api/history{query}"));
    assert_eq!(response.status, 200, "{query}: {response:?}");
    let page = response.json();
    let mut fields: Vec<&str> = page.as_object().expect("an object").keys().map(String::as_str).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["items", "next_before"], "{page}");
    page
}

#[test]
fn an_empty_history_is_an_empty_page() {
    assert_eq!(page(&Proxy::start(), ""), json!({"items": [], "next_before": null}));
}

#[test]
fn a_pair_is_the_object_that_ask_answered_newest_first() {
    let proxy = Proxy::start();
    let pairs: Vec<Value> = (0..3).map(|number| proxy.answer(&format!("Question {number}?"))).collect();
    let expected: Vec<Value> = pairs.into_iter().rev().collect();
    assert_eq!(page(&proxy, "")["items"], json!(expected));
}

#[test]
fn the_limit_is_the_setting_unless_the_caller_says_another() {
    let proxy = Proxy::with(&[("HISTORY_LIMIT", "2")]).start();
    ask_all(&proxy, &["one", "two", "three", "four"]);
    assert_eq!(questions(&page(&proxy, "")), ["four", "three"]);
    assert_eq!(questions(&page(&proxy, "?limit=3")), ["four", "three", "two"]);
    assert_eq!(questions(&page(&proxy, "?limit=1000")), ["four", "three", "two", "one"]);
    assert_eq!(questions(&page(&proxy, "?limit=1&unknown=parameter")), ["four"]);
}

#[test]
fn the_limit_is_20_by_default() {
    let proxy = Proxy::start();
    (0..25).for_each(|number| drop(proxy.answer(&format!("Question {number}?"))));
    assert_eq!(questions(&page(&proxy, "")).len(), 20);
}

#[test]
fn next_before_leads_through_all_pairs_and_is_null_at_the_end() {
    let proxy = Proxy::start();
    let asked: Vec<String> = (0..6).map(|number| format!("Question {number}?")).collect();
    asked.iter().for_each(|question| drop(proxy.answer(question)));
    for limit in 1..=7 {
        let mut seen: Vec<String> = Vec::new();
        let mut query = format!("?limit={limit}");
        loop {
            let page = page(&proxy, &query);
            seen.extend(questions(&page).iter().map(|question| question.to_string()));
            assert!(seen.len() <= asked.len(), "{seen:?}");
            if page["next_before"].is_null() {
                break;
            }
            assert_eq!(questions(&page).len(), limit, "a page before the last one is full");
            query = format!("?limit={limit}&before={}", page["next_before"]);
        }
        seen.reverse();
        assert_eq!(seen, asked, "limit {limit}");
    }
    assert_eq!(page(&proxy, "?limit=6")["next_before"], Value::Null, "no empty last page");
}

/// An empty page would be the end, and nobody came to what is older.
#[test]
fn a_pair_that_is_larger_than_a_page_may_be_is_a_page() {
    let proxy = Proxy::start();
    ask_all(&proxy, &["older", "large", "newer"]);
    let grown = "UPDATE history SET answer = hex(zeroblob(3 << 20)) WHERE question = 'large'";
    assert_eq!(proxy.database().execute(grown, []).expect("the row is there"), 1);
    let mut query = "?limit=1000".to_owned();
    for question in ["newer", "large", "older"] {
        let page = page(&proxy, &query);
        assert_eq!(questions(&page), [question]);
        query = format!("?limit=1000&before={}", page["next_before"]);
    }
}

#[test]
fn who_comes_for_a_page_while_many_are_made_waits() {
    let proxy = Proxy::start();
    ask_all(&proxy, &["large"]);
    let grown = "UPDATE history SET answer = hex(zeroblob(1 << 17))";
    assert_eq!(proxy.database().execute(grown, []).expect("the row is there"), 1);
    let mut connections: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
    connections.iter_mut().for_each(|connection| connection.send(&get("/api/history")));
    for mut connection in connections {
        assert_eq!(connection.read_response().status, 200);
    }
}

/// Also those of other keys, each of which may take seconds.
#[test]
fn a_page_does_not_wait_behind_searches() {
    for keys in ["", "alice:secret1", "alice:secret1,bob:secret2"] {
        expect_a_page_before_searches(keys);
    }
}

fn expect_a_page_before_searches(keys: &str) {
    let mut proxy = Proxy::with(&[("API_KEYS", keys)]).start();
    let words: Vec<String> = (0..16).map(|number| format!("word{number}")).collect();
    let text = words.join(" ").repeat(99_999 / (words.join(" ").len() + 1));
    for _ in 0..15 {
        assert_eq!(proxy.call(&post("/api/ask", &json!({"question": text})).key("secret1")).status, 200);
    }
    let search = get(&format!("/api/history?limit=1&q={}", words.join("+"))).key("secret1");
    // Where nobody waits for the index any more.
    proxy.call(&search);
    let mut searching: Vec<_> = (0..12).map(|_| proxy.connect()).collect();
    let mut paging = proxy.connect();
    searching.iter_mut().for_each(|connection| connection.send(&search));
    assert_eq!(paging.exchange(&get("/api/history?limit=1").key("secret1").method("HEAD")).status, 200);
    for mut connection in searching {
        // On a slow machine the last ones wait in vain.
        assert!(matches!(connection.read_response().status, 200 | 503));
    }
    let log = proxy.whole_log();
    let line = |method: &str| log.iter().filter(|line| line.contains("/api/history")).position(|line| line.contains(method));
    assert!(line("HEAD") < Some(4), "of the searches only the one before it was over, or a few more: {log:#?}");
}

/// Nor what needs none of what its pages need.
#[test]
fn one_keys_pages_keep_no_other_waiting() {
    let mut proxy = Proxy::with(&[("API_KEYS", "alice:secret1,bob:secret2"), ("HISTORY_LIMIT", "1000")]).start();
    let text = "x".repeat(99_999);
    for _ in 0..15 {
        let asked = post("/api/ask", &json!({"question": text})).key("secret2");
        assert_eq!(proxy.call(&asked).status, 200);
    }
    let mut reading: Vec<_> = (0..40).map(|_| proxy.connect()).collect();
    let (mut asking, mut others) = (proxy.connect(), proxy.connect());
    reading.iter_mut().for_each(|connection| connection.send(&get("/api/history").key("secret2")));
    // Both at once: on a fast machine the pages are soon made, and the first of these waits for its commit.
    asking.send(&post("/api/ask", &json!({"question": "q"})).key("secret2").header("Idempotency-Key", "k"));
    others.send(&get("/api/history").key("secret1"));
    assert_eq!((asking.read_response().status, others.read_response().status), (200, 200));
    for mut connection in reading {
        // On a slow machine the last ones wait in vain.
        assert!(matches!(connection.read_response().status, 200 | 503));
    }
    let log: Vec<String> = proxy.whole_log().into_iter().skip_while(|line| !line.contains("/api/history")).collect();
    for line in ["method=POST", "key=alice"] {
        let place = log.iter().position(|other| other.contains(line));
        assert!(place < Some(20), "{line} is at {place:?} of {}", log.len());
    }
}

#[test]
fn before_gives_only_older_pairs() {
    let proxy = Proxy::start();
    let pairs: Vec<Value> = (0..3).map(|number| proxy.answer(&format!("Question {number}?"))).collect();
    let older = page(&proxy, &format!("?before={}", pairs[1]["id"]));
    assert_eq!(older, json!({"items": [pairs[0]], "next_before": null}));
    assert_eq!(page(&proxy, &format!("?before={}", pairs[0]["id"]))["items"], json!([]));
    assert_eq!(page(&proxy, "?before=9223372036854775807")["items"].as_array().map(Vec::len), Some(3));
}

#[test]
fn a_bad_number_is_422_and_param_names_it() {
    let proxy = Proxy::start();
    for limit in ["0", "1001", "-1", "abc", "1.5", "99999999999999999999", "1e2", "%00", "0x10"] {
        let error = proxy.get(&format!("/api/history?limit={limit}")).expect_error(422, "invalid_request");
        assert_eq!(error["param"], "limit", "{limit}");
    }
    for before in ["-1", "abc", "1.5", "99999999999999999999", "1;drop", "%27"] {
        let error = proxy.get(&format!("/api/history?before={before}")).expect_error(422, "invalid_request");
        assert_eq!(error["param"], "before", "{before}");
    }
}

#[test]
fn q_finds_words_in_questions_and_in_answers() {
    let (_upstream, proxy) = echoing();
    ask_all(&proxy, &["the capital of France->Paris", "the largest city->Tokyo", "a Paris of the east->Beirut"]);
    let found = |words: &str| {
        let page = page(&proxy, &format!("?q={}", encoded(words)));
        assert_eq!(page["next_before"], Value::Null);
        let mut found: Vec<String> = questions(&page).iter().map(|question| question.to_string()).collect();
        found.sort_unstable();
        found
    };
    assert_eq!(found("Paris"), ["a Paris of the east->Beirut", "the capital of France->Paris"]);
    assert_eq!(found("paris"), found("PARIS"));
    assert_eq!(found("tokyo"), ["the largest city->Tokyo"]);
    assert_eq!(found("capital France"), ["the capital of France->Paris"]);
    assert_eq!(found("nothing_like_it"), Vec::<String>::new());
}

/// One pair, with a whale, and an index that was damaged after it had found it.
fn with_damaged_index() -> (FakeUpstream, Proxy, rusqlite::Connection) {
    let (upstream, proxy) = echoing();
    proxy.answer("whale");
    assert_eq!(questions(&page(&proxy, "?q=whale")), ["whale"]);
    let database = rusqlite::Connection::open(proxy.database_path()).expect("it opens");
    assert_eq!(database.execute("UPDATE history_words_data SET block = x'00'", []).expect("damaged"), 3);
    (upstream, proxy, database)
}

#[test]
fn who_asks_is_answered_whatever_became_of_the_index() {
    let (_upstream, mut proxy, _database) = with_damaged_index();
    let started = Instant::now();
    for number in 0..30 {
        let question = format!("question {number}");
        proxy.answer(&question);
        let found = proxy.get("/api/history?q=whale").status;
        assert!(matches!(found, 200 | 503), "{found}");
        assert_eq!(questions(&page(&proxy, "?limit=1")), [&*question]);
    }
    let complaints = proxy.whole_log().iter().filter(|line| line.contains("cannot be indexed")).count();
    // It rests for a second at least between two attempts.
    let most = 1 + started.elapsed().as_secs() as usize;
    assert!((1..=most).contains(&complaints), "{complaints}, not 1 to {most}: {:#?}", proxy.log());
}

/// Not even where the row, of which the index knew nothing, was deleted by hand and a failure made the server look anew.
#[test]
fn an_id_is_never_used_twice() {
    let (_upstream, proxy, database) = with_damaged_index();
    let id = proxy.answer("the last")["id"].as_i64().expect("an id");
    proxy.wait_for_line(|line| line.contains("cannot be indexed"));
    assert_eq!(database.execute("DELETE FROM history WHERE id = ?1", [id]).expect("deleted"), 1);
    database.execute_batch("BEGIN EXCLUSIVE").expect("the lock is free");
    proxy.call(&post("/api/ask", &json!({"question": "during?"}))).expect_error(503, "history_unavailable");
    database.execute_batch("ROLLBACK").expect("the lock is given back");
    eventually("it is ready again", || proxy.get("/readyz").status == 200);
    assert_eq!(proxy.answer("after?")["id"].as_i64(), Some(id + 1));
}

#[test]
fn retention_that_fails_at_the_index_keeps_nobody_from_asking() {
    let (_upstream, mut proxy) = echoing_with(&[("HISTORY_MAX_ROWS", "2")]);
    ask_all(&proxy, &["whale 1", "whale 2"]);
    assert_eq!(questions(&page(&proxy, "?q=whale")).len(), 2);
    let database = rusqlite::Connection::open(proxy.database_path()).expect("it opens");
    assert!(database.execute("DELETE FROM history_words_data", []).expect("damaged") > 0);
    for number in 3..9 {
        proxy.answer(&format!("whale {number}"));
        assert_eq!(proxy.get("/readyz").status, 200);
    }
    assert_eq!(proxy.count_rows(), 8, "what could not be deleted is there");
    let complaints = proxy.whole_log().iter().filter(|line| line.contains("cannot be pruned")).count();
    assert_eq!(complaints, 1, "once a minute: {:#?}", proxy.log());
}

/// Not even a part of the transaction can be taken back then.
#[test]
fn retention_that_fails_at_a_damaged_row_keeps_nobody_from_asking() {
    let (_upstream, mut proxy) = echoing_with(&[("HISTORY_MAX_ROWS", "2")]);
    ask_all(&proxy, &[&format!("{} whale {}", "x".repeat(20_000), "y".repeat(20_000)), "2"]);
    proxy.stop();
    let mut file = fs::read(proxy.database_path()).expect("the file");
    let page = file.windows(7).position(|bytes| bytes == b" whale ").expect("it is there") / 4096;
    file[page * 4096..][..4096].fill(0xff);
    fs::write(proxy.database_path(), file).expect("damaged");
    let mut proxy = proxy.setup().start();
    for number in 3..9 {
        proxy.answer(&number.to_string());
        assert_eq!(proxy.get("/readyz").status, 200);
    }
    assert_eq!(proxy.count_rows(), 8, "what could not be deleted is there");
    let complaints = proxy.whole_log().iter().filter(|line| line.contains("cannot be pruned")).count();
    assert_eq!(complaints, 1, "once a minute: {:#?}", proxy.log());
}

#[test]
fn q_gives_the_best_match_first() {
    let (_upstream, proxy) = echoing();
    let best = "whale whale whale";
    let weak = format!("whale {}", "and many other words ".repeat(50));
    let other_words = "whale whales whaler narwhale";
    ask_all(&proxy, &["nothing", best, other_words, &weak, "nothing again"]);
    for words in ["whale", "whale?", "(Whale),", "\"whale\"", "whale whale!"] {
        assert_eq!(questions(&page(&proxy, &format!("?q={}", encoded(words)))), [best, other_words, &weak], "{words}");
    }
    assert_eq!(questions(&page(&proxy, "?q=whale&limit=1")), [best]);
}

/// FTS5 knows no symbol that is newer than 2010.
#[test]
fn a_symbol_is_no_letter_and_the_sign_of_a_vowel_is_one() {
    let proxy = Proxy::start();
    let texts = [
        "alpha🤖",
        "🤔gamma and 100₽",
        "zeta🥳eta",
        "\u{2068}theta\u{2069}",
        "आज का दिन",
        "दान करो",
        "café naïve",
        "犬が好き 猫も好き",
        "شكراً جزيلاً",
        "विद्यार्थियों के लिए शिक्षा में प्रौद्योगिकी का महत्त्व अत्यन्त है",
    ];
    texts.iter().for_each(|text| drop(proxy.answer(text)));
    for (words, found) in [
        ("alpha", Some(0)),
        ("alpha🦀", Some(0)),
        ("gamma", Some(1)),
        ("100", Some(1)),
        ("eta", Some(2)),
        ("theta", Some(3)),
        ("दिन", Some(4)),
        ("की", None),
        ("cafe\u{301} naive", Some(6)),
        ("猫も好き\u{3000}犬が好き", Some(7)),
        ("شكرا", Some(8)),
        ("शिक्षा में प्रौद्योगिकी का महत्त्व विद्यार्थियों के लिए अत्यन्त", Some(9)),
    ] {
        let page = page(&proxy, &format!("?q={}", encoded(words)));
        assert_eq!(questions(&page), found.map(|text| texts[text]).into_iter().collect::<Vec<_>>(), "{words}");
    }
}

#[test]
fn of_q_the_first_32_words_count() {
    let (_upstream, proxy) = echoing();
    let words: Vec<String> = (1..=33).map(|number| format!("word{number}")).collect();
    let (first, all) = (words[..32].join(" "), words.join(" "));
    ask_all(&proxy, &[&first, &words[..31].join(" ")]);
    let found = |words: &str| {
        let page = page(&proxy, &format!("?q={}", encoded(words)));
        questions(&page).iter().map(|question| question.to_string()).collect::<Vec<String>>()
    };
    assert_eq!(found(&first), [first.as_str()]);
    assert_eq!(found(&all), [first.as_str()], "the 33rd is not looked for");
    assert_eq!(found(&all.replace(' ', "-")), [first.as_str()], "nor inside of a longer one");
}

#[test]
fn q_speaks_other_scripts_and_is_decoded_as_a_form_is() {
    let (_upstream, proxy) = echoing();
    ask_all(&proxy, &["Столица Франции->Париж", "an ascii one"]);
    for query in [format!("?q={}", encoded("париж")), format!("?q={}", encoded("ФРАНЦИИ")), "?q=ascii+one".into()] {
        assert_eq!(questions(&page(&proxy, &query)).len(), 1, "{query}");
    }
}

#[test]
fn any_text_is_a_legal_query() {
    let (_upstream, proxy) = echoing();
    ask_all(&proxy, &["plain words", "it's \"quoted\" -- AND (more) OR less* NEAR ^start"]);
    for text in [
        "\"",
        "'",
        "\"\"",
        "\"unclosed",
        "'; DROP TABLE history; --",
        "AND",
        "OR",
        "NOT",
        "NEAR",
        "AND OR",
        "NEAR(",
        "a AND",
        "NOT a",
        "(",
        ")",
        "((",
        "*",
        "a*",
        "^",
        "^a",
        "-",
        "-a",
        "+",
        "a+b",
        ":",
        "question:",
        "question:plain",
        "key_name:alice",
        "{a b}: c",
        "%",
        "_",
        "\\",
        "/",
        "[",
        "]",
        "{",
        "}",
        "|",
        "&",
        "&&",
        "=",
        "?",
        "#",
        ";",
        ",",
        ".",
        "...",
        "\0",
        "a\0b",
        "\n",
        "\t",
        "\u{1}",
        "\u{7f}",
        "🙂",
        "👩‍🦰",
        "日本語",
        "é",
        "e\u{301}",
        "\u{202e}",
        "\u{feff}",
        "\u{fffd}",
        "\u{10ffff}",
        " ",
        "  a  ",
    ] {
        page(&proxy, &format!("?q={}", encoded(text)));
    }
    let long = "word ".repeat(500);
    page(&proxy, &format!("?q={}", encoded(&long)));
    let quoted = page(&proxy, &format!("?q={}", encoded("it's \"quoted\"")));
    assert_eq!(questions(&quoted).len(), 1, "the words in it are found: {quoted}");
}

#[test]
fn a_query_that_is_no_text_is_no_fault_of_ours() {
    let proxy = Proxy::start();
    for query in ["%ff", "%", "%zz", "%c3", "%ed%a0%80"] {
        let response = proxy.get(&format!("/api/history?q={query}"));
        assert!(response.status < 500, "{query}: {response:?}");
    }
}

#[test]
fn an_empty_q_is_like_none() {
    let proxy = Proxy::start();
    ask_all(&proxy, &["one", "two", "three"]);
    assert_eq!(page(&proxy, "?q=&limit=2"), page(&proxy, "?limit=2"));
    assert_eq!(page(&proxy, "?q&limit=2"), page(&proxy, "?limit=2"));
    assert_eq!(page(&proxy, "?q=+%20%09&limit=2"), page(&proxy, "?limit=2"), "nor are blanks words");
}

#[test]
fn each_key_sees_its_own_pairs_only() {
    let proxy = Proxy::with(&[("API_KEYS", "alice:secret1,bob:secret2")]).start();
    let ask = |secret: &str, question: &str| {
        let request = post("/api/ask", &json!({"question": question})).key(secret);
        let response = proxy.call(&request);
        assert_eq!(response.status, 200);
        response.json()["id"].as_i64().expect("an id")
    };
    ask("secret1", "shared words of alice");
    let of_bob = ask("secret2", "shared words of bob");
    ask("secret1", "more shared words of alice");
    let streamed = proxy.call(&streaming("streamed words of bob").key("secret2"));
    assert_eq!(streamed.status, 200);
    let seen = |secret: &str, query: &str| {
        let response = proxy.call(&get(&format!("/api/history{query}")).key(secret));
        assert_eq!(response.status, 200);
        response.json()
    };
    let alices = ["more shared words of alice", "shared words of alice"];
    let bobs = ["streamed words of bob", "shared words of bob"];
    assert_eq!(questions(&seen("secret1", "")), alices);
    assert_eq!(questions(&seen("secret2", "")), bobs);
    assert_eq!(questions(&seen("secret1", "?limit=1000&before=1000")), alices);
    assert_eq!(questions(&seen("secret1", &format!("?before={of_bob}"))), ["shared words of alice"]);
    for query in ["?q=shared", "?q=words", "?q=bob", "?q=bob%20OR%20alice", "?q=key_name:bob"] {
        let page = seen("secret1", query);
        assert!(questions(&page).iter().all(|question| question.ends_with("alice")), "{query}: {page}");
    }
    assert_eq!(questions(&seen("secret2", "?q=shared")), ["shared words of bob"]);
    let last = seen("secret1", "?limit=2");
    assert_eq!(last["next_before"], Value::Null, "the pairs of others do not count: {last}");
}

#[test]
fn the_table_can_be_read_while_the_server_runs() {
    let upstream = FakeUpstream::always(answer("Paris"));
    let proxy = Proxy::facing(&upstream).set("API_KEYS", "alice:secret1,bare2").start();
    let database = proxy.database();
    let ask = |secret: &str| {
        let response = proxy.call(&post("/api/ask", &json!({"question": "Where?"})).key(secret));
        response.json()
    };
    for (secret, name) in [("secret1", "alice"), ("bare2", "default")] {
        let pair = ask(secret);
        let sql = "SELECT created_at, key_name, question, answer, model, finish_reason,
                   prompt_tokens, completion_tokens, total_tokens, latency_ms FROM history WHERE id = ?1";
        let row = database.query_row(sql, [pair["id"].as_i64()], |row| {
            assert_eq!(row.get::<_, String>(1)?, name);
            Ok(json!({
                "id": pair["id"], "created_at": row.get::<_, String>(0)?, "question": row.get::<_, String>(2)?,
                "answer": row.get::<_, String>(3)?, "model": row.get::<_, String>(4)?,
                "finish_reason": row.get::<_, String>(5)?, "latency_ms": row.get::<_, i64>(9)?,
                "usage": {"prompt_tokens": row.get::<_, i64>(6)?, "completion_tokens": row.get::<_, i64>(7)?,
                          "total_tokens": row.get::<_, i64>(8)?},
            }))
        });
        assert_eq!(row.expect("the row is committed"), pair);
    }
    let dump: String = database
        .query_row("SELECT group_concat(key_name || question || answer) FROM history", [], |row| row.get(0))
        .expect("a dump");
    assert!(!dump.contains("secret1") && !dump.contains("bare2"), "{dump}");
}

#[test]
fn without_keys_the_caller_is_anonymous() {
    let proxy = Proxy::start();
    proxy.answer("Who am I?");
    let name: String = proxy.database().query_row("SELECT key_name FROM history", [], |row| row.get(0)).expect("a row");
    assert_eq!(name, "anonymous");
}

#[test]
fn a_reader_in_the_middle_of_a_transaction_blocks_nobody() {
    let proxy = Proxy::start();
    proxy.answer("Before?");
    let reader = proxy.database();
    reader.execute_batch("BEGIN").expect("a transaction");
    let count = |reader: &rusqlite::Connection| -> i64 {
        reader.query_row("SELECT count(*) FROM history", [], |row| row.get(0)).expect("readable")
    };
    assert_eq!(count(&reader), 1);
    proxy.answer("Meanwhile?");
    assert_eq!(count(&reader), 1, "the reader has its own view");
    reader.execute_batch("COMMIT").expect("the end");
    assert_eq!(count(&reader), 2);
}

#[test]
fn a_search_finds_a_keys_own_among_many_of_others() {
    let mut proxy = Proxy::with(&[("API_KEYS", "alice:secret1,bob:secret2")]).start();
    proxy.stop();
    let sql = "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms)
               SELECT '2026-01-01T00:00:00.000Z', iif(i % 400 = 1, 'bob', 'alice'), 'common number' || i, 'ok', 'm', 1
               FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 700) SELECT i FROM n)";
    assert_eq!(proxy.database().execute(sql, []).expect("the rows are taken"), 700);
    let proxy = proxy.setup().start();
    let found = |secret: &str, query: &str| {
        let response = proxy.call(&get(&format!("/api/history?q={query}")).key(secret));
        questions(&response.json()).len()
    };
    assert_eq!(found("secret2", "common"), 2, "though the newest 500 that match are another's");
    assert_eq!(found("secret2", "common&before=401"), 1);
    assert_eq!(found("secret2", "number401"), 1, "of few matches, too");
    assert_eq!(found("secret2", "number402"), 0);
    assert_eq!(found("secret1", "common"), 20);
    assert_eq!(found("secret1", "common&limit=1000"), 698, "as many as are asked for are looked at");
}

/// A server that finds so many pairs of 100 KB whose words are not indexed yet. They take seconds.
fn with_a_backlog(pairs: i64) -> Proxy {
    let mut proxy = Proxy::start();
    proxy.stop();
    let sql = "INSERT INTO history (created_at, key_name, question, answer, model, latency_ms)
               SELECT '2026-01-01T00:00:00.000Z', 'anonymous', replace(hex(randomblob(50000)), '0', ' '), 'ok', 'm', 1
               FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1) SELECT i FROM n)";
    let added = proxy.database().execute(sql, [pairs]);
    assert_eq!(added.expect("the rows are taken"), pairs as usize);
    proxy.setup().start()
}

fn indexed_up_to(proxy: &Proxy) -> i64 {
    proxy.database().query_row("SELECT up_to FROM indexed", [], |row| row.get(0)).expect("one row")
}

#[test]
fn a_question_does_not_wait_for_the_index_of_others() {
    const BACKLOG: i64 = 300;
    for searching in [false, true] {
        let proxy = with_a_backlog(BACKLOG);
        let mut search = proxy.connect();
        if searching {
            search.send(&get("/api/history?q=word"));
        }
        eventually("the index is being made", || indexed_up_to(&proxy) > 0);
        proxy.answer("Now?");
        let indexed = indexed_up_to(&proxy);
        assert!(indexed < BACKLOG, "answered when all was indexed: searching {searching}");
        if searching {
            assert_eq!(search.read_response().status, 200, "a search of what is indexed so far");
        }
    }
}

#[test]
fn a_search_finds_what_was_answered_before_it_also_under_a_load_that_never_pauses() {
    let proxy = Proxy::start();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut connection = proxy.connect();
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(connection.exchange(&post("/api/ask", &json!({"question": "more load"}))).status, 200);
                }
            });
        }
        let missed: Vec<String> = (0..20)
            .map(|number| format!("needle{number}"))
            .filter(|needle| {
                proxy.answer(needle);
                questions(&page(&proxy, &format!("?q={needle}"))) != [needle]
            })
            .collect();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(missed, Vec::<String>::new());
    });
}

/// Who deletes by hand changes what retention counts.
#[test]
fn rows_deleted_by_hand_make_room() {
    let proxy = Proxy::with(&[("HISTORY_MAX_ROWS", "5")]).start();
    let ids = || proxy.history().iter().filter_map(|pair| pair["id"].as_i64()).collect::<Vec<i64>>();
    for _ in 0..6 {
        proxy.answer("Kept?");
    }
    eventually("five are left", || proxy.count_rows() == 5);
    for (delete, left) in [("DELETE FROM history", 0), ("DELETE FROM history WHERE id % 2", 2)] {
        proxy.database().execute_batch(delete).expect("deleted");
        let before = proxy.count_rows();
        assert!(before <= left + 1, "{before}");
        for _ in before..5 {
            proxy.answer("New?");
        }
        assert_eq!(proxy.count_rows(), 5, "{delete}: {:?}", ids());
    }
    proxy.answer("One more?");
    assert_eq!(proxy.count_rows(), 5);
}

/// A table of the user's own that refers to the history does not hold up retention, and so not the questions.
#[test]
fn a_reference_to_the_history_does_not_stop_it() {
    let proxy = Proxy::with(&[("HISTORY_MAX_ROWS", "2")]).start();
    proxy.answer("First?");
    let refer = "CREATE TABLE note (of INTEGER REFERENCES history(id)); INSERT INTO note SELECT id FROM history";
    proxy.database().execute_batch(refer).expect("a table");
    for _ in 0..4 {
        proxy.answer("And then?");
    }
    assert_eq!(proxy.count_rows(), 2);
}

/// Ⓐ is a letter to us and none to the index.
#[test]
fn what_is_no_word_to_the_index_does_not_empty_a_search() {
    let proxy = Proxy::start();
    proxy.answer("hello \u{24b6} world");
    for words in ["hello%20%E2%92%B6%20world", "hello", "%E2%92%B6%20world"] {
        let found = proxy.get(&format!("/api/history?q={words}")).json();
        assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{words}: {found}");
    }
}

#[test]
fn no_more_than_history_max_rows_are_kept() {
    let proxy = Proxy::with(&[("HISTORY_MAX_ROWS", "3")]).start();
    ask_all(&proxy, &["first", "second", "third", "fourth", "fifth"]);
    eventually("the oldest are gone", || proxy.count_rows() <= 3);
    assert_eq!(questions(&page(&proxy, "")), ["fifth", "fourth", "third"]);
    assert!(questions(&page(&proxy, "?q=first")).is_empty());
    assert_eq!(questions(&page(&proxy, "?q=third")), ["third"]);
}

#[test]
fn history_max_rows_holds_under_a_load_that_never_pauses() {
    let proxy = Proxy::with(&[("HISTORY_MAX_ROWS", "3")]).start();
    let mut connection = proxy.connect();
    for asked in 1..=50 {
        let question = json!({"question": format!("question {asked}")});
        assert_eq!(connection.exchange(&post("/api/ask", &question)).status, 200);
        assert_eq!(proxy.count_rows(), asked.min(3), "each makes room for itself");
    }
    assert_eq!(questions(&page(&proxy, "")), ["question 50", "question 49", "question 48"]);
}

#[test]
fn nothing_older_than_history_max_days_is_kept() {
    let mut proxy = Proxy::start();
    ask_all(&proxy, &["ancient", "recent"]);
    proxy.stop();
    let database = proxy.database();
    let aged = database.execute("UPDATE history SET created_at = '2020-01-01T00:00:00.000Z' WHERE question = 'ancient'", []);
    assert_eq!(aged.expect("the row is there"), 1);
    drop(database);
    let proxy = proxy.setup().set("HISTORY_MAX_DAYS", "30").start();
    proxy.wait_for_line(|line| line.ends_with("history.db, at most 30 days"));
    eventually("the ancient pair is gone", || proxy.count_rows() == 1);
    assert_eq!(questions(&page(&proxy, "")), ["recent"]);
    assert_eq!(questions(&page(&proxy, "?q=ancient")).len(), 0);
}

/// What another program writes is noticed: retention counts it, and a search finds it.
#[test]
fn what_others_write_is_counted_and_found() {
    let limited = Proxy::with(&[("HISTORY_MAX_ROWS", "5")]).start();
    let searched = Proxy::start();
    for proxy in [&limited, &searched] {
        ask_all(proxy, &["first"]);
        assert_eq!(questions(&page(proxy, "?q=first")), ["first"]);
        let many = "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 60)
                    INSERT INTO history SELECT i, created_at, key_name, 'kiwi', answer, model, NULL, NULL, NULL, NULL, 0
                    FROM n, history WHERE id = 1";
        assert_eq!(proxy.database().execute(many, []).expect("rows"), 59);
    }
    assert_eq!(questions(&page(&searched, "?q=kiwi&limit=100")).len(), 59);
    ask_all(&limited, &["last"]);
    eventually("the oldest are gone", || limited.count_rows() == 5);
    assert_eq!(questions(&page(&limited, "?limit=2")), ["last", "kiwi"]);
}

/// A clock that was wrong leaves rows of the past and of the future behind.
#[test]
fn a_wrong_clock_neither_takes_recent_pairs_along_nor_keeps_old_ones() {
    let mut proxy = Proxy::start();
    ask_all(&proxy, &["recent", "ancient", "newest"]);
    proxy.stop();
    let future = "WITH RECURSIVE n(i) AS (SELECT -1 UNION ALL SELECT i - 1 FROM n WHERE i > -200)
                  INSERT INTO history SELECT i, '2999-01-01T00:00:00.000Z', 'anonymous', 'future', '', '', NULL, NULL, NULL, NULL, 0 FROM n";
    let aged = "UPDATE history SET created_at = '1970-01-01T00:00:00.000Z' WHERE question = 'ancient'";
    let database = proxy.database();
    for (change, rows) in [(future, 200), (aged, 1)] {
        assert_eq!(database.execute(change, []).expect("it can be changed"), rows);
    }
    drop(database);
    let proxy = proxy.setup().set("HISTORY_MAX_DAYS", "30").start();
    eventually("the ancient pair is gone", || proxy.count_rows() == 202);
    assert_eq!(questions(&page(&proxy, "?limit=2")), ["newest", "recent"]);
    assert_eq!(questions(&page(&proxy, "?q=ancient")).len(), 0);
    assert_eq!(questions(&page(&proxy, "?q=recent")).len(), 1);
}

#[test]
fn a_row_written_by_hand_costs_no_page() {
    let proxy = Proxy::start();
    ask_all(&proxy, &["before", "after"]);
    let odd = "INSERT INTO history SELECT 1000, created_at, key_name, CAST(x'6f6464ff' AS TEXT), CAST(x'ff' AS TEXT), model,
               CAST(x'ff' AS TEXT), -1, -2, -3, -4 FROM history WHERE id = 1";
    assert_eq!(proxy.database().execute(odd, []).expect("it can be written"), 1);
    let shown = page(&proxy, "");
    assert_eq!(questions(&shown), ["odd\u{fffd}", "after", "before"]);
    let usage = json!({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0});
    let item = &shown["items"][0];
    assert_eq!((&item["usage"], &item["latency_ms"], &item["finish_reason"]), (&usage, &json!(0), &json!("\u{fffd}")));
}

#[test]
fn everything_is_kept_by_default() {
    let proxy = Setup::new().set("HISTORY_MAX_ROWS", "0").set("HISTORY_MAX_DAYS", "0").start();
    (0..30).for_each(|number| drop(proxy.answer(&format!("Question {number}?"))));
    assert_eq!(proxy.history().len(), 30);
}

#[test]
fn history_sync_normal_serves_as_well() {
    let proxy = Proxy::with(&[("HISTORY_SYNC", "normal")]).start();
    proxy.answer("Well?");
    assert_eq!(proxy.count_rows(), 1);
}
