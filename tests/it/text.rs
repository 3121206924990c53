//! Text of every script and every control character goes through ask, stream and history unchanged.

use crate::support::client::{post, post_bytes};
use crate::support::proxy::Proxy;
use crate::support::upstream::{FakeUpstream, Step, answer, delta, end, event, finish, stream_head};
use serde_json::{Value, json};

fn texts() -> Vec<String> {
    let controls: String = ('\0'..='\u{1f}').chain(['\u{7f}', '\u{80}', '\u{9f}']).collect();
    [
        "Какая столица у Франции? Ёлки-палки — «да», №1",
        "日本語 中文 한국어 العربية עברית हिन्दी ไทย ქართული",
        "🙂 👩‍🦰 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇫🇷 ☝🏿",
        "a\0b",
        "\0",
        &format!("a{controls}b"),
        "line\nline\r\nline\rline\n\ntwo",
        "data: [DONE]\n\ndata: {\"error\": {}}\n\n: comment",
        "e\u{301} é \u{200b}\u{200d}\u{2028}\u{2029}\u{feff}\u{202e}txet\u{202c}",
        "\u{fffd}\u{ffff}\u{fffe}\u{10ffff}\u{e000}",
        r#"quotes " ' ` back\slash \n \u0000 </script> <b>&amp;</b> %00 ${x} {{y}} '; DROP TABLE history; --"#,
        "  leading and trailing \t",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Sends the question back, whole or in pieces of one character.
fn parrot() -> FakeUpstream {
    FakeUpstream::answering(|request| {
        let question = request.question();
        if !request.is_streaming() {
            return answer(&question);
        }
        let mut steps: Vec<Step> = vec![stream_head()];
        steps.extend(question.chars().map(|letter| event(&delta(&letter.to_string()))));
        steps.extend([event(&finish("stop")), event("[DONE]"), end()]);
        steps
    })
}

fn row(proxy: &Proxy, id: &Value) -> (String, String) {
    let sql = "SELECT question, answer FROM history WHERE id = ?1";
    let row = proxy.database().query_row(sql, [id.as_i64()], |row| Ok((row.get(0)?, row.get(1)?)));
    row.expect("the row")
}

#[test]
fn ask_leaves_every_text_unchanged() {
    let upstream = parrot();
    let proxy = Proxy::facing(&upstream).start();
    for text in texts() {
        let body = json!({"question": text, "system": text});
        let response = proxy.call(&post("/api/ask", &body));
        assert_eq!(response.status, 200, "{text:?}: {response:?}");
        let pair = response.json();
        assert_eq!((&pair["question"], &pair["answer"]), (&json!(text), &json!(text)));
        let sent = upstream.requests().pop().unwrap().json();
        assert_eq!(sent["messages"][0]["content"], text);
        assert_eq!(sent["messages"][1]["content"], text);
        assert_eq!(proxy.history()[0], pair);
        assert_eq!(row(&proxy, &pair["id"]), (text.clone(), text));
    }
}

#[test]
fn a_stream_leaves_every_text_unchanged() {
    let upstream = parrot();
    let proxy = Proxy::facing(&upstream).start();
    for text in texts() {
        let mut events = proxy.stream(&text).events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{text:?}: {events:?}");
        assert_eq!(events.pop(), Some(finish("stop")));
        let expected: Vec<String> = text.chars().map(|letter| delta(&letter.to_string())).collect();
        assert_eq!(events, expected, "{text:?}");
        assert_eq!(upstream.requests().pop().unwrap().question(), text);
        let pair = &proxy.history()[0];
        assert_eq!((&pair["question"], &pair["answer"]), (&json!(text), &json!(text)));
        assert_eq!(row(&proxy, &pair["id"]), (text.clone(), text));
    }
}

#[test]
fn the_mock_leaves_every_question_unchanged_on_both_endpoints() {
    let proxy = Proxy::start();
    for text in texts() {
        let pair = proxy.answer(&text);
        assert_eq!(pair["question"], text);
        assert_eq!(proxy.history()[0], pair);
        let events = proxy.stream(&text).events();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        assert_eq!(proxy.history()[0]["question"], text);
        assert_eq!(proxy.history()[0]["answer"], pair["answer"]);
    }
}

#[test]
fn escapes_in_the_request_are_the_characters_they_stand_for() {
    let upstream = parrot();
    let proxy = Proxy::facing(&upstream).start();
    let escaped = r#"{"question":"\u041f\u0440\u0438 \ud83d\ude42 \u0000 \u001f \/ \b\f\n\r\t \\ \""}"#;
    let response = proxy.call(&post_bytes("/api/ask", escaped));
    assert_eq!(response.status, 200, "{response:?}");
    let expected = "При 🙂 \0 \u{1f} / \u{8}\u{c}\n\r\t \\ \"";
    assert_eq!(response.json()["question"], expected);
    assert_eq!(upstream.requests()[0].question(), expected);
}

#[test]
fn a_long_text_goes_through_whole() {
    let upstream = parrot();
    let proxy = Proxy::facing(&upstream).start();
    let text = "Ж🙂".repeat(50_000);
    let pair = proxy.answer(&text);
    assert_eq!(pair["question"], text);
    assert_eq!(pair["answer"], text);
    assert_eq!(proxy.history(), [pair]);
    let longer = format!("{text}!");
    proxy.ask(&longer).expect_error(422, "invalid_request");
}
