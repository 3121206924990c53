//! The commands and the settings: what is printed, what is refused, and with which exit code.

use crate::support::client::{get, post};
use crate::support::proxy::{Proxy, Setup, UPSTREAM_KEY};
use crate::support::upstream::{FakeUpstream, RefusingPort, Step, answer, reply};
use serde_json::json;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::thread;

/// Every setting of the contract with its default, where the contract names one.
const SETTINGS: [(&str, &str); 26] = [
    ("HOST", "127.0.0.1"),
    ("PORT", "8000"),
    ("DATABASE_PATH", "data/history.db"),
    ("API_KEYS", ""),
    ("AUTH", "on"),
    ("OPENAI_API_KEY", ""),
    ("OPENAI_BASE_URL", "https://api.openai.com/v1"),
    ("OPENAI_MODEL", "gpt-4o-mini"),
    ("SYSTEM_PROMPT", ""),
    ("MOCK_MODE", "false"),
    ("MOCK_DELAY_MS", "300"),
    ("WORKERS", ""),
    ("QUEUE_SIZE", ""),
    ("MAX_CONNECTIONS", ""),
    ("MAX_BODY_BYTES", "1048576"),
    ("MAX_QUESTION_CHARS", "100000"),
    ("HISTORY_LIMIT", "20"),
    ("HISTORY_SYNC", "full"),
    ("HISTORY_MAX_ROWS", "0"),
    ("HISTORY_MAX_DAYS", "0"),
    ("UPSTREAM_TIMEOUT_SECS", "60"),
    ("UPSTREAM_IDLE_SECS", "60"),
    ("UPSTREAM_RETRIES", "2"),
    ("STREAM_HEARTBEAT_SECS", "15"),
    ("SHUTDOWN_GRACE_SECS", "25"),
    ("LOG_LEVEL", "info"),
];

/// The line that begins with this name.
fn line_about<'a>(lines: &'a [String], name: &str) -> Option<&'a str> {
    let first_word = |line: &str| {
        let in_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        line.split(|c| !in_a_name(c)).find(|word| !word.is_empty()) == Some(name)
    };
    lines.iter().map(String::as_str).find(|line| first_word(line))
}

#[test]
fn what_is_no_text_is_no_command() {
    let ended = Setup::new().after("set -- \"$(printf '\\377')\"").run(&[]);
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    assert!(ended.stderr[0].contains("unknown command"), "{ended:?}");
}

#[test]
fn the_database_of_another_program_is_refused_in_one_line() {
    let setup = Setup::new();
    let database = rusqlite::Connection::open(setup.folder().join("history.db")).expect("it opens");
    database.execute_batch("CREATE TABLE history (visits)").expect("made");
    let ended = setup.run(&[]);
    assert_eq!((ended.status.code(), ended.stderr.len()), (Some(1), 1), "{ended:?}");
    let line = ended.expect_refusal(1);
    assert!(line.contains(".dump") && line.contains("VACUUM INTO"), "so it looks after .dump, too: {line}");
    // Its own count of versions may look like one of ours.
    let versions = (0..=6).map(|version| format!("CREATE TABLE invoices (x); PRAGMA user_version = {version}"));
    for made in versions.chain(["PRAGMA user_version = 4".to_string()]) {
        let setup = Setup::new();
        let path = setup.folder().join("history.db");
        rusqlite::Connection::open(&path).and_then(|database| database.execute_batch(&made)).expect("made");
        let before = std::fs::read(&path).expect("the file");
        let ended = setup.run(&[]);
        let line = ended.expect_refusal(1);
        assert!(line.contains("its tables are not those that this program makes"), "{made}: {line}");
        assert!(std::fs::read(&path).is_ok_and(|after| after == before), "{made}: it is left as it was");
    }
}

