//! The disk and the database file: full, locked, forbidden, gone, damaged. What was told is kept, what cannot be kept is 503,
//! and service comes back by itself.

use crate::support::client::{Response, get, post, streaming};
use crate::support::gate::Gate;
use crate::support::hostile::{Chance, within};
use crate::support::proxy::{Proxy, Setup};
use crate::support::upstream::{FakeUpstream, Step, answer, delta, event, stream_head};
use crate::support::{PATIENCE, eventually};
use rustix::process::{Resource, Rlimit, getrlimit, getuid, prlimit};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// From now on no file of the program grows beyond this. It can be taken back.
fn limit_files(proxy: &Proxy, bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let now = prlimit(Some(proxy.pid()), Resource::Fsize, Rlimit { current: bytes.or(maximum), maximum });
    now.expect("the limit of a child can be set");
}

#[track_caller]
fn ask(proxy: &Proxy, question: &str) -> Response {
    let mut connection = proxy.connect().patient_for(PATIENCE * 2);
    connection.exchange(&post("/api/ask", &json!({ "question": question })))
}

/// Asks until one answer is there. Everything else is a 503 of the table.
#[track_caller]
fn heals(proxy: &Proxy, bound: Duration) {
    let started = Instant::now();
    eventually("service is back", || {
        let response = ask(proxy, "Back?");
        if response.status != 200 {
            response.expect_error(503, "history_unavailable");
        }
        response.status == 200
    });
    assert!(started.elapsed() < bound, "back after {:?}", started.elapsed());
}

/// What was told, id by id.
#[derive(Default)]
struct Told(Vec<(i64, String)>);

impl Told {
    #[track_caller]
    fn note(&mut self, response: &Response) {
        assert_eq!(response.status, 200, "{response:?}");
        let pair = response.json();
        self.0.push((pair["id"].as_i64().expect("an id"), pair["question"].as_str().expect("a question").to_owned()));
    }

    #[track_caller]
    fn expect_kept(&self, proxy: &Proxy) {
        let database = proxy.database();
        for (id, question) in &self.0 {
            let kept = database.query_row("SELECT question FROM history WHERE id = ?1", [id], |row| row.get::<_, String>(0));
            assert_eq!(kept.as_ref(), Ok(question), "pair {id}");
        }
        proxy.expect_intact();
    }
}

// Full

#[test]
fn a_full_disk_is_503_loses_nothing_and_heals_by_itself() {
    let proxy = Proxy::with(&[("MAX_QUESTION_CHARS", "1000000")]).start();
    let mut told = Told::default();
    told.note(&ask(&proxy, "Before?"));
    for room in [100_000, 0, 300_000, 33_000] {
        // Room for a few, then for none.
        let size = |name: &str| fs::metadata(proxy.database_path().with_file_name(name)).map_or(0, |file| file.len());
        let largest = size("history.db-wal").max(size("history.db"));
        limit_files(&proxy, Some(largest + room));
        let mut refused = 0;
        for number in 0..200 {
            let question = format!("Room for {room}, number {number}: {}", "x".repeat(5000));
            let response = ask(&proxy, &question);
            match response.status {
                200 => told.note(&response),
                _ => {
                    response.expect_error(503, "history_unavailable");
                    refused += 1;
                    if refused == 5 {
                        break;
                    }
                }
            }
        }
        assert_eq!(refused, 5, "the disk was never full");
        let stream = proxy.connect().patient_for(PATIENCE * 2).exchange(&streaming("And streamed?"));
        match stream.status {
            // Opening the database anew may have made room.
            200 if stream.everything().contains("[DONE]") => {
                let stored = "SELECT count(*) FROM history WHERE question = 'And streamed?'";
                let stored: i64 = proxy.database().query_row(stored, [], |row| row.get(0)).expect("a count");
                assert!(stored > 0, "not stored, so not done: {stream:?}");
            }
            200 => {}
            _ => drop(stream.expect_error(503, "history_unavailable")),
        }
        assert_eq!(proxy.get("/livez").status, 200);
        // The journal may be begun anew meanwhile, which makes some room again: now there is none at all.
        limit_files(&proxy, Some(0));
        eventually("not ready", || proxy.get("/readyz").status == 503);
        let history = proxy.get("/api/history");
        if history.status != 200 {
            history.expect_error(503, "history_unavailable");
        }
        limit_files(&proxy, None);
        heals(&proxy, Duration::from_secs(5));
        assert_eq!(proxy.get("/readyz").status, 200);
        told.expect_kept(&proxy);
    }
    let mut proxy = proxy;
    proxy.kill();
    told.expect_kept(&proxy);
}

