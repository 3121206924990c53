//! Every setting: its name, default, what is allowed, and the checked value. Reads the environment and
//! `.env`, nothing else; knows no module but the start-up error.

mod env_file;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use log::LevelFilter;

use crate::error::StartError;

/// A request's head must be complete this long after its first byte.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection may be silent this long between two requests.
pub const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// A client that sends nothing of its body, or takes nothing of an answer, for this long is given up.
pub const CLIENT_STALL: Duration = Duration::from_secs(30);
/// A body must be complete this long after it began, and a second more for each `BODY_RATE` bytes of it that came.
pub const BODY_TIME: Duration = Duration::from_secs(60);
/// So many bytes of a body are a second's worth.
pub const BODY_RATE: usize = 1000;
/// Upstream connections are reused when they were idle for at most this long.
pub const UPSTREAM_KEEP_ALIVE: Duration = Duration::from_secs(10);
/// One address of the upstream must accept within this time.
pub const UPSTREAM_CONNECT: Duration = Duration::from_secs(5);
/// How long the database is waited for where another process holds its lock, or the index of words is behind.
pub const DATABASE_BUSY: Duration = Duration::from_secs(2);
/// The largest answer of the upstream, in bytes: as a whole, one event of a stream, or all text of it.
pub const MAX_ANSWER: usize = 16 << 20;

/// One line of `--help`: a variable, its default as text, and what it does.
struct Setting(&'static str, &'static str, &'static str);

const SETTINGS: &[Setting] = &[
    Setting("HOST", "127.0.0.1", "IP address to listen on, or localhost"),
    Setting("PORT", "8000", "port to listen on; 0: any free one"),
    Setting("DATABASE_PATH", "data/history.db", "SQLite file of the history; its folder is made"),
    Setting("API_KEYS", "", "keys of the clients, NAME:SECRET,...; a bare secret is named default"),
    Setting("AUTH", "on", "off: serve without keys on any address"),
    Setting("OPENAI_API_KEY", "", "the upstream's key; without it the server mocks the LLM"),
    Setting("OPENAI_BASE_URL", "https://api.openai.com/v1", "the upstream: its URL without the final /chat/completions"),
    Setting("OPENAI_MODEL", "gpt-4o-mini", "model for requests that name none"),
    Setting("OPENAI_FALLBACK_MODELS", "", "models to try in this order when the one asked for fails, a,b,..."),
    Setting("OPENROUTER_REFERER", "", "sent to the upstream as HTTP-Referer, by which OpenRouter knows your site"),
    Setting("OPENROUTER_TITLE", "", "sent to the upstream as X-OpenRouter-Title, your site's name there"),
    Setting("SYSTEM_PROMPT", "", "system message for questions at /api that bring none; /v1 never gets it"),
    Setting("MOCK_MODE", "false", "true: answer without any upstream"),
    Setting("MOCK_DELAY_MS", "300", "how long the mock thinks, 0 to 600000"),
    Setting("WORKERS", "2048", "LLM calls at once, 1 to 32768; a thread each, started when first needed"),
    Setting("QUEUE_SIZE", "512", "calls that may wait for a worker, 0 to 1000000; one more is answered 503"),
    Setting("MAX_CONNECTIONS", "4096", "open client connections, 1 to 100000; more wait in the backlog"),
    Setting("MAX_BODY_BYTES", "1048576", "request body, 1 to 536870912 bytes"),
    Setting("MAX_QUESTION_CHARS", "100000", "question, 1 to 1000000000 characters"),
    Setting(
        "RATE_LIMIT_PER_MINUTE",
        "0",
        "questions a key may ask in a minute on average, and as many at once, up to 1000000; 0: no limit",
    ),
    Setting("HISTORY_LIMIT", "20", "pairs in one page of history when the client names no limit, 1 to 1000"),
    Setting("HISTORY_SYNC", "full", "full: a power cut loses nothing; normal: it may lose the last moments"),
    Setting("HISTORY_MAX_ROWS", "0", "pairs kept, the oldest go first; 0: all"),
    Setting("HISTORY_MAX_DAYS", "0", "days a pair is kept, up to 36500; 0: for ever"),
    Setting(
        "UPSTREAM_TIMEOUT_SECS",
        "60",
        "a call with retries and fallbacks, to an answer's end or a stream's head, 1 to 86400",
    ),
    Setting("UPSTREAM_IDLE_SECS", "60", "silence after which a stream is given up, 1 to 86400"),
    Setting("UPSTREAM_CA_FILE", "", "PEM file of the certificates to trust in an https upstream, in place of the public ones"),
    Setting("UPSTREAM_RETRIES", "2", "further attempts after a retryable failure, 0 to 10"),
    Setting("STREAM_HEARTBEAT_SECS", "15", "silence after which a stream gets a comment line, 1 to 3600"),
    Setting("SHUTDOWN_GRACE_SECS", "25", "time for running requests after SIGTERM or SIGINT, 0 to 86400"),
    Setting("LOG_LEVEL", "info", "off, error, warn, info, debug or trace"),
];

/// Settings whose value is never repeated, not even when it is wrong.
const SECRETS: &[&str] = &["API_KEYS", "OPENAI_API_KEY"];

/// How a commit is made durable (<https://sqlite.org/pragma.html#pragma_synchronous>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    Full,
    Normal,
}

