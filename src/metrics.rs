//! What is counted, and its text for Prometheus
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>, version 0.0.4). Pure but for its
//! counts; knows names and numbers, not where they come from. Every label value comes from us, so no client can make a new
//! one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::Code;
use crate::lock::lock;

const SECONDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const SHORT: &[f64] = &[0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
const SIZES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];
/// Tokens of models that are not in the settings are counted together.
const OTHER: &str = "other";

/// A number that only grows.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often which values were seen.
pub struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, and one for what is larger than all.
    counts: Vec<Counter>,
    /// In millionths, since there is no atomic fraction.
    sum: Counter,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: (0..=bounds.len()).map(|_| Counter::default()).collect(), sum: Counter::default() }
    }

    /// Counts a time.
    pub fn observe(&self, time: Duration) {
        self.observe_value(time.as_secs_f64());
    }

    /// Counts a value that is not negative.
    pub fn observe_value(&self, value: f64) {
        let place = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[place].inc();
        self.sum.add((value * 1e6) as u64);
    }
}

/// All counts.
pub struct Metrics {
    /// By route and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    durations: Vec<(&'static str, Histogram)>,
    tokens: Vec<(String, [Counter; 2])>,
    upstream_errors: Vec<(&'static str, Counter)>,
    pub time_to_first_token: Histogram,
    pub queue_wait: Histogram,
    pub upstream_attempts: Counter,
    pub upstream_retries: Counter,
    pub upstream_fallbacks: Counter,
    pub upstream_cancelled: Counter,
    pub history_commits: Counter,
    pub history_rows: Counter,
    pub history_batch_size: Histogram,
    pub history_commit: Histogram,
}

/// What is not counted but is so at the moment: its name, what it is, and how much.
pub type Gauge = (&'static str, &'static str, f64);

/// What a route is answered with most.
const COMMON: [u16; 4] = [200, 429, 502, 503];

impl Metrics {
    /// Zeros for these routes and models.
    pub fn new(routes: &[&'static str], models: &[String]) -> Metrics {
        let upstream = [
            Code::UPSTREAM_REJECTED,
            Code::UPSTREAM_RATE_LIMITED,
            Code::UPSTREAM_ERROR,
            Code::UPSTREAM_BAD_ANSWER,
            Code::UPSTREAM_UNAVAILABLE,
            Code::UPSTREAM_TIMEOUT,
        ];
        let models = models.iter().map(String::as_str).filter(|model| *model != OTHER).chain([OTHER]);
        Metrics {
            // From the start, since who looks for an increase sees none in what was not there (Prometheus, "Instrumentation").
            requests: Mutex::new(routes.iter().flat_map(|route| COMMON.map(|status| ((*route, status), 0))).collect()),
            durations: routes.iter().map(|route| (*route, Histogram::new(SECONDS))).collect(),
            tokens: models.map(|model| (model.to_string(), Default::default())).collect(),
            upstream_errors: upstream.iter().map(|code| (code.name(), Counter::default())).collect(),
            time_to_first_token: Histogram::new(SECONDS),
            // Who waits for a stream's worker may do so for minutes.
            queue_wait: Histogram::new(SECONDS),
            upstream_attempts: Counter::default(),
            upstream_retries: Counter::default(),
            upstream_fallbacks: Counter::default(),
            upstream_cancelled: Counter::default(),
            history_commits: Counter::default(),
            history_rows: Counter::default(),
            history_batch_size: Histogram::new(SIZES),
            history_commit: Histogram::new(SHORT),
        }
    }

    /// A request was answered.
    pub fn request(&self, route: &'static str, status: u16, time: Duration) {
        *lock(&self.requests).entry((route, status)).or_default() += 1;
        let times = self.durations.iter().find(|(name, _)| *name == route);
        debug_assert!(times.is_some(), "no route {route}");
        times.iter().for_each(|(_, times)| times.observe(time));
    }

    /// A model of the settings, or any other, took and gave so many tokens.
    pub fn tokens(&self, model: &str, prompt: u64, completion: u64) {
        let known = self.tokens.iter().find(|(name, _)| name == model).or(self.tokens.last());
        if let Some((_, [prompts, completions])) = known {
            prompts.add(prompt);
            completions.add(completion);
        }
    }

    /// A call of the upstream failed.
    pub fn upstream_error(&self, code: Code) {
        match self.upstream_errors.iter().find(|(name, _)| *name == code.name()) {
            Some((_, count)) => count.inc(),
            None if code == Code::CLIENT_GONE => self.upstream_cancelled.inc(),
            None => {}
        }
    }

    /// The text to scrape, with these gauges.
    pub fn render(&self, gauges: impl IntoIterator<Item = Gauge>) -> String {
        let mut text = Text(String::with_capacity(16 * 1024));
        text.describe("ai_proxy_requests_total", "counter", "Requests answered, by route and status.");
        for ((route, status), count) in &*lock(&self.requests) {
            text.line("ai_proxy_requests_total", &format!("route=\"{route}\",status=\"{status}\""), *count as f64);
        }
        text.describe("ai_proxy_request_duration_seconds", "histogram", "From a request's first byte to its answer's last.");
        for (route, times) in &self.durations {
            text.histogram("ai_proxy_request_duration_seconds", &format!("route=\"{route}\""), times);
        }
        let first = "From a request's first byte to its stream's first event.";
        text.one_histogram("ai_proxy_time_to_first_token_seconds", first, &self.time_to_first_token);
        text.one_histogram("ai_proxy_queue_wait_seconds", "How long questions waited for a worker.", &self.queue_wait);
        text.counter("ai_proxy_upstream_attempts_total", "Requests sent to the LLM.", &self.upstream_attempts);
        text.counter("ai_proxy_upstream_retries_total", "Those sent again after a failure.", &self.upstream_retries);
        text.counter("ai_proxy_upstream_fallbacks_total", "Questions turned to another model.", &self.upstream_fallbacks);
        text.describe("ai_proxy_upstream_errors_total", "counter", "Failed calls of the LLM, by error code.");
        for (code, count) in &self.upstream_errors {
            text.line("ai_proxy_upstream_errors_total", &format!("code=\"{code}\""), count.get() as f64);
        }
        let cancelled = "Calls of the LLM ended because the client went away.";
        text.counter("ai_proxy_upstream_cancelled_total", cancelled, &self.upstream_cancelled);
        text.describe("ai_proxy_tokens_total", "counter", "Tokens as the LLM counted them, by model asked for and kind.");
        for (model, counts) in &self.tokens {
            for (kind, count) in ["prompt", "completion"].iter().zip(counts) {
                text.line("ai_proxy_tokens_total", &format!("model=\"{}\",kind=\"{kind}\"", escape(model)), count.get() as f64);
            }
        }
        text.counter("ai_proxy_history_commits_total", "Commits of new pairs.", &self.history_commits);
        text.counter("ai_proxy_history_rows_total", "Pairs written.", &self.history_rows);
        text.one_histogram("ai_proxy_history_batch_size", "Pairs in a commit.", &self.history_batch_size);
        text.one_histogram("ai_proxy_history_commit_seconds", "How long a commit took.", &self.history_commit);
        for (name, help, value) in gauges {
            text.describe(name, "gauge", help);
            text.line(name, "", value);
        }
        text.describe("ai_proxy_build_info", "gauge", "The program's version.");
        text.line("ai_proxy_build_info", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1.0);
        text.0
    }
}

struct Text(String);

impl Text {
    fn describe(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: f64) {
        let _ =
            if labels.is_empty() { writeln!(self.0, "{name} {value}") } else { writeln!(self.0, "{name}{{{labels}}} {value}") };
    }