#[test]
fn a_disk_that_is_full_shows_in_readyz_before_anybody_asks() {
    let proxy = Proxy::start();
    assert_eq!(ask(&proxy, "Before?").status, 200);
    assert_eq!(proxy.get("/readyz").status, 200);
    limit_files(&proxy, Some(0));
    eventually("not ready", || proxy.get("/readyz").status == 503);
    limit_files(&proxy, None);
    heals(&proxy, Duration::from_secs(5));
    assert_eq!(proxy.get("/readyz").status, 200);
    proxy.wait_for_line(|line| line.contains("history can be written again"));
}

#[test]
fn a_full_disk_under_load_is_503_for_some_and_nothing_told_is_lost() {
    let proxy = Proxy::with(&[("WORKERS", "16")]).start();
    let told = Mutex::new(Told::default());
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (proxy, told) = (&proxy, &told);
            scope.spawn(move || {
                for number in 0..60 {
                    let response = ask(proxy, &format!("Client {client}, number {number}: {}", "x".repeat(2000)));
                    match response.status {
                        200 => told.lock().unwrap().note(&response),
                        _ => drop(response.expect_error(503, "history_unavailable")),
                    }
                }
            });
        }
        // Full and not full in turn.
        for round in 0..6 {
            eventually("something is told", || told.lock().unwrap().0.len() > round * 10);
            limit_files(&proxy, Some(0));
            eventually("full", || proxy.get("/readyz").status == 503);
            limit_files(&proxy, None);
            eventually("and not full", || proxy.get("/readyz").status == 200);
        }
    });
    heals(&proxy, Duration::from_secs(5));
    told.into_inner().unwrap().expect_kept(&proxy);
}

#[test]
fn a_start_on_a_full_disk_says_what_to_do() {
    let ended = Setup::new().after("ulimit -f 0").run(&[]);
    let line = ended.expect_refusal(1);
    assert!(line.contains("history.db") && line.contains("the disk is full"), "{line}");
}

// Locked

#[test]
fn a_lock_of_ten_seconds_is_503_in_time_and_service_is_back_at_once() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = FakeUpstream::answering(move |request| match request.question().as_str() {
        "held" => [vec![Step::Wait(held.clone())], answer("Yes")].concat(),
        _ => answer("Yes"),
    });
    let proxy = Proxy::facing(&upstream).set("WORKERS", "100").start();
    let mut told = Told::default();
    told.note(&ask(&proxy, "Before?"));
    let other = proxy.database();
    other.execute_batch("BEGIN EXCLUSIVE").expect("the lock is free");
    let locked = Instant::now();
    let mut holding = proxy.connect().patient_for(PATIENCE * 2);
    holding.send(&post("/api/ask", &json!({"question": "held"})));
    upstream.wait_for_calls(2);
    ask(&proxy, "First?").expect_error(503, "history_unavailable");
    assert!(locked.elapsed() < Duration::from_secs(9), "said after {:?}", locked.elapsed());
    // Whoever asks now learns it soon, and need not pay for it.
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let started = Instant::now();
                ask(&proxy, "During?").expect_error(503, "history_unavailable");
                assert!(started.elapsed() < Duration::from_secs(4), "said after {:?}", started.elapsed());
            });
            scope.spawn(|| assert_eq!(proxy.get("/readyz").status, 503));
            scope.spawn(|| assert_eq!(proxy.get("/livez").status, 200));
            scope.spawn(|| assert_eq!(proxy.get("/api/history").status, 200, "readers need no lock"));
        }
    });
    assert_eq!(upstream.calls(), 3, "no call for what cannot be kept");
    // An answer under way does not wait behind all those that asked whether the history is back.
    gate.open();
    let released = Instant::now();
    let response = holding.read_response();
    response.expect_error(503, "history_unavailable");
    assert!(released.elapsed() < Duration::from_secs(12), "said after {:?}", released.elapsed());
    std::thread::sleep(Duration::from_secs(10).saturating_sub(locked.elapsed()));
    other.execute_batch("ROLLBACK").expect("the lock is given back");
    heals(&proxy, Duration::from_secs(2));
    told.expect_kept(&proxy);
}