#[test]
fn help_lists_every_setting_with_its_default() {
    let ended = Setup::new().run(&["--help"]);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stderr, Vec::<String>::new());
    for (name, default) in SETTINGS {
        let line = line_about(&ended.stdout, name);
        let line = line.unwrap_or_else(|| panic!("{name} is not listed: {:#?}", ended.stdout));
        assert!(line.contains(default), "the default of {name} is {default}: {line}");
    }
    for command in ["serve", "healthcheck", "--version"] {
        let said = ended.stdout.iter().any(|line| line.contains(command));
        assert!(said, "{command}: {:#?}", ended.stdout);
    }
}

#[test]
fn version_prints_the_version() {
    let ended = Setup::new().run(&["--version"]);
    assert_eq!(ended.status.code(), Some(0));
    assert_eq!(ended.stdout, [format!("ai-proxy {}", env!("CARGO_PKG_VERSION"))]);
    assert_eq!(ended.stderr, Vec::<String>::new());
}

#[test]
fn help_and_version_do_not_care_about_bad_settings() {
    for argument in ["--help", "--version"] {
        assert_eq!(Setup::new().set("PORT", "nonsense").run(&[argument]).status.code(), Some(0));
    }
}

#[test]
fn anything_else_is_usage_on_stderr_and_exit_2() {
    let setup = Setup::new();
    for arguments in
        [&["frobnicate"][..], &["--frobnicate"], &[""], &["Serve"], &["serve", "now"], &["healthcheck", "now"], &["--help", "me"]]
    {
        let ended = setup.run(arguments);
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stdout, Vec::<String>::new(), "{arguments:?}");
        let usage = ended.stderr.join("\n").to_lowercase();
        for part in ["usage", "serve", "healthcheck", "--help"] {
            assert!(usage.contains(part), "{arguments:?}: {ended:?}");
        }
    }
    assert!(!setup.folder().join("history.db").exists(), "nothing was started");
}

#[test]
fn serve_is_what_no_command_means() {
    let proxy = Setup::new().start_as(&["serve"]);
    assert_eq!(proxy.get("/livez").status, 200);
    let bare = Setup::new().start_as(&[]);
    assert_eq!(bare.get("/livez").status, 200);
}

#[test]
fn healthcheck_is_0_while_the_server_answers() {
    let proxy = Proxy::start();
    let port = proxy.address.port().to_string();
    assert_eq!(Setup::new().set("PORT", &port).run(&["healthcheck"]).status.code(), Some(0));
}

#[test]
fn healthcheck_asks_the_loopback_address_of_a_server_that_listens_everywhere() {
    let everywhere = Setup::new().set("HOST", "0.0.0.0").set("API_KEYS", "alice:secret1");
    let proxy = everywhere.clone().start();
    let port = proxy.address.port().to_string();
    assert_eq!(everywhere.set("PORT", &port).run(&["healthcheck"]).status.code(), Some(0));
}

/// There IPv4 comes in, too, and in a container without IPv6 nothing else does.
#[test]
fn healthcheck_asks_by_ipv4_also_where_the_server_listens_to_both() {
    let other = FakeUpstream::always([reply(200, &[], ""), vec![Step::Close]].concat());
    let port = other.address().port().to_string();
    let ended = Setup::new().set("HOST", "::").set("AUTH", "off").set("PORT", &port).run(&["healthcheck"]);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}

/// As the kernel may be told (net.ipv6.bindv6only).
#[test]
fn healthcheck_asks_by_ipv6_where_the_server_listens_to_that_alone() {
    let nobody = RefusingPort::new();
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, nobody.address().port())) else { return };
    let asked = thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("it comes");
        assert!(client.read(&mut [0; 1024]).is_ok_and(|read| read > 0), "its question");
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").expect("sent");
    });
    let port = nobody.address().port().to_string();
    let ended = Setup::new().set("HOST", "::").set("AUTH", "off").set("PORT", &port).run(&["healthcheck"]);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    asked.join().expect("no panic");
}

#[test]
fn healthcheck_is_1_where_nobody_listens() {
    let nobody = RefusingPort::new();
    let port = nobody.address().port().to_string();
    assert_eq!(Setup::new().set("PORT", &port).run(&["healthcheck"]).status.code(), Some(1));
}

