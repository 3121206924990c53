//! What was acknowledged is there: after a restart, and when many ask at once.

use crate::support::client::post;
use crate::support::proxy::{Proxy, Setup};
use crate::support::upstream::{FakeUpstream, answer};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn a_restart_keeps_the_history_and_goes_on_counting() {
    let mut setup = Setup::new();
    let mut pairs: Vec<Value> = Vec::new();
    for round in 0..3 {
        let mut proxy = setup.start();
        let mut expected = pairs.clone();
        expected.reverse();
        assert_eq!(proxy.history(), expected, "round {round}");
        for number in 0..2 {
            pairs.push(proxy.answer(&format!("Question {number} of round {round}?")));
        }
        proxy.stop();
        setup = proxy.setup();
    }
    let ids: Vec<i64> = pairs.iter().map(|pair| pair["id"].as_i64().expect("an id")).collect();
    assert!(ids.is_sorted_by(|one, next| one < next), "no id is given twice: {ids:?}");
}

#[test]
fn an_id_is_never_given_again_even_when_its_row_was_removed() {
    let mut proxy = Proxy::start();
    let id = proxy.answer("Forget me?")["id"].as_i64().expect("an id");
    proxy.stop();
    proxy.database().execute("DELETE FROM history", []).expect("the row goes");
    let proxy = proxy.setup().start();
    assert!(proxy.answer("And me?")["id"].as_i64().is_some_and(|next| next > id));
}

#[test]
fn migrating_a_current_database_changes_nothing() {
    let mut proxy = Proxy::start();
    proxy.answer("Well?");
    proxy.stop();
    let schema = |proxy: &Proxy| -> (i64, String) {
        let database = proxy.database();
        let version = database.query_row("PRAGMA user_version", [], |row| row.get(0)).expect("a version");
        let sql = "SELECT group_concat(sql, ';') FROM (SELECT sql FROM sqlite_schema ORDER BY name)";
        (version, database.query_row(sql, [], |row| row.get(0)).expect("the schema"))
    };
    let before = schema(&proxy);
    assert!(before.0 > 0, "the database has a version");
    let mut again = proxy.setup().start();
    again.stop();
    assert_eq!(schema(&again), before);
}

/// It may take minutes, in which nothing else is heard of the server.
#[test]
fn a_migration_is_told_before_it_begins() {
    let setup = Setup::new();
    let first = include_str!("../../sql/migrations/0001_history.sql");
    let old = rusqlite::Connection::open(setup.folder().join("history.db")).expect("a file");
    old.execute_batch(&format!("{first}; PRAGMA user_version = 1")).expect("as it was");
    drop(old);
    let mut proxy = setup.start();
    assert!(proxy.whole_log()[0].contains("migrating from version 1 to"), "{:#?}", proxy.log());
    proxy.setup().start().expect_no_line(|line| line.contains("migrating"));
    Proxy::start().expect_no_line(|line| line.contains("migrating"));
}

#[test]
fn two_hundred_concurrent_asks_are_two_hundred_rows() {
    let upstream = FakeUpstream::answering(|request| answer(&format!("Re: {}", request.question())));
    let setup = Proxy::facing(&upstream).set("WORKERS", "16").set("QUEUE_SIZE", "200");
    let proxy = setup.set("MAX_CONNECTIONS", "300").start();
    let pairs: Vec<Value> = std::thread::scope(|scope| {
        let ask = |number: usize| {
            let proxy = &proxy;
            scope.spawn(move || proxy.answer(&format!("question {number}")))
        };
        let asking: Vec<_> = (0..200).map(ask).collect();
        asking.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    let mut ids = BTreeMap::new();
    for (number, pair) in pairs.iter().enumerate() {
        assert_eq!(pair["question"], format!("question {number}"));
        assert_eq!(pair["answer"], format!("Re: question {number}"), "nobody gets the answer of another");
        ids.insert(pair["id"].as_i64().expect("an id"), pair.clone());
    }
    assert_eq!(ids.len(), 200, "ids are unique");
    let kept: BTreeMap<i64, Value> =
        proxy.history().into_iter().map(|pair| (pair["id"].as_i64().expect("an id"), pair)).collect();
    assert_eq!(kept, ids);
    assert_eq!(proxy.count_rows(), 200);
}

#[test]
fn all_connections_of_a_crowd_are_served_in_turn() {
    let proxy = Proxy::with(&[("WORKERS", "4"), ("QUEUE_SIZE", "100"), ("MAX_CONNECTIONS", "100")]).start();
    let ids: BTreeSet<i64> = std::thread::scope(|scope| {
        let ask = |client: usize| {
            let proxy = &proxy;
            scope.spawn(move || {
                let mut connection = proxy.connect();
                let question = |number| post("/api/ask", &json!({"question": format!("{client} {number}")}));
                let answered = |number| connection.exchange(&question(number)).json()["id"].as_i64().expect("an id");
                (0..10).map(answered).collect::<Vec<i64>>()
            })
        };
        let asking: Vec<_> = (0..50).map(ask).collect();
        asking.into_iter().flat_map(|thread| thread.join().expect("answers")).collect()
    });
    assert_eq!(ids.len(), 500);
    assert_eq!(proxy.count_rows(), 500);
}