/// Only one of them tries whether pairs can be kept again; the others wait for what that shows.
#[test]
fn when_the_lock_is_gone_all_who_come_at_once_are_served() {
    let proxy = Proxy::with(&[("MOCK_DELAY_MS", "0")]).start();
    let other = proxy.database();
    other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
    ask(&proxy, "Locked?").expect_error(503, "history_unavailable");
    other.execute_batch("ROLLBACK").expect("the lock is given back");
    let mut clients: Vec<_> = (0..16).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(&post("/api/ask", &json!({"question": "Back?"})));
    }
    for client in &mut clients {
        let response = client.read_response();
        assert_eq!(response.status, 200, "{response:?}");
    }
}

#[test]
fn a_short_lock_costs_nobody_anything() {
    let proxy = Proxy::start();
    let other = proxy.database();
    let mut told = Told::default();
    for round in 0..10 {
        other.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
        let mut connection = proxy.connect();
        connection.send(&post("/api/ask", &json!({"question": format!("Round {round}?")})));
        std::thread::sleep(Duration::from_millis(50));
        other.execute_batch("COMMIT").expect("the lock is given back");
        told.note(&connection.read_response());
    }
    told.expect_kept(&proxy);
}

#[test]
fn a_start_on_a_locked_database_waits_a_little_and_says_what_to_do() {
    let mut proxy = Proxy::start();
    proxy.answer("Before?");
    proxy.stop();
    let other = proxy.database();
    other.execute_batch("BEGIN EXCLUSIVE").expect("the lock is free");
    let started = Instant::now();
    let ended = proxy.setup().run(&[]);
    let line = ended.expect_refusal(1);
    assert!(line.contains("history.db") && line.contains("another process holds its lock"), "{line}");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    other.execute_batch("ROLLBACK").expect("the lock is given back");
    assert_eq!(proxy.setup().start().history().len(), 1);
}

/// Where its worker is wanted elsewhere, a reader has the connection meanwhile.
#[test]
fn what_is_pipelined_behind_an_answer_that_waits_for_its_commit_is_answered_after_it() {
    let gate = Gate::new();
    let upstream = FakeUpstream::always([vec![Step::Wait(gate.clone())], answer("Yes")].concat());
    let proxy = Proxy::facing(&upstream).set("WORKERS", "1").start();
    let question = post("/api/ask", &json!({"question": "Well?"}));
    let [mut first, mut second] = [proxy.connect(), proxy.connect()];
    first.send_bytes([question.bytes(), get("/livez").bytes()].concat());
    upstream.wait_for_calls(1);
    // Who is alone with its question writes itself.
    second.send(&question);
    eventually("it waits for the worker", || proxy.get("/readyz").json()["queue_length"] == 1);
    let lock = proxy.database();
    lock.execute_batch("BEGIN IMMEDIATE").expect("the lock is free");
    gate.open();
    upstream.wait_for_calls(2);
    // So that the reader has come to the second request.
    std::thread::sleep(Duration::from_millis(50));
    lock.execute_batch("ROLLBACK").expect("the lock is given back");
    let answered = first.read_response();
    assert_eq!(answered.json()["answer"], "Yes", "{answered:?}");
    assert_eq!(first.read_response().json()["status"], "alive");
    assert_eq!(second.read_response().status, 200);
}

