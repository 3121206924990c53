//! `GET /api/history`: a key's own pairs, by page or by search.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::{Api, Request};
use crate::error::{ApiError, Code};
use crate::exchange::Exchange;
use crate::http::Reply;
use crate::lock::lock;

/// Keeps the memory within bounds that pages take: while they are put together, and while clients are slow
/// to take them.
#[derive(Default)]
pub struct Pages {
    making: Places,
    leaving: Places,
}

#[derive(Default)]
struct Places {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// One of the places, until it is dropped.
pub struct Place<'a>(&'a Places);

impl Places {
    /// One of so many, after a while if need be.
    fn take(&self, most: usize, patience: Duration) -> Option<Place<'_>> {
        let waited = self.freed.wait_timeout_while(lock(&self.taken), patience, |taken| *taken >= most);
        let (mut taken, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        *taken += 1;
        Some(Place(self))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *lock(&self.0.taken) -= 1;
        self.0.freed.notify_one();
    }
}

impl Pages {
    const MOST_MAKING: usize = 8;
    const PATIENCE: Duration = Duration::from_secs(10);
    const LARGE: usize = 256 * 1024;
    /// With 4 MiB each, no more than 128 MiB.
    const MOST_LEAVING: usize = 32;

    /// A place among those that are put together now. Errs with 503 where there is none for a while.
    fn make(&self) -> Result<Place<'_>, ApiError> {
        self.making
            .take(Pages::MOST_MAKING, Pages::PATIENCE)
            .ok_or_else(|| ApiError::new(Code::Overloaded, "too many pages of history are being read; try again"))
    }

    /// A place among those on their way for this page, where it is large, until it is out. Errs with 503 where there
    /// is none.
    pub fn leave(&self, page: &Reply) -> Result<Option<Place<'_>>, ApiError> {
        if page.body.len() < Pages::LARGE {
            return Ok(None);
        }
        self.leaving.take(Pages::MOST_LEAVING, Duration::ZERO).map(Some).ok_or_else(|| {
            let most = Pages::MOST_LEAVING;
            let text = format!("{most} large pages are on their way to slow clients; try again, or with a smaller limit");
            ApiError::new(Code::Overloaded, text)
        })
    }
}

/// The query of the request, checked.
struct Wanted {
    limit: u32,
    before: i64,
    words: String,
}

/// The page or the matches that the query string asks for.
pub fn history(api: &Api, request: &Request) -> Result<Reply, ApiError> {
    let key = request.key;
    let wanted = parse(request.query, api.config.history_limit)?;
    let is_page = wanted.words.trim().is_empty();
    if !is_page {
        // Before the place is taken: others need not wait for this.
        api.store.await_index();
    }
    let _place = api.pages.make()?;
    let (items, next_before) = if is_page {
        let items = api.store.page(key, wanted.before, wanted.limit)?;
        // A page of large pairs may be shorter than asked for, so only another look tells whether this is
        // the end.
        let next = match items.last() {
            Some(last) => api.store.page(key, last.id, 1)?.first().map(|_| last.id),
            None => None,
        };
        (items, next)
    } else {
        (api.store.search(key, &wanted.words, wanted.before, wanted.limit)?, None)
    };
    Ok(Reply::json(200, page(&items, next_before)))
}

fn page(items: &[Exchange], next_before: Option<i64>) -> Vec<u8> {
    #[derive(serde::Serialize)]
    struct Page<'a> {
        items: &'a [Exchange],
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
