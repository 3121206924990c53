//! The house rules, read from `src/`: no import goes up, no crate strays, every file says what it is for.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where a module lives, on which layer, and which crates it may name. A module is what stands after `crate::`; rooms
/// inside one (`src/api/ask.rs`, `src/upstream/wire.rs`) belong to it.
struct Room {
    module: &'static str,
    layer: u8,
    crates: &'static [&'static str],
}

const fn room(module: &'static str, layer: u8, crates: &'static [&'static str]) -> Room {
    Room { module, layer, crates }
}

/// The house. A module may use what stands on a lower layer, and nothing beside it but by `SIDEWAYS`.
const HOUSE: &[Room] = &[
    room("main", 6, &[]),
    room("server", 5, &["log", "signal_hook"]),
    room("api", 4, &["log", "utoipa_swagger_ui", "serde", "serde_json", "subtle", "percent_encoding"]),
    room("relay", 3, &["log"]),
    room("http", 2, &["log", "tiny_http", "rustix", "httpdate", "memchr"]),
    room("upstream", 2, &["log", "ureq", "rustix", "httpdate"]),
    room("store", 2, &["log", "rusqlite", "unicode_properties", "crossbeam_channel", "oneshot"]),
    room("pool", 1, &["log", "oneshot"]),
    room("logging", 1, &["log", "simplelog", "rustix"]),
    room("sse", 1, PURE),
    room("openai", 1, PURE),
    room("exchange", 1, PURE),
    room("mock", 1, PURE),
    room("metrics", 1, PURE),
    room("rate_limit", 1, PURE),
    room("clock", 0, &["time"]),
    room("lock", 0, &[]),
    room("kernel", 0, &["libc", "libm", "rustix"]),
    room("config", 0, &["log", "dotenvy"]),
    room("error", 0, PURE),
    room("json", 0, PURE),
];

/// Who may use whom on the same layer. Everybody else there is a stranger.
const SIDEWAYS: &[(&str, &str)] = &[("openai", "exchange"), ("mock", "openai"), ("config", "error")];

/// A crate that only one room may name.
const OWNED: &[(&str, &str)] = &[("tiny_http", "http"), ("libc", "kernel"), ("ureq", "upstream"), ("rusqlite", "store")];

/// No input, no output, no clock, no thread: rooms with these crates only.
const PURE: &[&str] = &["memchr", "percent_encoding", "serde", "serde_json"];
const IMPURE: &[&str] =
    &["std::fs", "std::net", "std::env", "std::process", "std::thread", "SystemTime", "Instant::now", "println!"];

/// Pure rules beside a door.
const PURE_FILES: &[&str] = &["src/http/head.rs", "src/http/chunked.rs"];

/// The one place where `unsafe` may stand.
const UNSAFE: &[&str] = &["src/kernel.rs"];

struct Source {
    /// From the root of the repository: `src/api/ask.rs`.
    path: String,
    /// The module under `crate::` that it belongs to.
    module: String,
    /// Without comments and the tests at its foot.
    code: String,
    whole: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    let read = |path: PathBuf| {
        let whole = fs::read_to_string(&path).expect("a source file");
        let below = path.strip_prefix(root.join("src")).expect("below src");
        let first = below.components().next().expect("a name").as_os_str().to_string_lossy().into_owned();
        let module = first.trim_end_matches(".rs").to_owned();
        let path = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
        Source { path, module, code: without_comments_and_tests(&whole), whole }
    };
    let sources: Vec<Source> = files.into_iter().map(read).collect();
    assert!(sources.len() > 5, "src/ was read");
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn without_comments_and_tests(whole: &str) -> String {
    let before_tests = whole.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code = |line: &str| match line.trim_start().starts_with("//") {
        true => String::new(),
        false => line.split(" // ").next().unwrap_or_default().to_owned(),
    };
    before_tests.lines().map(code).collect::<Vec<String>>().join("\n")
}

fn room_of(module: &str) -> &'static Room {
    let room = HOUSE.iter().find(|room| room.module == module);
    room.unwrap_or_else(|| panic!("src/{module} has no place in the house: give it one in tests/it/tidy.rs"))
}

/// Every name that stands before a `::` and begins a path.
fn roots(code: &str) -> BTreeSet<&str> {
    let in_a_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut roots = BTreeSet::new();
    for (end, _) in code.match_indices("::") {
        let before = &code[..end];
        let start = before.rfind(|c| !in_a_name(c)).map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
        if !before[..start].ends_with("::") {
            roots.insert(&code[start..end]);
        }
    }
    roots
}

/// The modules that stand after `crate::` (also in braces) and, at the top, after `super::`.
fn used_modules(source: &Source) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    let at_the_top = source.path.matches('/').count() == 1;
    let mut prefixes = vec!["crate::"];
    if at_the_top {
        prefixes.push("super::");
    }
    for prefix in prefixes {
        for (at, _) in source.code.match_indices(prefix) {
            let rest = &source.code[at + prefix.len()..];
            match rest.strip_prefix('{') {
                Some(list) => used.extend(firsts_of(list)),
                None => used.extend(first_of(rest)),
            }
        }
    }
    used
}

fn first_of(text: &str) -> Option<String> {
    let name: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

/// The first names of a list in braces: `a::{b, c}, d}` are `a` and `d`.
fn firsts_of(list: &str) -> Vec<String> {
    let mut depth = 0;
    let mut names = Vec::new();
    let mut item = String::new();
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.extend(first_of(std::mem::take(&mut item).trim())),
            _ if depth == 0 => item.push(c),
            _ => {}
        }
    }
    names.extend(first_of(item.trim()));
    names
}