/// The longest secret of a client, in bytes.
pub const MAX_SECRET: usize = 256;

/// A client's key: the name that history and log show, and the secret that neither does.
pub struct ApiKey {
    pub name: Arc<str>,
    pub secret: String,
}

/// The LLM to ask.
pub struct UpstreamUrl {
    /// Up to and without `/chat/completions`, without credentials.
    pub base: String,
    /// What must not show up in any message: `user:password` of the URL as given, if it had one.
    pub credentials: Option<String>,
}

/// Where answers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Upstream,
    /// The mock, and the reason for it.
    Mock(&'static str),
}

/// All settings, checked.
pub struct Config {
    pub host: IpAddr,
    pub port: u16,
    pub database_path: PathBuf,
    /// Empty: no authentication.
    pub api_keys: Vec<ApiKey>,
    pub openai_api_key: String,
    pub upstream: UpstreamUrl,
    pub model: String,
    pub fallback_models: Vec<String>,
    pub openrouter_referer: String,
    pub openrouter_title: String,
    pub system_prompt: Option<String>,
    pub mode: Mode,
    pub mock_delay: Duration,
    pub workers: usize,
    pub queue_size: usize,
    pub max_connections: usize,
    pub max_body_bytes: usize,
    pub max_question_chars: usize,
    /// 0: no limit.
    pub rate_limit_per_minute: u32,
    pub history_limit: u32,
    pub history_sync: Durability,
    pub history_max_rows: u64,
    pub history_max_days: u64,
    pub upstream_timeout: Duration,
    pub upstream_idle: Duration,
    /// `None`: the public certificates that are compiled in.
    pub upstream_ca_file: Option<PathBuf>,
    pub upstream_retries: u32,
    pub stream_heartbeat: Duration,
    pub shutdown_grace: Duration,
    pub log_level: LevelFilter,
}

impl Config {
    /// The settings from the process environment and, where that is silent, from `./.env`. One that is set to nothing
    /// has its default, also where `.env` has another. Errs with one line that names variable, value and rule.
    pub fn load() -> Result<Config, StartError> {
        let mut given = env_file::read()?;
        for Setting(name, ..) in SETTINGS {
            if let Some(value) = std::env::var_os(name) {
                let no_text = |_| StartError::usage(format!("{name}: the value given is not UTF-8; it must be text"));
                given.insert(name.to_string(), value.into_string().map_err(no_text)?);
            }
        }
        Config::check(&Given(given))
    }

    /// The models of the settings, each once: the default, then the fallbacks.
    pub fn models(&self) -> Vec<String> {
        let mut models = vec![self.model.clone()];
        for model in &self.fallback_models {
            if !models.contains(model) {
                models.push(model.clone());
            }
        }
        models
    }