// Forbidden

#[test]
fn a_database_that_cannot_be_written_is_refused_with_what_to_do() {
    let refused = |setup: &Setup, what: &str| {
        let ended = setup.run(&[]);
        let line = ended.expect_refusal(1);
        assert!(line.contains(what) && line.contains("DATABASE_PATH"), "{line}");
    };
    let folder_in_the_way = Setup::new();
    fs::create_dir(folder_in_the_way.folder().join("history.db")).expect("a folder");
    refused(&folder_in_the_way, "history.db: it is a folder");
    let file_in_the_way = Setup::new().file("file", "").set("DATABASE_PATH", "file/history.db");
    refused(&file_in_the_way, "file/history.db");
    let nowhere = Setup::new().set("DATABASE_PATH", "/proc/nowhere/history.db");
    refused(&nowhere, "/proc/nowhere/history.db");
    // The journal cannot be made, so nothing can be written.
    let journal_in_the_way = Setup::new();
    fs::create_dir(journal_in_the_way.folder().join("history.db-wal")).expect("a folder");
    let ended = journal_in_the_way.run(&[]);
    assert!(ended.expect_refusal(1).contains("history.db"), "{ended:?}");
    if getuid().is_root() {
        eprintln!("not tried: files and folders without rights, since root needs none");
        return;
    }
    let mut proxy = Proxy::start();
    proxy.answer("Before?");
    proxy.stop();
    let setup = proxy.setup();
    let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("own file");
    mode(&proxy.database_path(), 0o444);
    refused(&setup, "history.db");
    mode(&proxy.database_path(), 0o644);
    // What the attempt left beside it, with the same rights as the database had.
    for name in ["history.db-wal", "history.db-shm"] {
        let _ = fs::remove_file(proxy.database_path().with_file_name(name));
    }
    mode(setup.folder(), 0o555);
    refused(&setup, "history.db");
    mode(setup.folder(), 0o755);
    assert_eq!(setup.start().history().len(), 1);
}

#[test]
fn a_journal_that_cannot_be_made_while_it_runs_is_503_and_heals_by_itself() {
    let proxy = Proxy::start();
    let mut told = Told::default();
    told.note(&ask(&proxy, "Before?"));
    // The database is gone for a while, and something stands in the place of its journal.
    let path = proxy.database_path();
    let file = |name: &str| path.with_file_name(name);
    let names = ["history.db", "history.db-wal", "history.db-shm"];
    for name in names {
        let _ = fs::rename(file(name), file(&format!("aside-{name}")));
    }
    fs::create_dir(file("history.db-wal")).expect("a folder");
    for _ in 0..3 {
        ask(&proxy, "During?").expect_error(503, "history_unavailable");
    }
    assert_eq!(proxy.get("/readyz").status, 503);
    assert_eq!(proxy.get("/livez").status, 200);
    fs::remove_dir(file("history.db-wal")).expect("the folder");
    let _ = fs::remove_file(file("history.db"));
    for name in names {
        let _ = fs::rename(file(&format!("aside-{name}")), file(name));
    }
    heals(&proxy, Duration::from_secs(5));
    told.expect_kept(&proxy);
    assert_eq!(proxy.history().last().map(|pair| pair["question"].clone()), Some(json!("Before?")));
}

// Gone

#[test]
fn a_database_deleted_before_the_start_is_made_anew() {
    for left in [&[][..], &["history.db-wal"], &["history.db-shm"], &["history.db-wal", "history.db-shm"]] {
        let mut proxy = Proxy::start();
        proxy.answer("Before?");
        // Killed, so that there is a journal to be left behind.
        proxy.kill();
        for name in ["history.db", "history.db-wal", "history.db-shm"] {
            if !left.contains(&name) {
                let _ = fs::remove_file(proxy.database_path().with_file_name(name));
            }
        }
        let proxy = proxy.setup().start();
        assert_eq!(proxy.history().len(), 0, "{left:?}");
        proxy.answer("And now?");
        let check: String = proxy.database().query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a check");
        assert_eq!(check, "ok", "{left:?}");
    }
}

