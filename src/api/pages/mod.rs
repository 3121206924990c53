//! The pages for people, all out of the binary: the console, and Swagger UI on the API's document. Nothing
//! in them asks another host, and their policy lets nothing run or load but their own files.

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::{ApiError, Code};
use crate::http::Reply;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// The console never makes HTML of a text; this has browsers see to it. Swagger UI does, and cleans it before.
const NO_HTML_FROM_TEXT: &str = "; require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// The file at this path, which is one of the pages' routes.
pub fn page(path: &str) -> Result<Reply, ApiError> {
    let (content_type, text) = match path {
        "/" => (HTML, include_str!("console.html")),
        "/console.css" => (CSS, include_str!("console.css")),
        "/console.js" => (JAVASCRIPT, include_str!("console.js")),
        "/docs" => (HTML, include_str!("docs.html")),
        "/docs/docs.js" => (JAVASCRIPT, include_str!("docs.js")),
        "/openapi.json" => ("application/json", include_str!("openapi.json")),
        _ => return swagger_ui(path.trim_start_matches("/docs/")),
    };
    let more = if path == "/" { NO_HTML_FROM_TEXT } else { "" };
    let mut reply = reply(content_type, Cow::Borrowed(text.as_bytes()), "no-cache");
    reply.headers.push(("Content-Security-Policy".into(), [POLICY, more].concat()));
    Ok(reply)
}

/// A file of Swagger UI, compressed when the crate was built: every browser takes gzip, so there is no other.
fn swagger_ui(name: &str) -> Result<Reply, ApiError> {
    let file = utoipa_swagger_ui::serve(name, Arc::default()).ok().flatten();
    let file = file.ok_or_else(|| ApiError::new(Code::NOT_FOUND, "Swagger UI has no such file"))?;
    let content_type = if name.ends_with(".css") { CSS } else { JAVASCRIPT };
    let mut reply = reply(content_type, file.bytes, "public, max-age=86400");
    if file.gzpipped {
        reply.headers.push(("Content-Encoding".into(), "gzip".into()));
    }
    Ok(reply)
}

fn reply(content_type: &'static str, body: Cow<'static, [u8]>, cache: &str) -> Reply {
    let headers = vec![
        ("Cache-Control".into(), cache.into()),
        ("X-Content-Type-Options".into(), "nosniff".into()),
        ("Referrer-Policy".into(), "no-referrer".into()),
    ];
    Reply { status: 200, content_type, headers, body }
}
