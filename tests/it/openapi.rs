//! The OpenAPI document cannot drift: it is held, in both directions, against the routes, the error codes and live
//! answers. What is wrong with single values `tests/openapi.py` finds.

use crate::support::client::{Response, get, post};
use crate::support::proxy::Proxy;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const ROUTES: &str = include_str!("../../src/api/route.rs");
const ERRORS: &str = include_str!("../../src/error.rs");
/// The pages, by the path that they are served at.
const PAGES: [(&str, &str); 2] =
    [("/", include_str!("../../src/api/pages/console.html")), ("/docs", include_str!("../../src/api/pages/docs.html"))];

const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"];

fn document() -> Value {
    serde_json::from_str(include_str!("../../src/api/pages/openapi.json")).expect("openapi.json is JSON")
}

/// Paths with their methods, as the document has them; HEAD goes with GET.
fn documented(document: &Value) -> BTreeMap<String, BTreeSet<&'static str>> {
    let paths = document["paths"].as_object().expect("paths");
    let methods = |operations: &Value| {
        let has = |method: &str| !operations[method.to_lowercase()].is_null();
        METHODS.into_iter().filter(|method| has(method) || (*method == "HEAD" && has("get"))).collect()
    };
    paths.iter().map(|(path, operations)| (path.clone(), methods(operations))).collect()
}

/// Paths with their methods, as the one `match` in `route.rs` has them; a prefix stands for what follows it.
fn routed() -> BTreeMap<String, BTreeSet<&'static str>> {
    let table = ROUTES.split("match path {").nth(1).and_then(|rest| rest.split("_ => {").next()).expect("the table");
    let mut routes = BTreeMap::new();
    for (at, _) in table.match_indices("\"/") {
        let path = table[at + 1..].split('"').next().unwrap_or_default();
        let path = if path.ends_with('/') && path.len() > 1 { format!("{path}{{id}}") } else { path.to_owned() };
        let end = |name: &str| table[at..].find(name).unwrap_or(usize::MAX);
        let methods = match end(" GET)") < end(" POST)") {
            true => BTreeSet::from(["GET", "HEAD"]),
            false => BTreeSet::from(["POST"]),
        };
        routes.insert(path, methods);
    }
    assert!(routes.len() > 7, "the table was read: {routes:?}");
    routes
}

/// What the pages load: their scripts and styles, which are no endpoints of their own.
fn parts() -> BTreeSet<String> {
    let loads = |html: &str| {
        let tags = html.split('<').filter(|tag| tag.starts_with("script ") || tag.starts_with("link rel=\"stylesheet\""));
        let address = |tag: &str| tag.split_once("src=\"").or(tag.split_once("href=\"")).map(|(_, rest)| rest.to_owned());
        let named = tags.filter_map(address).map(|rest| format!("/{}", rest.split('"').next().unwrap_or_default()));
        named.collect::<Vec<_>>()
    };
    let parts: BTreeSet<String> = PAGES.iter().flat_map(|(_, html)| loads(html)).collect();
    assert!(parts.contains("/console.js"), "the pages were read: {parts:?}");
    parts
}

/// Codes with their statuses, as `error.rs` has them, but for those of a client that is no longer there to read them.
fn codes() -> BTreeMap<String, u64> {
    let mut codes = BTreeMap::new();
    for (_, code) in ERRORS.lines().filter_map(|line| line.trim().strip_prefix("pub const ")?.split_once("= Code(\"")) {
        let (name, rest) = code.split_once("\", ").expect("a name and a status");
        let status = rest.trim_end_matches(");").parse().expect("a status");
        codes.insert(name.to_owned(), status);
    }
    assert!(codes.len() > 20, "the codes were read: {codes:?}");
    codes.retain(|_, status| *status != 499);
    codes
}

fn schema<'a>(document: &'a Value, name: &str) -> &'a Value {
    &document["components"]["schemas"][name]
}

/// Follows a reference to where it points.
fn resolved<'a>(document: &'a Value, node: &'a Value) -> &'a Value {
    match node["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap_or_else(|| panic!("no {reference}")),
        None => node,
    }
}