#[test]
fn healthcheck_is_1_where_the_answer_is_not_200_or_never_comes() {
    for steps in [
        [reply(503, &[], ""), vec![Step::Close]].concat(),
        [reply(404, &[], ""), vec![Step::Close]].concat(),
        vec![Step::Silence],
        vec![Step::Close],
        vec![Step::Reset],
        vec![Step::Send(b"hello\r\n\r\n".to_vec()), Step::Close],
    ] {
        let other = FakeUpstream::always(steps);
        let port = other.address().port().to_string();
        let ended = Setup::new().set("PORT", &port).run(&["healthcheck"]);
        let line = ended.expect_refusal(1);
        assert!(line.contains("unhealthy") && !line.contains("os error 11"), "{line}");
        assert_eq!(other.requests()[0].target, "/livez");
    }
}

#[test]
fn healthcheck_leaves_the_database_alone() {
    let proxy = Proxy::start();
    let port = proxy.address.port().to_string();
    let setup = Setup::new().set("PORT", &port);
    assert_eq!(setup.run(&["healthcheck"]).status.code(), Some(0));
    assert!(!setup.folder().join("history.db").exists());
}

#[test]
fn a_bad_setting_is_one_line_that_names_it_and_exit_2() {
    let number = ["abc", "-1", "1.5", "99999999999999999999999", "1 000", "0x10"];
    let positive = [&number[..], &["0"]].concat();
    let cases: Vec<(&str, Vec<&str>, &[&str])> = vec![
        ("PORT", [&number[..], &["65536"]].concat(), &["65535"]),
        ("HOST", vec!["not a host", "999.1.1.1", "http://127.0.0.1", "127.0.0.1:8000"], &[]),
        ("AUTH", vec!["maybe", "ON!", "0.5"], &["on", "off"]),
        ("MOCK_MODE", vec!["maybe", "2"], &["true", "false"]),
        ("MOCK_DELAY_MS", number.to_vec(), &[]),
        (
            "OPENAI_BASE_URL",
            [
                &["not a url", "ftp://127.0.0.1/v1", "http://", "127.0.0.1:80/v1", "/v1"][..],
                &["http://[::1", "http://[::1/v1", "https://api.openai.com/v1/chat/completions/"],
            ]
            .concat(),
            &["http"],
        ),
        ("OPENAI_MODEL", vec!["gpt\u{7f}4"], &["one line"]),
        ("OPENAI_FALLBACK_MODELS", vec!["a,b\u{7f}c"], &["one line"]),
        ("DATABASE_PATH", vec![":memory:", "file:a%20b.db"], &["./NAME"]),
        ("WORKERS", positive.clone(), &[]),
        ("QUEUE_SIZE", number.to_vec(), &[]),
        ("MAX_CONNECTIONS", positive.clone(), &[]),
        ("MAX_BODY_BYTES", positive.clone(), &[]),
        ("MAX_QUESTION_CHARS", positive.clone(), &[]),
        ("HISTORY_LIMIT", [&positive[..], &["1001"]].concat(), &["1000"]),
        ("HISTORY_SYNC", vec!["sometimes", "off", "2"], &["full", "normal"]),
        ("HISTORY_MAX_ROWS", number.to_vec(), &[]),
        ("HISTORY_MAX_DAYS", number.to_vec(), &[]),
        ("UPSTREAM_TIMEOUT_SECS", positive.clone(), &[]),
        ("UPSTREAM_IDLE_SECS", positive.clone(), &[]),
        ("UPSTREAM_RETRIES", number.to_vec(), &[]),
        ("STREAM_HEARTBEAT_SECS", positive.clone(), &[]),
        ("SHUTDOWN_GRACE_SECS", number.to_vec(), &[]),
        ("LOG_LEVEL", vec!["loud", "3"], &["info", "debug", "error"]),
    ];
    for (name, values, allowed) in cases {
        for value in values {
            let setup = Setup::new().set(name, value);
            let ended = setup.run(&[]);
            let line = ended.expect_refusal(2);
            assert!(line.contains(name), "it names {name}={value}: {line}");
            assert!(line.contains(&value.escape_debug().to_string()), "it shows the value of {name}={value}: {line}");
            for allowed in allowed {
                assert!(line.contains(allowed), "it says that {allowed} is allowed for {name}: {line}");
            }
            let rest = line.replacen(name, "", 1).replacen(value, "", 1);
            let words = rest.split_whitespace().filter(|word| word.chars().any(char::is_alphanumeric)).count();
            assert!(words >= 3, "it says what is allowed for {name}: {line}");
            assert!(!setup.folder().join("history.db").exists(), "nothing was started");
        }
    }
}

