//! A token bucket for each key. Pure but for its own counts: the time is told to it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{ApiError, Code, Header};
use crate::lock::lock;

/// Buckets of as many questions as a key may ask in a minute, which fill evenly.
pub struct RateLimit {
    per_minute: u32,
    buckets: Mutex<HashMap<Arc<str>, Bucket>>,
}

struct Bucket {
    questions: f64,
    at: Instant,
}

impl RateLimit {
    /// Full buckets of `per_minute` questions; 0: no limit.
    pub fn new(per_minute: u32) -> RateLimit {
        RateLimit { per_minute, buckets: Mutex::default() }
    }

    /// Takes one question of the key's. Returns what its answer says about the limit: nothing without
    /// one. Errs with 429 and when to come back.
    pub fn take(&self, key: &Arc<str>, now: Instant) -> Result<Vec<Header>, ApiError> {
        if self.per_minute == 0 {
            return Ok(Vec::new());
        }
        let size = f64::from(self.per_minute);
        let per_second = size / 60.0;
        let mut buckets = lock(&self.buckets);
        let bucket = buckets.entry(Arc::clone(key)).or_insert(Bucket { questions: size, at: now });
        bucket.questions = (bucket.questions + now.saturating_duration_since(bucket.at).as_secs_f64() * per_second).min(size);
        // Who read the clock first need not come first.
        bucket.at = bucket.at.max(now);
        let allowed = bucket.questions >= 1.0;
        if allowed {
            bucket.questions -= 1.0;
        }
        let reset = Duration::from_secs_f64((size - bucket.questions) / per_second);
        // The names and forms of https://platform.openai.com/docs/guides/rate-limits
        let headers: Vec<Header> = vec![
            ("x-ratelimit-limit-requests".into(), self.per_minute.to_string()),
            ("x-ratelimit-remaining-requests".into(), (bucket.questions as u64).to_string()),
            ("x-ratelimit-reset-requests".into(), format!("{}ms", reset.as_millis())),
        ];
        if allowed {
            return Ok(headers);
        }
        // Rounded to a millisecond first, or 20 s would become 21.
        let millis = ((1.0 - bucket.questions) / per_second * 1000.0).round() as u64;
        let wait = millis.div_ceil(1000).max(1);
        let text = format!("this key may ask {} questions a minute; the next in {wait} s", self.per_minute);
        Err(ApiError { headers, ..ApiError::new(Code::RATE_LIMITED, text) }.with_header("Retry-After", wait.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_fills_a_bucket_twice() {
        let (limit, key, began) = (RateLimit::new(60), Arc::from("k"), Instant::now());
        let at = |seconds| limit.take(&key, began + Duration::from_secs(seconds)).is_ok();
        assert!((0..60).all(|_| at(0)) && !at(0));
        assert!((0..10).all(|_| at(10)) && !at(10), "ten seconds bring ten");
        assert!(!at(0) && !at(10), "and no more");
        assert!((0..60).all(|_| at(3600)) && !at(3600), "nor does it ever hold more than a minute's");
    }

    #[test]
    fn whoever_comes_when_it_was_told_to_is_let_in() {
        for (per_minute, wait) in [(3, "20"), (40, "2"), (60, "1"), (600, "1")] {
            let (limit, key, began) = (RateLimit::new(per_minute), Arc::from("k"), Instant::now());
            let take = |seconds| limit.take(&key, began + Duration::from_secs(seconds));
            assert!((0..per_minute).all(|_| take(0).is_ok()));
            let headers = take(0).expect_err("it is empty").headers;
            let told = |name: &str| headers.iter().find(|header| header.0 == name).map(|header| &*header.1);
            assert_eq!((told("Retry-After"), told("x-ratelimit-reset-requests")), (Some(wait), Some("60000ms")));
            assert!(take(wait.parse().expect("a number")).is_ok());
        }
    }
}