#[test]
fn a_database_deleted_or_moved_while_it_runs_is_noticed_before_anything_is_told() {
    let proxy = Proxy::start();
    proxy.answer("Before?");
    let path = proxy.database_path();
    let all = ["history.db", "history.db-wal", "history.db-shm"];
    for names in [&all[..], &all[..1]] {
        for name in names {
            let _ = fs::remove_file(path.with_file_name(name));
        }
        let mut told = Told::default();
        heals(&proxy, Duration::from_secs(5));
        for number in 0..3 {
            told.note(&ask(&proxy, &format!("After {number}?")));
        }
        told.expect_kept(&proxy);
        assert_eq!(proxy.history()[0]["question"], "After 2?");
    }
    // Its folder is taken away and brought back.
    let mut told = Told::default();
    told.note(&ask(&proxy, "In the folder?"));
    let inner = proxy.setup().set("DATABASE_PATH", "inner/history.db").start();
    let (here, there) = (path.with_file_name("inner"), path.with_file_name("there"));
    assert_eq!(ask(&inner, "Inside?").status, 200);
    fs::rename(&here, &there).expect("the folder");
    ask(&inner, "Without?").expect_error(503, "history_unavailable");
    assert_eq!(inner.get("/readyz").status, 503);
    fs::rename(&there, &here).expect("the folder");
    heals(&inner, Duration::from_secs(5));
    let questions: Vec<Value> = inner.history().iter().map(|pair| pair["question"].clone()).collect();
    assert_eq!(questions, ["Back?", "Inside?"], "what was told before is there again");
    told.expect_kept(&proxy);
}

// Damaged

#[test]
fn a_file_that_is_no_database_is_refused_with_what_to_do() {
    for content in ["this is no database, and long enough to tell".repeat(100), "\0".repeat(8192)] {
        let setup = Setup::new().file("history.db", &content);
        let before = fs::read(setup.folder().join("history.db")).expect("the file");
        let ended = setup.run(&[]);
        let line = ended.expect_refusal(1);
        assert!(line.contains("history.db") && (line.contains("damaged") || line.contains("no SQLite")), "{line}");
        assert_eq!(fs::read(setup.folder().join("history.db")).expect("the file"), before, "it is left as it was");
    }
}

#[test]
fn a_damaged_database_is_refused_or_served_around_and_never_a_crash() {
    let mut chance = Chance::new(31);
    let mut proxy = Proxy::with(&[("MAX_QUESTION_CHARS", "1000000")]).start();
    for number in 0..120 {
        assert_eq!(ask(&proxy, &format!("Treasure {number} {}", "word ".repeat(300))).status, 200);
    }
    assert_eq!(proxy.get("/api/history?q=treasure").status, 200);
    proxy.stop();
    let setup = proxy.setup();
    let path = proxy.database_path();
    let sound = fs::read(&path).expect("the database");
    let (mut refused, mut served, mut unavailable) = (0, 0, 0);
    for round in 0..24 {
        let mut bytes = sound.clone();
        match round % 4 {
            // A page or two, the first one now and then.
            0 | 1 => {
                for _ in 0..1 + chance.below(3) {
                    let page = 4096 * chance.below(bytes.len() / 4096);
                    let size = *chance.pick(&[8, 100, 4096]);
                    let rubbish = chance.bytes(size);
                    bytes[page..page + size].copy_from_slice(&rubbish);
                }
            }
            2 => bytes.truncate(chance.below(bytes.len())),
            _ => {
                let half = bytes.len() / 2;
                bytes[half..].fill(0);
            }
        }
        fs::write(&path, &bytes).expect("the database");
        for name in ["history.db-wal", "history.db-shm"] {
            let _ = fs::remove_file(path.with_file_name(name));
        }
        if fs::metadata(&path).is_ok_and(|file| file.len() == 0) {
            continue;
        }
        // It may serve or refuse to: the log tells which.
        let proxy = match setup.clone().try_start(&[]) {
            Ok(proxy) => proxy,
            Err(ended) => {
                let line = ended.expect_refusal(1);
                assert!(line.contains("history.db"), "{line}");
                refused += 1;
                continue;
            }
        };
        let requests = [
            get("/livez"),
            get("/readyz"),
            get("/api/history?limit=1000"),
            get("/api/history?q=treasure"),
            get("/api/history?before=50"),
            post("/api/ask", &json!({"question": "Does it work?"})),
            streaming("Does it work?"),
            get("/api/history?q=work"),
            get("/livez"),
        ];
        for request in requests {
            let response = proxy.connect().patient_for(PATIENCE * 2).exchange(&request);
            match response.status {
                200 => served += 1,
                503 => unavailable += 1,
                _ => panic!("round {round}: {response:?} to {request:?}"),
            }
        }
    }
    eprintln!("{refused} starts refused; of the others' requests {served} served, {unavailable} unavailable");
    assert!(refused > 0 && served > 0, "the damage reaches little: {refused} {served} {unavailable}");
    fs::write(&path, &sound).expect("the database");
    assert_eq!(setup.start().history().len(), 120, "the backup is as good as ever");
}