/// The crates of Cargo.toml, as code names them.
fn dependencies() -> BTreeSet<String> {
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).expect("Cargo.toml");
    let section = manifest.split("\n[dependencies]").nth(1).expect("dependencies").split("\n[").next();
    let names = section.unwrap_or_default().lines().filter(|line| !line.starts_with('#'));
    let names = names.filter_map(|line| line.split_once('=')).map(|(name, _)| name.trim().replace('-', "_"));
    names.collect()
}

#[test]
fn every_file_has_its_place_and_says_what_it_is_for() {
    for source in sources() {
        room_of(&source.module);
        assert!(source.whole.starts_with("//!"), "{} opens with a //! line", source.path);
    }
}

#[test]
fn no_import_goes_up_or_sideways() {
    for source in sources() {
        let own = room_of(&source.module);
        for used in used_modules(&source) {
            // What is not a module is an item of the crate's root, that is, of main.
            let other = HOUSE.iter().find(|room| room.module == used).unwrap_or_else(|| room_of("main"));
            let same = other.module == own.module;
            let sideways = SIDEWAYS.contains(&(own.module, other.module));
            assert!(same || sideways || other.layer < own.layer, "{} uses crate::{used}, which is not below it", source.path);
        }
    }
}

#[test]
fn no_crate_strays() {
    let dependencies = dependencies();
    assert!(dependencies.contains("tiny_http"), "{dependencies:?}");
    for source in sources() {
        let room = room_of(&source.module);
        for name in roots(&source.code).into_iter().filter(|name| dependencies.contains(*name)) {
            assert!(room.crates.contains(&name), "{} names {name}, which is not its business", source.path);
        }
    }
}

#[test]
fn no_room_has_leave_that_it_does_not_take() {
    let sources = sources();
    for room in HOUSE.iter().filter(|room| room.crates != PURE) {
        for name in room.crates {
            let named = |source: &Source| source.module == room.module && roots(&source.code).contains(name);
            assert!(sources.iter().any(named), "src/{} need not name {name} any more", room.module);
        }
    }
}

#[test]
fn a_door_has_one_owner() {
    for (name, owner) in OWNED {
        let users = HOUSE.iter().filter(|room| room.crates.contains(name)).map(|room| room.module);
        assert_eq!(users.collect::<Vec<_>>(), [*owner], "{name}");
        let named = |source: &&Source| roots(&source.code).contains(name);
        assert!(sources().iter().any(|source| named(&source)), "nobody names {name}: the check sees nothing");
    }
}

#[test]
fn the_pure_rooms_do_nothing_but_compute() {
    for source in sources() {
        let is_pure_room = room_of(&source.module).crates == PURE;
        if !is_pure_room && !PURE_FILES.contains(&source.path.as_str()) {
            continue;
        }
        // What stands above a part of a pure room is pure as well.
        let is_part = is_pure_room && source.path != format!("src/{}.rs", source.module);
        let pure_file = |name: String| PURE_FILES.contains(&format!("src/http/{name}.rs").as_str());
        let above = source.code.match_indices("super::").filter_map(|(at, up)| first_of(&source.code[at + up.len()..]));
        assert!(is_part || above.into_iter().all(pure_file), "{} is pure, but uses what stands above it", source.path);
        for deed in IMPURE {
            assert!(!source.code.contains(deed), "{} is pure, but names {deed}", source.path);
        }
    }
}

#[test]
fn unsafe_stands_in_one_place() {
    for source in sources() {
        let is_unsafe = source.code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
        assert!(!is_unsafe || UNSAFE.contains(&source.path.as_str()), "unsafe in {}", source.path);
    }
}

/// The README says where each limit stands.
#[test]
fn the_limits_are_where_the_readme_has_them() {
    let readme = include_str!("../../README.md");
    let sources = sources();
    let mut seen = 0;
    for row in readme.lines().filter(|row| row.starts_with('|') && row.contains("`src/")) {
        let mut names = Vec::new();
        for code in row.split('`').skip(1).step_by(2) {
            if !code.starts_with("src/") {
                names.push(code);
                continue;
            }
            let source = sources.iter().find(|source| source.path == code);
            let source = source.unwrap_or_else(|| panic!("there is no {code}: {row}"));
            for name in names.drain(..).filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_')) {
                seen += 1;
                let constant = format!("const {name}:");
                assert!(source.code.contains(&constant) || !is_limit(name), "{code} has no {name}: {row}");
            }
        }
    }
    assert!(seen > 10, "the table was read");
}

/// A word in capitals that is none of the settings.
fn is_limit(name: &str) -> bool {
    !include_str!("../../.env.example").contains(&format!("{name}="))
}

#[test]
fn there_is_no_library() {
    assert!(!Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs")).exists());
}

#[test]
fn the_readers_of_this_file_read_what_they_should() {
    assert_eq!(firsts_of("a::{b, c}, d}; use e"), ["a", "d"]);
    let code = "use serde::Deserialize; fn f() -> Result<ureq::Body, rusqlite::Error> { x::tiny_http::y() }";
    assert_eq!(roots(code).into_iter().collect::<Vec<_>>(), ["rusqlite", "serde", "ureq", "x"]);
    let source =
        |path: &str, code: &str| Source { path: path.into(), module: "x".into(), code: code.into(), whole: String::new() };
    let used = used_modules(&source("src/x.rs", "use crate::{a, b::{c, d}}; use super::e; crate::f::g()"));
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["a", "b", "e", "f"]);
    let used = used_modules(&source("src/api/ask.rs", "use super::route; use crate::store::Store;"));
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["store"]);
}
