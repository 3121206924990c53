//! Secrets: no key is found anywhere but where it belongs, and no key sees what another one asked.

use crate::support::client::{Request, Response, get, post, post_bytes, streaming};
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::upstream::{
    FakeUpstream, Step, answer, completion, delta, end, event, finish, refusal, reply, reply_json, stream_head, streamed,
};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

const ALICE: &str = "alice-secret-AbCdEf0123456789";
const BOB: &str = "bob-secret-ZyXwVu9876543210";
const URL_PASSWORD: &str = "url-password-5f4dcc3b5aa765d6";
const WRONG: &str = "wrong-secret-0000111122223333";

fn keys() -> String {
    format!("alice:{ALICE},bob:{BOB}")
}

/// Every secret, and every part of one that is long enough to be of use to somebody.
fn expect_no_secret(place: &str, bytes: &[u8], secrets: &[&str]) {
    for secret in secrets {
        let part = &secret.as_bytes()[..secret.len() - 8];
        let found = bytes.windows(part.len()).position(|window| window == part);
        let around = found.map(|at| String::from_utf8_lossy(&bytes[at.saturating_sub(80)..(at + 80).min(bytes.len())]));
        assert!(found.is_none(), "{place} gives {secret} away: {around:?}");
    }
}

/// The log, and every file of the database, the journal included.
fn expect_none_kept(proxy: &Proxy, secrets: &[&str]) {
    expect_no_secret("the log", proxy.log().join("\n").as_bytes(), secrets);
    expect_no_secret("stderr", proxy.stderr().join("\n").as_bytes(), secrets);
    let folder = proxy.database_path();
    for entry in fs::read_dir(folder.parent().expect("a folder")).expect("the folder") {
        let path = entry.expect("a file").path();
        if path.is_file() {
            expect_no_secret(&path.display().to_string(), &fs::read(&path).expect("a file"), secrets);
        }
    }
}

#[test]
fn no_key_is_found_in_logs_answers_or_the_database() {
    let all = [ALICE, BOB, UPSTREAM_KEY, URL_PASSWORD, WRONG];
    let echo = format!("Incorrect API key provided: {UPSTREAM_KEY} for url-user:{URL_PASSWORD}");
    let scripts: Vec<(&str, Vec<Step>)> = vec![
        ("an answer", answer("Yes")),
        ("a stream", streamed(&["Yes"])),
        ("401", refusal(401, &echo)),
        ("400", refusal(400, &echo)),
        ("429", refusal(429, &echo)),
        ("500", reply(500, &[("Content-Type", "text/plain")], &echo)),
        ("503", reply_json(503, &json!({ "detail": echo }))),
        ("an odd shape", reply_json(500, &json!({"error": {"code": echo, "metadata": [echo]}}))),
        ("an error in a 200", reply_json(200, &json!({"error": {"message": echo, "code": 401}}))),
        ("an error in a stream", vec![stream_head(), event(&json!({"error": {"message": echo}}).to_string()), Step::Close]),
        (
            "an error behind a delta",
            vec![stream_head(), event(&delta("a")), event(&json!({"error": echo}).to_string()), Step::Close],
        ),
        ("the field at fault", reply_json(400, &json!({"error": {"message": "no", "param": UPSTREAM_KEY}}))),
        ("a redirect", reply(302, &[("Location", &format!("http://127.0.0.1:1/?key={UPSTREAM_KEY}"))], "")),
        ("no JSON", reply(200, &[("Content-Type", "text/html")], &echo)),
        ("header fields", reply_json_with(429, &[("Retry-After", UPSTREAM_KEY), ("X-Request-Id", UPSTREAM_KEY)])),
        ("a field's name", reply_json_with(429, &[(&format!("x-ratelimit-{}", UPSTREAM_KEY.to_uppercase()), "1")])),
        ("more header fields", reply_json_with(400, &[("x-ratelimit-key", UPSTREAM_KEY), ("WWW-Authenticate", UPSTREAM_KEY)])),
    ];
    let (names, scripts): (Vec<&str>, Vec<Vec<Step>>) = scripts.into_iter().unzip();
    let known = names.clone();
    let upstream = FakeUpstream::answering(move |request| {
        let question = request.question();
        let at = known.iter().position(|name| *name == question).expect("a script");
        scripts[at].clone()
    });
    let url = format!("http://url-user:{URL_PASSWORD}@{}/v1", upstream.address());
    let setup = Proxy::facing(&upstream).set("OPENAI_BASE_URL", url).set("API_KEYS", keys());
    let mut proxy = setup.set("LOG_LEVEL", "trace").set("UPSTREAM_RETRIES", "1").start();
    let look = |what: &str, response: Response| expect_no_secret(what, response.everything().as_bytes(), &all);
    for name in names {
        for path in ["/api/ask", "/api/streaming", "/v1/chat/completions"] {
            let chat = json!({"messages": [{"role": "user", "content": name}], "question": name});
            let body = if path.starts_with("/v1") { chat } else { json!({"question": name}) };
            look(&format!("{path} of {name}"), proxy.call(&post(path, &body).key(ALICE)));
        }
    }
    // Keys where they should not be, and wrong ones.
    let on = |target: &str| get(target);
    let requests: Vec<Request> = vec![
        on("/api/history").key(BOB),
        on("/api/history").key(WRONG),
        on("/api/history").header("Authorization", &format!("Basic {ALICE}")),
        on("/api/history").header("X-Api-Key", ALICE),
        on("/api/history").header("Cookie", &format!("key={ALICE}")),
        on(&format!("/api/history?key={ALICE}&limit=0")).key(BOB),
        on(&format!("/api/history?api_key={WRONG}")),
        on(&format!("http://user:{ALICE}@a/livez")),
        on("/nowhere").key(ALICE),
        on("/livez").key(ALICE).method("BREW"),
        on("/v1/models/none").key(WRONG),
        post("/api/ask", &json!({})).key(BOB),
        post_bytes("/api/ask", "{").key(BOB),
        post_bytes("/api/ask", "x".repeat(2_000_000)).key(BOB).header("X-Request-Id", "big"),
        streaming("an answer").key(WRONG),
        on("/api/history").header("Authorization", &format!("Bearer {ALICE}\t{BOB}")),
        on("/api/history").header("Authorization", &format!("Bearer {}", ALICE.repeat(20))),
        on("/readyz").key(ALICE),
        on("/metrics").key(ALICE),
    ];
    for request in requests {
        look(&format!("{request:?}"), proxy.call(&request));
    }
    expect_none_kept(&proxy, &all);
    proxy.stop();
    expect_none_kept(&proxy, &all);
}