/// What the settings say of themselves is so.
#[test]
fn no_number_is_taken_beyond_what_help_says() {
    let help = Setup::new().run(&["--help"]).stdout;
    let mut seen = 0;
    for (name, _) in SETTINGS {
        let words = line_about(&help, name).expect("it is listed").split([' ', ',', ';']).collect::<Vec<_>>();
        let most = words.windows(2).find_map(|pair| pair[1].parse::<u64>().ok().filter(|_| pair[0] == "to"));
        if let Some(most) = most {
            let ended = Setup::new().set(name, (most + 1).to_string()).run(&[]);
            let line = ended.expect_refusal(2);
            assert!(line.contains(name) && line.contains(&most.to_string()), "{line}");
            seen += 1;
        }
    }
    assert!(seen >= 13, "{seen} in {help:#?}");
}

/// Half a secret is one that others may guess, and none lets everybody in.
#[test]
fn a_variable_in_the_env_file_that_is_not_set_is_refused() {
    for value in [
        "alice:hun$ter2",
        "${HUNTER2}",
        "alice:hunter$",
        "\"alice:hun$ter2\"",
        "alice:hun$HOME$ter2",
        "\"alice:'hun$ter2\"",
        "\"alice:hun #$ter2\"",
        "'alice:\"hun'$ter2",
        "'alice:hun\\'$ter2",
        "alice:hun\\\\$ter2",
        "alice:hun$HOME_ter2",
        "alice:hun$HO_ME",
        "alice:hun$HALF",
        "alice:$HOME\\${NOPE}ter2",
        "alice:hun${SUFFIX}",
        "alice:$HOME'hun$ter2'",
        "\"alice:it's${ter2}x\"",
        "\"alice:hun$HOME ter2\"",
        "alice:${GREW}hun",
    ] {
        let env = format!("T='\nSUFFIX=ter2'\nHOME=/x\nHO_ME=/x\nHALF=$ter2\nGREW=a\nGREW=a$ter2\nAPI_KEYS={value}\n");
        let ended = Setup::new().file(".env", &env).run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains("line 8 (API_KEYS)") && line.contains("single quotes"), "{line}");
        assert!(!line.contains("hun") && !line.contains("ter2"), "{line}");
    }
    for blank in [" ", "\t"] {
        let exported = Setup::new().file(".env", &format!("export{blank}API_KEYS=alice:hun$ter2\n")).run(&[]);
        assert!(exported.expect_refusal(2).contains("line 1 (API_KEYS)"), "{exported:?}");
    }
    for (value, secret) in [
        ("\"alice:hun'\\$\\\"\\\\ter2\"", "hun'$\"\\ter2"),
        ("'alice:hun$ter2'", "hun$ter2"),
        ("alice:hun\\$ter2", "hun$ter2"),
        ("alice:${WORD}2", "hunter2"),
        ("alice:${A_WORD}2", "hunter2"),
        ("alice:${GIVEN}2", "hunter2"),
        ("alice:hunter2 # $5", "hunter2"),
        ("alice:$SECOND ", "hunter2"),
    ] {
        let env = format!("WORD=hunter\nA_WORD=hunter\nSECOND=hunter2\nOTHER=$nothing\nAPI_KEYS={value}\nPORT=0 ");
        let proxy = Setup::new().file(".env", &env).set("GIVEN", "hunter").start();
        assert_eq!(proxy.call(&post("/api/ask", &json!({"question": "q"})).key(secret)).status, 200, "{value}");
    }
}

