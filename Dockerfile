# The image holds one static binary and an empty /data, nothing else: no shell, no libraries, no secret.
#
#   docker build -t ai-proxy .
#   docker run -p 8000:8000 -v ai-proxy:/data -e API_KEYS=alice:secret1 -e OPENAI_API_KEY=... ai-proxy
#
# Inside, the server listens on 0.0.0.0, so it refuses to start without API_KEYS; AUTH=off says out loud that
# everybody may ask. A folder mounted at /data must be writable for user 10001; a named volume is by itself.
# SHUTDOWN_GRACE_SECS is 25 by default and `docker stop` waits 10 seconds: stop with `docker stop -t 35`.

FROM rust:1.95-slim AS build
WORKDIR /build
# glibc linked in. It goes with --target: without one the flags would reach the build scripts and proc macros too.
ENV RUSTFLAGS="-C target-feature=+crt-static"

# The dependencies, in a layer of their own: only a change of these files builds them anew.
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
RUN mkdir src && echo 'fn main() {}' > src/main.rs \
 && cargo build --release --locked --bin ai-proxy --target "$(rustc --print host-tuple)"

# The program. Its sources may be older than the placeholder above, and cargo goes by time: hence the touch.
COPY sql sql
COPY src src
RUN touch src/main.rs \
 && cargo build --release --locked --bin ai-proxy --target "$(rustc --print host-tuple)" \
 && mkdir -p /image/data \
 && cp target/*/release/ai-proxy /image/

FROM scratch
COPY --from=build /image/ai-proxy /ai-proxy
COPY --from=build --chown=10001:10001 /image/data /data
# SQLite puts what it sorts on disk into SQLITE_TMPDIR: there is no /tmp here.
ENV HOST=0.0.0.0 DATABASE_PATH=/data/history.db SQLITE_TMPDIR=/data
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["/ai-proxy", "healthcheck"]
ENTRYPOINT ["/ai-proxy"]