fn reply_json_with(status: u16, headers: &[(&str, &str)]) -> Vec<Step> {
    reply(status, headers, &json!({"error": {"message": "no"}}).to_string())
}

/// Where words are shortened, a key may be cut in two.
#[test]
fn no_part_of_a_key_is_left_where_words_are_shortened() {
    const MOST: usize = 1200;
    // But for its last four characters the key would fit.
    let before = MOST + 4 - UPSTREAM_KEY.len() - "the LLM rejected the request (400): ".len();
    let upstream = FakeUpstream::always(refusal(400, &format!("{}{UPSTREAM_KEY}{}", "y".repeat(before), "z".repeat(100))));
    let response = Proxy::facing(&upstream).start().ask("Well?");
    let message = response.expect_error(400, "upstream_rejected")["message"].clone();
    assert_eq!(message.as_str().map(str::len), Some(MOST), "it is shortened: {message}");
    expect_no_secret("a message", message.to_string().as_bytes(), &[UPSTREAM_KEY]);
}

/// A successful answer is the model's own words. But its other fields are not, and the log is nobody's answer.
#[test]
fn an_upstream_that_answers_with_its_key_does_not_bring_it_into_the_log() {
    let mut body = completion("Yes");
    body["model"] = json!(UPSTREAM_KEY);
    body["choices"][0]["finish_reason"] = json!(UPSTREAM_KEY);
    let head_fields =
        [("Content-Type", "application/json"), ("X-Request-Id", UPSTREAM_KEY), ("OpenAI-Processing-Ms", UPSTREAM_KEY)];
    let whole = reply(200, &head_fields, &body.to_string());
    let named = finish(UPSTREAM_KEY).replace("fake-model-1", UPSTREAM_KEY);
    let upstream = FakeUpstream::answering(move |request| match request.is_streaming() {
        true => vec![stream_head(), event(&delta("Yes")), event(&named), event("[DONE]"), end()],
        false => whole.clone(),
    });
    let mut proxy = Proxy::facing(&upstream).set("LOG_LEVEL", "trace").start();
    let chat = json!({"messages": [{"role": "user", "content": "Who?"}]});
    for (path, body) in [("/api/ask", json!({"question": "Who?"})), ("/v1/chat/completions", chat)] {
        let response = proxy.call(&post(path, &body));
        assert_eq!(response.status, 200);
        expect_no_secret("a head", format!("{:?}", response.head).as_bytes(), &[UPSTREAM_KEY]);
    }
    // Its events are the model's own words, too.
    assert!(proxy.call(&streaming("Who?")).everything().contains(UPSTREAM_KEY));
    assert_eq!(proxy.history().len(), 3);
    proxy.stop();
    expect_none_kept(&proxy, &[UPSTREAM_KEY]);
}