/// dotenvy takes the lines behind them for a part of the value: without a word the keys would be none, and be told to the LLM.
#[test]
fn quotes_that_are_open_at_the_end_of_a_line_in_the_env_file_are_refused() {
    for line in [
        "SYSTEM_PROMPT='Don't be evil'",
        "SYSTEM_PROMPT='No paths like C:\\tmp\\'",
        "SYSTEM_PROMPT=\"Be kind.",
        "HISTORY_LIMIT=7  # don't change",
        "OTHER=7  # don't change",
    ] {
        let env = format!("\n{line}\nAPI_KEYS=alice:hunter2\nMORE=2  # that's it\n");
        let ended = Setup::new().file(".env", &env).run(&[]);
        let told = ended.expect_refusal(2);
        assert!(told.contains(".env: line 2") && told.contains("all its quotes closed"), "{line}: {told}");
        assert!(!told.contains("hunter2"), "{told}");
    }
    let env = "# don't\r\n  # can't\nTHEIRS='one\ntwo = 2 $5\nthree'\nAPI_KEYS=alice:hunter2 # isn't\nSYSTEM_PROMPT=\"Don't \\\"\\\\\" # won't\n\nHISTORY_LIMIT=7  # ok\n \n";
    let proxy = Setup::new().file(".env", env).start();
    assert_eq!(proxy.call(&post("/api/ask", &json!({"question": "q"}))).status, 401);
}

/// So a secret is changed without a moment in which neither is taken.
#[test]
fn a_name_may_have_two_secrets() {
    let proxy = Setup::new().set("API_KEYS", "alice:old-secret,bob:secret2,alice:new-secret").start();
    for secret in ["old-secret", "new-secret"] {
        assert_eq!(proxy.call(&post("/api/ask", &json!({"question": "q"})).key(secret)).status, 200);
    }
    let pairs = proxy.call(&get("/api/history").key("new-secret")).json();
    assert_eq!(pairs["items"].as_array().map(Vec::len), Some(2));
    proxy.wait_for_line(|line| line.ends_with("keys: alice, bob"));
}

#[test]
fn a_bad_secret_is_refused_without_being_shown() {
    let cases: [(&str, &[&str]); 2] = [
        (
            "API_KEYS",
            &[
                ",",
                "alice:",
                ":hunter2",
                "alice:hunter2,bob:hunter2",
                "alice:hunter2,alice:hunter2",
                "alice:hunt er2",
                "алиса:хантер",
                "\"hunter2\"",
                "\"hunter2,hunter3\"",
                "alice:'hunter2'",
            ],
        ),
        ("OPENAI_API_KEY", &["hunter2\nX-Injected: 1", "hunt er2", "\"hunter2\"", "хантер"]),
    ];
    for (name, values) in cases {
        for value in values {
            let ended = Setup::new().set(name, value).run(&[]);
            let line = ended.expect_refusal(2);
            assert!(line.contains(name), "it names {name}: {line}");
            assert!(!line.contains("hunt") && !line.contains("хантер"), "it does not show {name}: {line}");
        }
    }
    for url in [
        "http://user:hunter2@host name/v1",
        "http://user:hunter2@host:port/v1",
        "http://user:12/hunter2@host/v1",
        "http://host/v1?key=hunter2",
        "host/v1?key=hunter2",
        "http:/u:p@host?key=hunter2",
        "http://host/v1?key=abc@hunter2",
        "http://user:hunter2@host/v1?key=hunter2&a=@#hunter2",
    ] {
        let ended = Setup::new().set("OPENAI_BASE_URL", url).run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains("OPENAI_BASE_URL") && !line.contains("hunter2"), "{line}");
    }
}