    fn counter(&mut self, name: &str, help: &str, counter: &Counter) {
        self.describe(name, "counter", help);
        self.line(name, "", counter.get() as f64);
    }

    fn one_histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.describe(name, "histogram", help);
        self.histogram(name, "", histogram);
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut below = 0;
        for (place, count) in histogram.counts.iter().enumerate() {
            below += count.get();
            let bound = histogram.bounds.get(place).map_or("+Inf".to_string(), f64::to_string);
            self.line(&format!("{name}_bucket"), &format!("{labels}{comma}le=\"{bound}\""), below as f64);
        }
        self.line(&format!("{name}_sum"), labels, histogram.sum.get() as f64 / 1e6);
        self.line(&format!("{name}_count"), labels, below as f64);
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_come_out_as_they_went_in() {
        let metrics = Metrics::new(&["ask"], &["m\"1".to_string()]);
        metrics.request("ask", 200, Duration::from_millis(7));
        metrics.request("ask", 200, Duration::from_secs(100));
        metrics.tokens("m\"1", 2, 3);
        metrics.tokens("invented", 5, 7);
        metrics.upstream_error(Code::UPSTREAM_TIMEOUT);
        metrics.upstream_error(Code::CLIENT_GONE);
        metrics.queue_wait.observe(Duration::from_secs(20));
        let text = metrics.render([("ai_proxy_workers", "Workers.", 8.0)]);
        for line in [
            "ai_proxy_requests_total{route=\"ask\",status=\"200\"} 2",
            "ai_proxy_request_duration_seconds_bucket{route=\"ask\",le=\"0.005\"} 0",
            "ai_proxy_request_duration_seconds_bucket{route=\"ask\",le=\"0.01\"} 1",
            "ai_proxy_request_duration_seconds_bucket{route=\"ask\",le=\"60\"} 1",
            "ai_proxy_request_duration_seconds_bucket{route=\"ask\",le=\"+Inf\"} 2",
            "ai_proxy_request_duration_seconds_sum{route=\"ask\"} 100.007",
            "ai_proxy_tokens_total{model=\"m\\\"1\",kind=\"completion\"} 3",
            "ai_proxy_tokens_total{model=\"other\",kind=\"prompt\"} 5",
            "ai_proxy_upstream_errors_total{code=\"upstream_timeout\"} 1",
            "ai_proxy_upstream_cancelled_total 1",
            "ai_proxy_queue_wait_seconds_bucket{le=\"30\"} 1",
            "ai_proxy_workers 8",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(!text.contains("invented"));
    }
}