/// Servers that want no key get a word, which stands in other words, too.
#[test]
fn a_word_that_is_no_key_is_not_taken_out_of_others() {
    let mut body = completion("Yes");
    body["model"] = json!("llama:latest-x1");
    for (key, model) in [("test", "llama:latest-x1"), ("x1", "llama:latest-x1"), ("latest-x1", "llama:***")] {
        let upstream = FakeUpstream::always(reply(200, &[("Content-Type", "application/json")], &body.to_string()));
        let proxy = Proxy::facing(&upstream).set("OPENAI_API_KEY", key).start();
        assert_eq!(proxy.answer("Which?")["model"], model, "{key}");
    }
    let upstream = FakeUpstream::always(reply(200, &[("Content-Type", "application/json")], &body.to_string()));
    let url = upstream.url().replace("://", "://user:x1@");
    let proxy = Proxy::facing(&upstream).set("OPENAI_BASE_URL", url).start();
    assert_eq!(proxy.answer("Which?")["model"], "llama:latest-x1", "a short password");
}

/// Nor does another user of the machine see what anybody asks.
#[test]
fn the_files_of_the_history_are_their_owners_only() {
    let proxy = Proxy::start();
    proxy.answer("Who reads this?");
    for name in ["history.db", "history.db-wal", "history.db-shm"] {
        let file = fs::metadata(proxy.database_path().with_file_name(name)).expect("it is there");
        assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
    }
}

#[test]
fn a_bad_start_gives_no_secret_away() {
    for (name, value) in [
        ("API_KEYS", format!("alice:{ALICE},alice:{ALICE}")),
        ("API_KEYS", format!("{ALICE} {BOB}")),
        ("API_KEYS", format!("a:{}", ALICE.repeat(20))),
        ("OPENAI_API_KEY", format!("{UPSTREAM_KEY}\n")),
        ("OPENAI_API_KEY", format!("{UPSTREAM_KEY}é")),
        ("OPENAI_BASE_URL", format!("http://u:{URL_PASSWORD}@host:99999/v1")),
        ("OPENAI_BASE_URL", format!("ftp://u:{URL_PASSWORD}@host/v1")),
        ("OPENAI_BASE_URL", format!("u:{URL_PASSWORD}@host/v1")),
        ("OPENAI_BASE_URL", format!("http://u:{URL_PASSWORD}@host/v1?x")),
        ("OPENAI_BASE_URL", format!("http://u:{URL_PASSWORD}#@host/v1")),
    ] {
        let setup = Setup::new().set("OPENAI_API_KEY", UPSTREAM_KEY).set(name, &value).set("DATABASE_PATH", "/proc/nowhere/x.db");
        let ended = setup.run(&[]);
        let said = [ended.stdout.join("\n"), ended.stderr.join("\n")].concat();
        assert!(!ended.status.success() && !said.is_empty(), "{ended:?}");
        expect_no_secret(name, said.as_bytes(), &[ALICE, BOB, UPSTREAM_KEY, URL_PASSWORD]);
    }
}