/// Its clients' settings have the same name, and one question would be asked by the server of itself again and again.
#[test]
fn a_server_that_would_ask_itself_does_not_start() {
    let upstream = |url: &str| Setup::new().set("PORT", "8123").set("OPENAI_API_KEY", "none").set("OPENAI_BASE_URL", url);
    for (host, url) in [
        ("127.0.0.1", "http://127.0.0.1:8123/v1"),
        ("127.0.0.1", "http://localhost:8123"),
        ("0.0.0.0", "http://u:p@127.0.0.1:8123/v1"),
        ("::", "http://[::1]:8123/v1"),
        ("127.0.0.1", "http://0.0.0.0:8123/v1"),
        ("::", "http://127.0.0.1:8123/v1"),
        ("::1", "http://localhost:8123/v1"),
    ] {
        let ended = upstream(url).set("HOST", host).set("AUTH", "off").run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains("OPENAI_BASE_URL") && line.contains("not of this server itself"), "{line}");
    }
    let port_80 = upstream("http://localhost/v1").set("PORT", "80").run(&[]);
    assert!(port_80.expect_refusal(2).contains("not of this server itself"), "{port_80:?}");
    for url in ["http://[::1]:8123/v1", "http://127.0.0.1:8124/v1", "http://127.0.0.2:8123/v1", "https://127.0.0.1:8123/v1"] {
        // Another mistake is found only behind that one.
        let ended = upstream(url).set("LOG_LEVEL", "loud").run(&[]);
        assert!(ended.expect_refusal(2).contains("LOG_LEVEL"), "{url}");
    }
    let mocked = upstream("http://127.0.0.1:8123/v1").set("MOCK_MODE", "true").set("LOG_LEVEL", "loud").run(&[]);
    assert!(mocked.expect_refusal(2).contains("LOG_LEVEL"), "a mock asks nobody");
}

/// As where a disk is full: who started it goes by the code.
#[test]
fn the_exit_code_is_the_same_where_stderr_takes_nothing() {
    for (name, value, code) in [("PORT", "abc", 2), ("DATABASE_PATH", "/proc/nowhere/x.db", 1)] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("it is there");
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_ai-proxy"));
        let ended =
            program.env_clear().env("PORT", "0").env(name, value).stderr(full).stdout(std::process::Stdio::null()).status();
        assert_eq!(ended.expect("it ends").code(), Some(code), "{name}");
    }
}

#[test]
fn a_setting_that_is_not_utf8_is_refused_by_name() {
    for name in ["PORT", "API_KEYS", "OPENAI_API_KEY", "OPENAI_MODEL"] {
        let ended = Setup::new().set(name, OsStr::from_bytes(b"\xff\xfe")).run(&[]);
        assert!(ended.expect_refusal(2).contains(name));
    }
}

#[test]
fn a_port_that_is_taken_is_one_line_and_exit_1() {
    let other = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = other.local_addr().expect("its address").port().to_string();
    let ended = Setup::new().set("PORT", &port).run(&[]);
    let line = ended.expect_refusal(1);
    assert!(line.contains(&port), "{line}");
}

#[test]
fn a_database_that_cannot_be_written_is_one_line_and_exit_1() {
    let setup = Setup::new().file("plain", "a regular file").file("garbage.db", &"not a database ".repeat(100));
    std::fs::create_dir(setup.folder().join("folder")).expect("a folder");
    for path in ["plain/history.db", "plain/deeper/history.db", "folder", "garbage.db", "/proc/history.db"] {
        let ended = setup.clone().set("DATABASE_PATH", path).run(&[]);
        let line = ended.expect_refusal(1);
        assert!(line.contains(path), "it names the database: {line}");
    }
    let garbage = std::fs::read_to_string(setup.folder().join("garbage.db")).expect("it is still there");
    assert!(garbage.starts_with("not a database") && garbage.len() == 1500, "it was left alone");
}