    fn check(given: &Given) -> Result<Config, StartError> {
        let host: IpAddr = match given.text("HOST").as_str() {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            text => text
                .trim_matches(['[', ']'])
                .parse()
                .map_err(|_| given.bad("HOST", "localhost, or an IP address such as 127.0.0.1, 0.0.0.0 or ::1"))?,
        };
        let auth = given.choice("AUTH", &[("on", true), ("off", false)])?;
        let api_keys = api_keys(given)?;
        if !auth && !api_keys.is_empty() {
            return Err(given.bad("AUTH", "on where API_KEYS is set; remove one of the two"));
        }
        if auth && api_keys.is_empty() && !host.is_loopback() {
            return Err(given.bad(
                "HOST",
                "a loopback address while no API_KEYS are set; set API_KEYS=NAME:SECRET, or AUTH=off to serve everybody",
            ));
        }
        let openai_api_key = given.text("OPENAI_API_KEY");
        if !openai_api_key.bytes().all(|b| (0x21..0x7f).contains(&b) && !b"\"'".contains(&b)) {
            return Err(given.bad("OPENAI_API_KEY", "printable ASCII without blanks and quotes"));
        }
        let (yes, no) = (["true", "1", "yes", "on"], ["false", "0", "no", "off"]);
        let booleans = [yes.map(|word| (word, true)), no.map(|word| (word, false))].concat();
        let mode = if given.choice("MOCK_MODE", &booleans)? {
            Mode::Mock("MOCK_MODE")
        } else if openai_api_key.is_empty() {
            Mode::Mock("no OPENAI_API_KEY")
        } else {
            Mode::Upstream
        };
        let (port, upstream) = (given.number("PORT", 0, 65535)?, upstream_url(given)?);
        if mode == Mode::Upstream && is_own_address(&upstream, host, port) {
            let rule = "the URL of the LLM, not of this server itself; its clients have a setting of the same name";
            return Err(given.bad("OPENAI_BASE_URL", rule));
        }
        Ok(Config {
            host,
            port,
            database_path: database_path(given)?,
            api_keys,
            openai_api_key,
            upstream,
            model: given.line("OPENAI_MODEL")?,
            fallback_models: entries(&given.line("OPENAI_FALLBACK_MODELS")?).map(str::to_string).collect(),
            openrouter_referer: given.header_text("OPENROUTER_REFERER")?,
            openrouter_title: given.header_text("OPENROUTER_TITLE")?,
            system_prompt: Some(given.text("SYSTEM_PROMPT")).filter(|s| !s.is_empty()),
            mode,
            mock_delay: Duration::from_millis(given.number("MOCK_DELAY_MS", 0, 600_000)?),
            workers: given.number("WORKERS", 1, 32_768)?,
            queue_size: given.number("QUEUE_SIZE", 0, 1_000_000)?,
            max_connections: given.number("MAX_CONNECTIONS", 1, 100_000)?,
            max_body_bytes: given.number("MAX_BODY_BYTES", 1, 512 << 20)?,
            max_question_chars: given.number("MAX_QUESTION_CHARS", 1, 1_000_000_000)?,
            rate_limit_per_minute: given.number("RATE_LIMIT_PER_MINUTE", 0, 1_000_000)?,
            history_limit: given.number("HISTORY_LIMIT", 1, 1000)?,
            history_sync: given.choice("HISTORY_SYNC", &[("full", Durability::Full), ("normal", Durability::Normal)])?,
            history_max_rows: given.number("HISTORY_MAX_ROWS", 0, i64::MAX as u64)?,
            history_max_days: given.number("HISTORY_MAX_DAYS", 0, 36_500)?,
            upstream_timeout: given.seconds("UPSTREAM_TIMEOUT_SECS", 1, 86_400)?,
            upstream_idle: given.seconds("UPSTREAM_IDLE_SECS", 1, 86_400)?,
            upstream_ca_file: Some(given.text("UPSTREAM_CA_FILE")).filter(|path| !path.is_empty()).map(PathBuf::from),
            upstream_retries: given.number("UPSTREAM_RETRIES", 0, 10)?,
            stream_heartbeat: given.seconds("STREAM_HEARTBEAT_SECS", 1, 3600)?,
            shutdown_grace: given.seconds("SHUTDOWN_GRACE_SECS", 0, 86_400)?,
            log_level: given
                .text("LOG_LEVEL")
                .parse()
                .map_err(|_| given.bad("LOG_LEVEL", "one of off, error, warn, info, debug, trace"))?,
        })
    }