#[test]
fn a_key_sees_its_own_history_only_whatever_it_asks_for() {
    let upstream = FakeUpstream::answering(|request| answer(&format!("Marked {} answer", request.question())));
    // Names that are alike, and names that look like the inside of the index.
    let names = ["alice", "ALICE", "al", "alice2", "616C696365", "key", "bob"];
    let secret = |name: &str| format!("secret-of-{name}");
    let all: Vec<String> = names.iter().map(|name| format!("{name}:{}", secret(name))).collect();
    let proxy = Proxy::facing(&upstream).set("API_KEYS", all.join(",")).start();
    let mut last = 0;
    for round in 0..3 {
        for name in names {
            let question = format!("{name} asks treasure number {round}");
            let response = proxy.call(&post("/api/ask", &json!({ "question": question })).key(&secret(name)));
            last = response.json()["id"].as_i64().expect("an id");
        }
    }
    let encode = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    let mut queries: Vec<String> =
        [0, 1, 2, last / 2, last, last + 1, i64::MAX].iter().map(|before| format!("limit=1000&before={before}")).collect();
    let words = [
        "treasure",
        "Marked answer",
        "asks number",
        "alice",
        "ALICE",
        "al",
        "bob",
        "key",
        "616C696365",
        "626F62",
        "treasure 626F62",
        "key:626F62",
        "key : \"626F62\"",
        "\"626F62\"",
        "treasure\" OR key : \"626F62",
        "\" OR \"",
        "treasure) OR (key:626F62",
        "{key} : 626F62",
        "-key:626F62",
        "treasure NOT 616C696365",
        "treasure NEAR 626F62",
        "^treasure",
        "treas*",
        "*",
        "' OR 1=1 --",
        "treasure\u{0}OR\u{0}626F62",
        "question : treasure",
        "{question answer} : treasure",
        "bob asks treasure",
    ];
    for word in words {
        queries.push(format!("limit=1000&q={}", encode(word)));
        queries.push(format!("limit=1000&before={last}&q={}", encode(word)));
        queries.push(format!("q=x&limit=1000&q={}", encode(word)));
    }
    let mut found = 0;
    for name in names {
        for query in &queries {
            let response = proxy.call(&get(&format!("/api/history?{query}")).key(&secret(name)));
            assert_eq!(response.status, 200, "{query}: {response:?}");
            for item in response.json()["items"].as_array().expect("items") {
                let question = item["question"].as_str().expect("a question");
                assert!(question.starts_with(&format!("{name} asks ")), "{name} with {query} sees: {item}");
                found += 1;
            }
        }
        // All of its own are there, so the check sees something.
        let own = proxy.call(&get("/api/history?q=treasure").key(&secret(name))).json();
        assert_eq!(own["items"].as_array().map(Vec::len), Some(3), "{name}: {own}");
    }
    assert!(found > 100, "{found} items were looked at");
}

#[test]
fn a_key_does_not_get_the_answer_that_another_one_got_for_the_same_idempotency_key() {
    let upstream = FakeUpstream::answering(|request| answer(&format!("for {}", request.question())));
    let proxy = Proxy::facing(&upstream).set("API_KEYS", keys()).start();
    for path in ["/api/ask", "/v1/chat/completions"] {
        let ask = |secret: &str, question: &str| {
            let chat = json!({"messages": [{"role": "user", "content": question}]});
            let body: Value = if path == "/api/ask" { json!({ "question": question }) } else { chat };
            let request = post(path, &body).key(secret).header("Idempotency-Key", &format!("the same {path}"));
            String::from_utf8_lossy(&proxy.call(&request).body).into_owned()
        };
        assert!(ask(ALICE, "alice's question").contains("for alice's question"));
        assert!(ask(BOB, "bob's question").contains("for bob's question"));
        assert!(ask(ALICE, "alice's question").contains("for alice's question"));
        // Equal in every byte, and still each one's own.
        let (first, second) = (ask(ALICE, "alice's question"), ask(BOB, "alice's question"));
        assert!(first.contains("for alice's question"));
        assert!(second.contains("Idempotency-Key"), "bob's word stands for another request: {second}");
    }
    assert_eq!(upstream.calls(), 4);
}

/// The upstream's key opens everything that its owner has there. Through us it opens what is ours to offer.
#[test]
fn the_upstreams_key_reaches_no_other_path_than_ours() {
    let upstream = FakeUpstream::always(reply_json(200, &json!({"object": "list", "data": []})));
    let proxy = Proxy::facing(&upstream).start();
    for name in [
        "%2e%2e/files",
        "%2E%2E%2Ffiles",
        ".%2e/files",
        "%2e./files",
        "a/%2e%2e/%2e%2e/files",
        "../files",
        "..",
        ".",
        "./x",
        "a/./b",
        "..%2ffiles",
        "..%5cfiles",
        "a//b",
        "%2f",
        "%00",
        "%0d%0aX:y",
        "a?b",
        "a%3fb",
        "a%23b",
        "%252e%252e",
        "%ff",
        "@b",
        "\\..\\files",
        "..;/files",
        "a/..%3b/files",
    ] {
        proxy.call(&get(&format!("/v1/models/{name}")));
    }
    for request in upstream.requests() {
        let path = request.target.split('?').next().unwrap_or_default().to_ascii_lowercase();
        let decoded = path.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/").replace('\\', "/");
        let climbs = decoded.split('/').any(|step| step == "." || step == "..");
        let fine = decoded.starts_with("/v1/models") && !climbs && !decoded.contains(['%', ';']) && !decoded.contains("//");
        assert!(fine, "the upstream was asked for {}", request.target);
    }
    assert_eq!(proxy.get("/v1/models/vendor/model-1.5:free").status, 200, "and that is a model's name");
}