#[test]
fn a_newer_database_is_refused_and_left_alone() {
    let setup = Setup::new();
    let path = setup.folder().join("history.db");
    let database = rusqlite::Connection::open(&path).expect("a database");
    database.execute_batch("CREATE TABLE future (x); PRAGMA user_version = 9999").expect("a newer schema");
    drop(database);
    let before = std::fs::read(&path).expect("the file");
    let ended = setup.run(&[]);
    let line = ended.expect_refusal(1);
    assert!(line.contains("9999") || line.contains("newer"), "it says why: {line}");
    assert_eq!(std::fs::read(&path).expect("the file"), before);
}

#[test]
fn the_folder_of_the_database_is_made() {
    let setup = Setup::new();
    let proxy = setup.clone().set("DATABASE_PATH", "some/where/deep/pairs.db").start();
    proxy.answer("Well?");
    assert!(setup.folder().join("some/where/deep/pairs.db").exists());
    let setup = Setup::new().unset("DATABASE_PATH");
    let proxy = setup.clone().start();
    proxy.answer("Well?");
    assert!(setup.folder().join("data/history.db").exists(), "the default");
}

#[test]
fn without_keys_only_a_loopback_address_is_served_unless_auth_is_off() {
    let ended = Setup::new().set("HOST", "0.0.0.0").run(&[]);
    let line = ended.expect_refusal(2);
    assert!(line.contains("API_KEYS") && line.contains("AUTH=off"), "it says how: {line}");
    for setup in [
        Setup::new().set("HOST", "0.0.0.0").set("AUTH", "off"),
        Setup::new().set("HOST", "0.0.0.0").set("API_KEYS", "alice:secret1"),
        Setup::new().set("HOST", "127.0.0.1"),
        Setup::new().set("HOST", "localhost"),
    ] {
        assert_eq!(setup.start().get("/livez").status, 200);
    }
    // Another mistake is found only behind that one.
    for loopback in ["::1", "[::1]", "127.0.0.2"] {
        let ended = Setup::new().set("HOST", loopback).set("LOG_LEVEL", "loud").run(&[]);
        assert!(ended.expect_refusal(2).contains("LOG_LEVEL"), "{loopback}");
    }
}

#[test]
fn auth_off_serves_without_a_key() {
    let proxy = Proxy::with(&[("AUTH", "off"), ("HOST", "0.0.0.0")]).start();
    proxy.answer("Who asks?");
    assert_eq!(proxy.history().len(), 1);
}

#[test]
fn the_env_file_is_read_from_the_working_directory_and_the_environment_wins() {
    let env = "# a comment\nAPI_KEYS=alice:of-the-file\nMAX_QUESTION_CHARS=5\nHISTORY_LIMIT=\"7\"\n";
    let asks =
        |proxy: &Proxy, key: &str, question: &str| proxy.call(&post("/api/ask", &json!({"question": question})).key(key)).status;
    let proxy = Setup::new().file(".env", env).start();
    assert_eq!(asks(&proxy, "of-the-file", "short"), 200);
    assert_eq!(asks(&proxy, "of-the-file", "too long"), 422);
    let proxy = Setup::new().file(".env", env).set("API_KEYS", "alice:of-the-environment").start();
    assert_eq!(asks(&proxy, "of-the-file", "short"), 401);
    assert_eq!(asks(&proxy, "of-the-environment", "short"), 200);
    assert_eq!(asks(&proxy, "of-the-environment", "too long"), 422, "the rest of the file counts");
    let proxy = Setup::new().file(".env", env).set("MAX_QUESTION_CHARS", "").start();
    assert_eq!(asks(&proxy, "of-the-file", "too long"), 200, "set to nothing means the default");
}

#[test]
fn a_bad_setting_in_the_env_file_is_refused_like_any_other() {
    let ended = Setup::new().unset("MOCK_DELAY_MS").file(".env", "MOCK_DELAY_MS=soon\n").run(&[]);
    let line = ended.expect_refusal(2);
    assert!(line.contains("MOCK_DELAY_MS") && line.contains("soon"), "{line}");
}