/// A path with the example of its parameter in it.
fn example(document: &Value, path: &str) -> String {
    let parameters = document["paths"][path]["get"]["parameters"].as_array().cloned().unwrap_or_default();
    let fill = |path: String, parameter: &Value| match (&parameter["in"], &parameter["example"]) {
        (Value::String(place), Value::String(value)) if place == "path" => {
            path.replace(&format!("{{{}}}", parameter["name"].as_str().unwrap_or_default()), value)
        }
        _ => path,
    };
    parameters.iter().fold(path.to_owned(), fill)
}

/// The live object has the keys of its schema, neither more nor fewer, and all of them are required.
#[track_caller]
fn expect_keys(schema: &Value, live: &Value) {
    let keys: BTreeSet<&String> = live.as_object().expect("an object").keys().collect();
    let properties: BTreeSet<&String> = schema["properties"].as_object().expect("properties").keys().collect();
    assert_eq!(keys, properties, "{live}");
    assert_eq!(schema["required"].as_array().map(Vec::len), Some(keys.len()), "{schema}");
    assert_eq!(schema["additionalProperties"], false, "{schema}");
}

#[test]
fn the_document_has_every_route_and_no_other() {
    let parts = parts();
    let mut routed = routed();
    routed.retain(|path, _| !parts.contains(path));
    assert_eq!(routed, documented(&document()));
}

/// What the history's query may ask for stands in one match.
#[test]
fn the_document_has_every_parameter_of_the_history() {
    let code = include_str!("../../src/api/history.rs").split("match name {").nth(1).and_then(|rest| rest.split("_ =>").next());
    let arms = code
        .expect("the match")
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once("\" => "))
        .map(|(name, _)| name);
    let document = document();
    let parameters = document["paths"]["/api/history"]["get"]["parameters"].as_array().expect("parameters");
    let documented =
        parameters.iter().filter(|parameter| parameter["in"] == "query").filter_map(|parameter| parameter["name"].as_str());
    assert_eq!(arms.collect::<BTreeSet<_>>(), documented.collect());
}

#[test]
fn every_documented_method_is_answered_and_every_other_refused() {
    let document = document();
    let proxy = Proxy::start();
    for (path, methods) in documented(&document) {
        let target = example(&document, &path);
        for method in METHODS {
            let request = get(&target).method(method);
            let response = match method {
                "POST" => proxy.call(&post(&target, &json!({}))),
                _ => proxy.call(&request),
            };
            if methods.contains(method) {
                assert!(!matches!(response.status, 404 | 405), "{method} {path}: {response:?}");
                expect_documented(&document, &path, method, &response);
            } else {
                assert_eq!(response.status, 405, "{method} {path}");
                let allowed: BTreeSet<&str> = response.header("Allow").unwrap_or_default().split(", ").collect();
                assert_eq!(allowed, methods.iter().copied().collect(), "{method} {path}");
            }
        }
    }
}

/// The status, the media type and each required piece of head are those of the document.
#[track_caller]
fn expect_documented(document: &Value, path: &str, method: &str, response: &Response) {
    let operation = match method {
        "HEAD" => &document["paths"][path]["get"],
        _ => &document["paths"][path][method.to_lowercase()],
    };
    let answer = resolved(document, &operation["responses"][response.status.to_string()]);
    assert!(answer.is_object(), "{method} {path}: {} is not documented", response.status);
    let media = response.header("Content-Type").and_then(|kind| kind.split(';').next()).unwrap_or_default();
    assert!(answer["content"][media].is_object(), "{method} {path}: {media} is not documented");
    assert!(answer["headers"]["X-Request-Id"].is_object(), "{method} {path}");
}

#[test]
fn the_document_has_every_error_code_and_no_other() {
    let document = document();
    let listed = &schema(&document, "Error")["properties"]["error"]["properties"]["code"];
    let names: BTreeSet<String> = serde_json::from_value(listed["enum"].clone()).expect("names");
    let codes = codes();
    assert_eq!(names, codes.keys().cloned().collect());
    let table = listed["description"].as_str().expect("a table");
    for (name, status) in &codes {
        assert!(table.contains(&format!("| {status} | `{name}` |")), "{status} {name} is not in the table");
    }
}

