//! `GET /api/history`: a key's own pairs, by page or by search.

use percent_encoding::percent_decode_str;

use super::{Api, Request};
use crate::error::ApiError;
use crate::exchange::Pair;
use crate::http::Reply;

/// The query of the request, checked.
struct Wanted {
    limit: u32,
    before: i64,
    words: String,
}

/// The page or the matches that the query string asks for.
pub fn history(api: &Api, request: &Request) -> Result<Reply, ApiError> {
    let key = request.key;
    let wanted = parse(request.head.query(), api.config.history_limit)?;
    let is_page = wanted.words.trim().is_empty();
    if !is_page {
        // Before the place is taken: others need not wait for this.
        api.store.await_index();
    }
    let _places = api.make(key, !is_page)?;
    let (items, next_before) = if is_page {
        let (items, is_more) = api.store.page(key, wanted.before, wanted.limit)?;
        let next = items.last().filter(|_| is_more).map(|last| last.id);
        (items, next)
    } else {
        (api.store.search(key, &wanted.words, wanted.before, wanted.limit)?, None)
    };
    Ok(Reply::json(200, page(&items, next_before)))
}

fn page(items: &[Pair], next_before: Option<i64>) -> Vec<u8> {
    #[derive(serde::Serialize)]
    struct Page<'a> {
        items: &'a [Pair],
        next_before: Option<i64>,
    }
    serde_json::to_vec(&Page { items, next_before }).unwrap_or_default()
}

fn parse(query: &str, limit: u32) -> Result<Wanted, ApiError> {
    let mut wanted = Wanted { limit, before: i64::MAX, words: String::new() };
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = value.replace('+', " ");
        let value = percent_decode_str(&value).decode_utf8_lossy();
        match name {
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=1000).contains(limit));
                wanted.limit = limit.ok_or_else(|| ApiError::invalid("limit", "limit must be a whole number from 1 to 1000"))?;
            }
            "before" => {
                let before = value.parse().ok().filter(|before| *before >= 0);
                wanted.before = before.ok_or_else(|| ApiError::invalid("before", "before must be the id of a pair"))?;
            }
            "q" => wanted.words = value.into_owned(),
            _ => {}
        }
    }
    Ok(wanted)
}