#[test]
fn an_env_file_that_cannot_be_read_is_refused_without_showing_it() {
    let ended = Setup::new().file(".env", "OPENAI_API_KEY='hunter2\nnot a setting hunter2\n").run(&[]);
    let line = ended.expect_refusal(2);
    assert!(line.contains(".env") && !line.contains("hunter2"), "{line}");
    for (secret, which) in [("PORT=0\nAPI_KEYS=alice:hunter2 x\n", "line 2 (API_KEYS)"), ("hunter2= x y\n", "line 1: cannot")] {
        let ended = Setup::new().file(".env", secret).run(&[]);
        let line = ended.expect_refusal(2);
        assert!(line.contains(which) && !line.contains("hunter2"), "{line}");
    }
}

/// What it sets may be all that keeps others out.
#[test]
fn an_env_file_that_is_there_and_cannot_be_read_is_not_passed_over() {
    let setup = Setup::new();
    std::fs::create_dir(setup.folder().join(".env")).expect("a folder of this name");
    let ended = setup.run(&[]);
    assert!(ended.expect_refusal(2).contains(".env cannot be read"), "{ended:?}");
}

#[test]
fn a_folder_is_no_database() {
    let ended = Setup::new().set("DATABASE_PATH", "data/").run(&[]);
    let line = ended.expect_refusal(2);
    assert!(line.contains("DATABASE_PATH") && line.contains("\"data/\""), "{line}");
}

#[test]
fn a_base_url_of_another_server_is_asked_without_any_setting_but_the_key() {
    let upstream = FakeUpstream::always(answer("Yes"));
    let setup = Setup::new().set("OPENAI_BASE_URL", upstream.url()).set("OPENAI_API_KEY", UPSTREAM_KEY);
    assert_eq!(setup.start().answer("Well?")["answer"], "Yes");
    assert_eq!(upstream.calls(), 1);
}

#[test]
fn secrets_are_neither_printed_nor_logged_at_start() {
    for level in ["info", "debug", "trace"] {
        let setup = Setup::new()
            .set("API_KEYS", "alice:hunter-one,hunter-two")
            .set("OPENAI_API_KEY", "sk-hunter-three")
            .set("OPENAI_BASE_URL", "http://hunter-user:hunter-four@127.0.0.1:9/v1")
            .set("LOG_LEVEL", level);
        let mut proxy = setup.start();
        assert_eq!(proxy.call(&get("/api/history").key("hunter-one")).status, 200);
        proxy.stop();
        let said = [proxy.log(), proxy.stderr()].concat().join("\n");
        for secret in ["hunter-one", "hunter-two", "hunter-three", "hunter-four"] {
            assert!(!said.contains(secret), "{secret} at {level}: {said}");
        }
    }
}

#[test]
fn the_example_lists_every_setting_commented() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/.env.example");
    let example = std::fs::read_to_string(path).expect(".env.example");
    for (name, default) in SETTINGS {
        let is_about = |line: &&str| line.trim_start_matches(['#', ' ']).starts_with(&format!("{name}="));
        let line = example.lines().find(is_about);
        let line = line.unwrap_or_else(|| panic!("{name} is missing in .env.example"));
        assert!(line.contains(default), "the default of {name} is {default}: {line}");
    }
    // The program's own list, which may be longer than the contract's.
    let help = Setup::new().run(&["--help"]).stdout;
    let names: Vec<&str> = help.iter().filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    let names: Vec<&&str> = names.iter().filter(|name| name.starts_with(|c: char| c.is_ascii_uppercase())).collect();
    assert!(names.len() > SETTINGS.len(), "{names:?}");
    for name in names {
        assert!(example.lines().any(|line| line.starts_with(&format!("# {name}="))), "{name} is missing in .env.example");
        let row = format!("| `{name}` | ");
        assert!(include_str!("../../README.md").contains(&row), "{name} is missing in the README");
    }
    let started = Setup::new().file(".env", &example).start();
    assert_eq!(started.get("/livez").status, 200, "the example as it is can be used");
}