    /// The text of `--help`: usage and every setting with its default.
    pub fn help() -> String {
        let mut text = String::from(
            "ai-proxy: asks an OpenAI-compatible LLM, streams its answers, keeps the history\n\n\
             usage: ai-proxy [serve]       serve (the default)\n\
             \x20      ai-proxy healthcheck   ask the running server's /livez: exit 0 or 1\n\
             \x20      ai-proxy --help | --version\n\n\
             settings, from the environment or ./.env (the environment wins):\n",
        );
        for Setting(name, default, what) in SETTINGS {
            let default = if default.is_empty() { "not set" } else { default };
            text.push_str(&format!("  {name:<22} {what} [{default}]\n"));
        }
        text
    }
}

/// The settings as text, before they are checked.
struct Given(HashMap<String, String>);

impl Given {
    fn text(&self, name: &str) -> String {
        let given = self.0.get(name).map(|given| given.trim()).filter(|given| !given.is_empty());
        let default = || SETTINGS.iter().find(|setting| setting.0 == name).map(|setting| setting.1);
        debug_assert!(default().is_some(), "no setting {name}");
        given.or_else(default).unwrap_or_default().to_string()
    }

    fn bad(&self, name: &str, allowed: &str) -> StartError {
        let given = if SECRETS.contains(&name) {
            "the value given (not shown)".to_string()
        } else {
            format!("{:?}", redact_url(&self.text(name)))
        };
        StartError::usage(format!("{name}: {given} is not allowed; it must be {allowed}"))
    }

    fn number<T: TryFrom<u64>>(&self, name: &str, least: u64, most: u64) -> Result<T, StartError> {
        let number = self.text(name).parse().ok().filter(|n| (least..=most).contains(n));
        let number = number.and_then(|number| T::try_from(number).ok());
        number.ok_or_else(|| self.bad(name, &format!("a whole number from {least} to {most}")))
    }

    /// What goes into the log's lines.
    fn line(&self, name: &str) -> Result<String, StartError> {
        let text = self.text(name);
        if text.contains(char::is_control) { Err(self.bad(name, "one line without control characters")) } else { Ok(text) }
    }

    fn header_text(&self, name: &str) -> Result<String, StartError> {
        let text = self.text(name);
        let sane = text.bytes().all(|b| (0x20..0x7f).contains(&b));
        if sane { Ok(text) } else { Err(self.bad(name, "printable ASCII, as it goes into a header")) }
    }

    fn seconds(&self, name: &str, least: u64, most: u64) -> Result<Duration, StartError> {
        self.number(name, least, most).map(Duration::from_secs)
    }

    fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<T, StartError> {
        let text = self.text(name).to_ascii_lowercase();
        let found = choices.iter().find(|(word, _)| *word == text);
        found.map(|(_, value)| *value).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            self.bad(name, &format!("one of {}", words.join(", ")))
        })
    }
}

/// A file, and none of what else SQLite makes of a name (<https://sqlite.org/uri.html>).
fn database_path(given: &Given) -> Result<PathBuf, StartError> {
    let path = given.line("DATABASE_PATH")?;
    if path == ":memory:" || path.starts_with("file:") {
        return Err(given.bad("DATABASE_PATH", "the path of a file; one with such a name is ./NAME"));
    }
    if path.ends_with('/') {
        return Err(given.bad("DATABASE_PATH", "the path of a file, such as data/history.db"));
    }
    Ok(PathBuf::from(path))
}

/// What stands between commas.
fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty())
}

