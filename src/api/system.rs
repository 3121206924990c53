//! What operators ask: does it live, can it work, what has it done.

use std::borrow::Cow;
use std::sync::atomic::Ordering;

use serde_json::json;

use super::Api;
use crate::config::Mode;
use crate::http::Reply;
use crate::kernel;

/// `GET /livez`: 200 while the process lives.
pub fn livez() -> Reply {
    Reply::json(200, r#"{"status":"alive"}"#)
}

/// `GET /readyz`: 200 when history can be written and the server is not draining, else 503.
pub fn readyz(api: &Api) -> Reply {
    let load = api.workers.load();
    let writable = api.store.writable();
    let draining = api.draining.load(Ordering::SeqCst);
    let ready = writable && !draining;
    let body = json!({
        "status": if draining { "draining" } else if ready { "ready" } else { "not ready" },
        "mode": if api.config.mode == Mode::Upstream { "upstream" } else { "mock" },
        "version": env!("CARGO_PKG_VERSION"),
        "workers_busy": load.busy,
        "workers_total": load.total,
        "queue_length": load.queued,
        "connections": api.connections.count(),
        "history": if writable { "ok" } else { "unavailable" },
    });
    let mut reply = Reply::json(if ready { 200 } else { 503 }, body.to_string());
    if !ready {
        reply.headers.push((Cow::Borrowed("Retry-After"), "1".to_string()));
    }
    reply
}

/// `GET /metrics`: all counts, for Prometheus.
pub fn metrics(api: &Api) -> Reply {
    let load = api.workers.load();
    let gauges = [
        ("ai_proxy_requests_in_flight", "Requests being answered.", api.in_flight() as f64),
        ("ai_proxy_queue_length", "Questions waiting for a worker.", load.queued as f64),
        ("ai_proxy_workers_busy", "Workers asking the LLM.", load.busy as f64),
        ("ai_proxy_workers", "Workers there may be (WORKERS).", load.total as f64),
        ("ai_proxy_connections", "Open connections of clients.", api.connections.count() as f64),
        ("ai_proxy_uptime_seconds", "Since the start.", api.started.elapsed().as_secs_f64()),
    ];
    let memory = kernel::resident_memory().map(|bytes| ("process_resident_memory_bytes", "Resident memory.", bytes as f64));
    let text = api.metrics.render(gauges.into_iter().chain(memory));
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    Reply { status: 200, content_type, headers: Vec::new(), body: Cow::Owned(text.into_bytes()) }
}