/// Its pairs are in the open file alone, and the disk forgets that with its last descriptor.
#[test]
fn a_journal_deleted_while_it_runs_takes_no_pair_along() {
    let mut proxy = Proxy::start();
    let mut told = Told::default();
    told.note(&ask(&proxy, "Before?"));
    for number in 0..2 {
        fs::remove_file(proxy.database_path().with_file_name("history.db-wal")).expect("a journal");
        told.note(&ask(&proxy, &format!("After {number}?")));
        assert_eq!(proxy.history().len(), number + 2);
    }
    proxy.kill();
    let proxy = proxy.setup().start();
    told.expect_kept(&proxy);
    assert_eq!(proxy.count_rows(), 3);
    proxy.expect_intact();
}

/// The index of the journal is what all processes share of a database.
#[test]
fn an_index_of_the_journal_deleted_while_it_runs_takes_no_pair_along() {
    let mut proxy = Proxy::start();
    let mut told = Told::default();
    let mut tell = |proxy: &Proxy, questions: [&str; 3]| questions.iter().for_each(|question| told.note(&ask(proxy, question)));
    tell(&proxy, ["1?", "2?", "3?"]);
    assert_eq!(proxy.history().len(), 3, "who has read may do so again");
    fs::remove_file(proxy.database_path().with_file_name("history.db-shm")).expect("an index");
    tell(&proxy, ["4?", "5?", "6?"]);
    let other = proxy.database();
    tell(&proxy, ["7?", "8?", "9?"]);
    let seen: i64 = other.query_row("SELECT count(*) FROM history", [], |row| row.get(0)).expect("it can be read");
    assert_eq!(seen, 9, "others see what the server has");
    other.execute("DELETE FROM history WHERE question = 'nothing'", []).expect("it can be written");
    tell(&proxy, ["10?", "11?", "12?"]);
    proxy.kill();
    drop(other);
    let proxy = proxy.setup().start();
    told.expect_kept(&proxy);
    assert_eq!(proxy.count_rows(), 12);
    proxy.expect_intact();
}

/// They stand beside the file, not beside the link.
#[test]
fn a_journal_deleted_behind_a_link_takes_no_pair_along() {
    let setup = Setup::new();
    fs::create_dir(setup.folder().join("real")).expect("a folder");
    std::os::unix::fs::symlink("real/pairs.db", setup.folder().join("history.db")).expect("a link");
    let mut proxy = setup.start();
    let mut told = Told::default();
    let mut tell = |proxy: &Proxy, questions: [&str; 3]| questions.iter().for_each(|question| told.note(&ask(proxy, question)));
    tell(&proxy, ["1?", "2?", "3?"]);
    for name in ["pairs.db-wal", "pairs.db-shm"] {
        fs::remove_file(proxy.setup().folder().join("real").join(name)).expect("it is there");
    }
    tell(&proxy, ["4?", "5?", "6?"]);
    proxy.kill();
    let proxy = proxy.setup().start();
    told.expect_kept(&proxy);
    assert_eq!(proxy.count_rows(), 6);
}