fn api_keys(given: &Given) -> Result<Vec<ApiKey>, StartError> {
    let mut keys: Vec<ApiKey> = Vec::new();
    let text = given.text("API_KEYS");
    for entry in entries(&text) {
        let (name, secret) = entry.split_once(':').unwrap_or(("default", entry));
        let named_well = (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let secret_well = (1..=MAX_SECRET).contains(&secret.len()) && secret.bytes().all(|b| (0x21..0x7f).contains(&b));
        let new = keys.iter().all(|key| key.secret != secret);
        // Docker's --env-file leaves quotes that others take off.
        let unquoted = !secret.starts_with(['"', '\'']) && !secret.ends_with(['"', '\'']);
        if !(named_well && secret_well && unquoted && new) {
            return Err(given.bad(
                "API_KEYS",
                "NAME:SECRET,NAME:SECRET,... with names of 1 to 64 letters, digits, '.', '_' or '-', \
                 secrets of 1 to 256 printable ASCII characters without blanks and not in quotes, and no secret twice",
            ));
        }
        keys.push(ApiKey { name: name.into(), secret: secret.to_string() });
    }
    // `$A,$B` of two that are not set: nobody meant to let everybody in.
    if keys.is_empty() && !text.is_empty() {
        return Err(given.bad("API_KEYS", "at least one NAME:SECRET, or nothing at all"));
    }
    Ok(keys)
}

fn upstream_url(given: &Given) -> Result<UpstreamUrl, StartError> {
    let url = given.text("OPENAI_BASE_URL");
    let bad = || {
        let rule = "http:// or https://, a host, and a path such as /v1, without ? or #, and without /chat/completions";
        given.bad("OPENAI_BASE_URL", rule)
    };
    let (scheme, rest) = url.split_once("://").ok_or_else(bad)?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (credentials, host) = match authority.rsplit_once('@') {
        Some((credentials, host)) => (Some(credentials.to_string()), host),
        None => (None, authority),
    };
    let port_ok = match host.rsplit_once(':') {
        Some((_, port)) if !port.ends_with(']') => port.parse::<u16>().is_ok_and(|p| p > 0),
        _ => true,
    };
    let clean = !host.is_empty()
        && host.starts_with('[') == host.contains(']')
        && !host.starts_with(':')
        // A password with a slash in it.
        && !path.contains('@')
        && !path.trim_end_matches('/').ends_with("/chat/completions")
        && port_ok
        && rest.bytes().all(|b| (0x21..0x7f).contains(&b) && !b"?#\"<>\\^`{|}".contains(&b));
    if !clean || !matches!(scheme, "http" | "https") {
        return Err(bad());
    }
    Ok(UpstreamUrl { base: format!("{scheme}://{host}{}", path.trim_end_matches('/')), credentials })
}

/// Whether the upstream is where this server listens: each question would be asked again and again.
fn is_own_address(upstream: &UpstreamUrl, host: IpAddr, port: u16) -> bool {
    let Some(rest) = upstream.base.strip_prefix("http://") else { return false };
    let authority = rest.split('/').next().unwrap_or_default();
    let addresses = ["127.0.0.1", "[::1]"].map(|ip| authority.replace("localhost", ip));
    let mut addresses = addresses.iter().filter_map(|at| at.parse().or_else(|_| format!("{at}:80").parse::<SocketAddr>()).ok());
    addresses.any(|at| {
        let ip = at.ip().to_canonical();
        let is_same_family = host.is_ipv4() == ip.is_ipv4();
        let is_here = match host.is_unspecified() {
            // At :: IPv4 comes in, too.
            true => (host.is_ipv6() || is_same_family) && (ip.is_loopback() || ip.is_unspecified()),
            false => ip == host || ip.is_unspecified() && host.is_loopback() && is_same_family,
        };
        at.port() == port && is_here
    })
}

/// The URL without `user:password@` and a query, which may be a key.
fn redact_url(text: &str) -> String {
    let start = text.find("://").map_or(0, |scheme| scheme + 3);
    let query = text.find(['?', '#']).unwrap_or(text.len());
    let rest = if query < text.len() { "***" } else { "" };
    match text.rfind('@') {
        None => format!("{}{rest}", &text[..query]),
        // One may have the other's sign in it.
        Some(at) if at < start || query < at => "***".to_string(),
        Some(at) => format!("{}***{}{rest}", &text[..start], &text[at..query]),
    }
}