#[test]
fn every_code_stands_with_its_own_status() {
    let document = document();
    let codes = codes();
    let mut seen = BTreeSet::from(["method_not_allowed".to_owned()]);
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations") {
            for (status, answer) in operation["responses"].as_object().expect("responses") {
                let content = &resolved(&document, answer)["content"]["application/json"];
                let Some(parts) = content["schema"]["allOf"].as_array() else { continue };
                let here = parts[1]["properties"]["error"]["properties"]["code"]["enum"].clone();
                let here: BTreeSet<String> = serde_json::from_value(here).expect("names");
                for name in &here {
                    assert_eq!(codes.get(name).map(u64::to_string).as_ref(), Some(status), "{method} {path}: {name}");
                }
                let examples: BTreeSet<String> = content["examples"].as_object().expect("examples").keys().cloned().collect();
                assert_eq!(examples, here, "{method} {path} {status}: an example for each code");
                seen.extend(here);
            }
        }
    }
    assert_eq!(seen, codes.into_keys().collect(), "every code is said by some operation");
}

#[test]
fn live_answers_have_the_keys_of_their_schemas() {
    let document = document();
    let proxy = Proxy::with(&[("API_KEYS", "tester:secret1")]).start();
    let question = json!({"question": "What is the capital of France?"});
    let pair = proxy.call(&post("/api/ask", &question).key("secret1")).json();
    expect_keys(schema(&document, "Pair"), &pair);
    expect_keys(schema(&document, "Usage"), &pair["usage"]);
    let page = proxy.call(&get("/api/history").key("secret1")).json();
    expect_keys(schema(&document, "Page"), &page);
    expect_keys(schema(&document, "Pair"), &page["items"][0]);
    expect_keys(schema(&document, "Readiness"), &proxy.get("/readyz").json());
    expect_keys(schema(&document, "Alive"), &proxy.get("/livez").json());
    let refused = proxy.call(&post("/api/ask", &question));
    assert!(refused.header("WWW-Authenticate").is_some(), "{refused:?}");
    let refused = refused.json();
    let error = schema(&document, "Error");
    expect_keys(error, &refused);
    expect_keys(&error["properties"]["error"], &refused["error"]);
}

#[test]
fn a_question_has_the_fields_that_the_server_knows() {
    let document = document();
    let refused = Proxy::start().call(&post("/api/ask", &json!({"question": "Well?", "qestion": 1})));
    let message = refused.expect_error(422, "invalid_request")["message"].as_str().unwrap_or_default().to_owned();
    let known = message.split("known are ").nth(1).unwrap_or_else(|| panic!("no list of fields: {message}"));
    let known: BTreeSet<String> = known.split(", ").map(str::to_owned).collect();
    let question = schema(&document, "Question");
    assert_eq!(question["properties"].as_object().expect("properties").keys().cloned().collect::<BTreeSet<_>>(), known);
    assert_eq!(question["additionalProperties"], false);
}

#[test]
fn the_document_is_served_as_it_is_and_of_this_version() {
    let response = Proxy::start().get("/openapi.json");
    assert_eq!(response.json(), document());
    assert_eq!(document()["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document()["servers"][0]["url"], ".", "it may stand below a path of a reverse proxy");
}

#[test]
fn pages_load_their_own_parts_only_under_a_strict_policy() {
    let proxy = Proxy::start();
    for (path, html) in PAGES {
        let page = proxy.get(path);
        assert_eq!(String::from_utf8_lossy(&page.body), html);
        assert_eq!(page.header("Content-Type"), Some("text/html; charset=utf-8"));
        let policy = page.header("Content-Security-Policy").expect("a policy");
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        let elsewhere = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("//"), "{path} names another host");
        assert!(!html.contains("<style") && !html.contains(" style=") && !html.contains("<script>"), "{path} has inline code");
    }
    for part in parts() {
        let response = proxy.get(&part);
        assert_eq!(response.status, 200, "{part}");
        let kind = if part.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
        assert_eq!(response.header("Content-Type"), Some(kind), "{part}");
        assert_eq!(response.header("X-Content-Type-Options"), Some("nosniff"), "{part}");
        assert!(response.body.len() > 100, "{part}");
    }
}