/// What the journal has is the other database's.
#[test]
fn a_database_that_another_one_takes_the_place_of_leaves_nothing_behind_in_it() {
    let proxy = Proxy::start();
    proxy.answer("Before?");
    let (path, backup) = (proxy.database_path(), proxy.database_path().with_file_name("backup.db"));
    proxy.database().execute("VACUUM INTO ?1", [backup.to_str().expect("a path")]).expect("a backup");
    (0..30).for_each(|number| drop(proxy.answer(&format!("Since {number}?"))));
    fs::rename(&backup, &path).expect("a file in its place");
    proxy.answer("After?");
    proxy.wait_for_line(|line| line.contains("was deleted or replaced"));
    let questions: Vec<Value> = proxy.history().iter().map(|pair| pair["question"].clone()).collect();
    assert_eq!(questions, ["After?", "Before?"]);
    proxy.expect_intact();
}

/// Nobody else would know of its tokens.
#[test]
fn a_stream_that_is_cut_short_and_cannot_be_kept_is_told_in_the_log() {
    let gate = Gate::new();
    let upstream = FakeUpstream::always(vec![stream_head(), event(&delta("Half")), Step::Wait(gate.clone()), Step::Close]);
    let proxy = Proxy::facing(&upstream).start();
    let mut stream = proxy.stream("Well?");
    stream.expect_event(&delta("Half"));
    proxy.database().execute_batch("ALTER TABLE history RENAME TO mine").expect("somebody does so");
    gate.open();
    assert!(stream.events().last().is_some_and(|event| event.contains("upstream_error")));
    proxy.wait_for_line(|line| line.contains("a stream that was cut short is not in the history"));
}

/// Its clients are sent to the log.
#[test]
fn why_the_history_cannot_be_read_is_one_line_of_the_log() {
    let mut proxy = Proxy::start();
    proxy.answer("Before?");
    proxy.database().execute_batch("ALTER TABLE history RENAME TO mine").expect("somebody does so");
    let error = proxy.get("/api/history").expect_error(503, "history_unavailable");
    assert!(error["message"].as_str().is_some_and(|text| text.contains("log says why")), "{error}");
    let log = proxy.whole_log();
    let why = log.iter().find(|line| line.contains("history cannot be read: "));
    assert!(why.is_some_and(|line| line.ends_with("(no such table: history)")), "{log:#?}");
}

#[test]
fn a_database_overwritten_while_it_runs_is_503_and_heals_when_the_backup_is_back() {
    let proxy = Proxy::start();
    for number in 0..20 {
        proxy.answer(&format!("Question {number}?"));
    }
    let path = proxy.database_path();
    let backup = path.with_file_name("backup.db");
    proxy.database().execute("VACUUM INTO ?1", [backup.to_str().expect("a path")]).expect("a backup");
    let all = ["history.db", "history.db-wal", "history.db-shm"];
    let replace = |with: &dyn Fn()| {
        for name in all {
            let _ = fs::remove_file(path.with_file_name(name));
        }
        with();
    };
    replace(&|| fs::write(&path, "rubbish".repeat(1000)).expect("the file"));
    for _ in 0..2 {
        ask(&proxy, "During?").expect_error(503, "history_unavailable");
    }
    let mut history = proxy.connect().patient_for(PATIENCE);
    history.exchange(&get("/api/history")).expect_error(503, "history_unavailable");
    assert_eq!(proxy.get("/readyz").status, 503);
    replace(&|| assert!(fs::copy(&backup, &path).is_ok_and(|size| size > 0)));
    heals(&proxy, Duration::from_secs(5));
    within(PATIENCE, "the old pairs are there", || proxy.history().len() == 21);
}
