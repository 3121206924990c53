#!/usr/bin/env bash
# Shows without Docker that the image works: builds the binary with the Dockerfile's own flags and command, and
# runs it with the Dockerfile's settings and user in an empty root folder, without even the /proc of a container.
# Needs cargo, curl, python3, and either root or user namespaces; without both it says so and leaves.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
root=$work/root
log=$work/log
trap '{ kill -KILL $(jobs -p); wait; } 2>/dev/null || true; rm -rf "$work"' EXIT

say() { echo "container: $*"; }
fail() {
    say "FAILED: $*" >&2
    if [ -s "$log" ]; then sed 's/^/    /' "$log" >&2; fi
    exit 1
}

for tool in cargo curl python3; do
    command -v "$tool" >/dev/null || fail "needs $tool"
done

# What the Dockerfile says.
flags=$(sed -n 's/^ENV RUSTFLAGS="\(.*\)"$/\1/p' Dockerfile)
build=$(grep -o 'cargo build .*)"' Dockerfile | sort -u)
user=$(sed -n 's/^USER //p' Dockerfile)
read -ra image_env < <(sed -n 's/^ENV \(HOST=.*\)/\1/p' Dockerfile)
if [ -z "$flags" ] || [ "$(wc -l <<<"$build")" != 1 ] || [ -z "$user" ] || [ ${#image_env[@]} = 0 ]; then
    fail "cannot read the flags, the one build command, the user and the settings out of the Dockerfile"
fi

# How to become that user in that folder: as root with chroot, else in a user namespace.
if [ "$(id -u)" = 0 ]; then
    enter=("$(command -v chroot)" --userspec="$user" --groups= "$root")
elif unshare --user true 2>/dev/null; then
    enter=("$(command -v unshare)" --user --map-user="${user%:*}" --map-group="${user#*:}" --root="$root" --wd=/)
else
    say "SKIPPED: chroot needs root, and this system has no user namespaces for others"
    exit 0
fi

# --- the binary ------------------------------------------------------------------------------------------------
say "$build"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/container"
RUSTFLAGS=$flags bash -c "$build"
binary=$(ls "$CARGO_TARGET_DIR"/*/release/ai-proxy)
linked=$(ldd "$binary" 2>&1 || true)
grep -qE 'statically linked|not a dynamic executable' <<<"$linked" || fail "the binary is not static: $linked"
size=$(stat -c %s "$binary")
say "the binary is static; size of the image: $size bytes ($((size / 1024)) KiB)"

# --- the root folder: what the image holds, and the two files that every container gets --------------------------
mkdir -p "$root/etc" "$root/data"
cp "$binary" "$root/ai-proxy"
echo 'nameserver 127.0.0.153' >"$root/etc/resolv.conf"
echo '127.0.0.1 localhost llm.internal' >"$root/etc/hosts"
if [ "$(id -u)" = 0 ]; then chown "$user" "$root/data"; fi

# --- the program in it --------------------------------------------------------------------------------------------
key=container-test

# start [NAME=VALUE]...: starts the server with the image's settings and these; sets pid and port.
start() {
    local began=${EPOCHREALTIME/[.,]/}
    env -i "${image_env[@]}" HOST=127.0.0.1 PORT=0 API_KEYS="$key" "$@" "${enter[@]}" /ai-proxy >"$log" 2>&1 &
    pid=$!
    for _ in {1..1000}; do
        port=$(sed -n 's|.*listening on http://127\.0\.0\.1:\([0-9]*\).*|\1|p' "$log")
        if [ -n "$port" ]; then
            say "listening $(((${EPOCHREALTIME/[.,]/} - began) / 1000)) ms after the start"
            return
        fi
        kill -0 "$pid" 2>/dev/null || fail "the server ended at the start"
        sleep 0.01
    done
    fail "the server does not listen"
}

# ask TEXT: prints the answer's JSON.
ask() {
    curl --silent --show-error --fail-with-body --noproxy '*' --max-time 20 \
        -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
        -d "{\"question\": \"$1\"}" "http://127.0.0.1:$port/api/ask"
}

# healthcheck: the image's HEALTHCHECK, as it would see its server.
healthcheck() {
    timeout 10 env -i "${image_env[@]}" PORT="$port" API_KEYS="$key" "${enter[@]}" /ai-proxy healthcheck
}

# stop: what `docker stop` does; the server must end by itself with 0.
stop() {
    kill -TERM "$pid"
    timeout 30 tail --pid="$pid" -f /dev/null || fail "the server does not stop"
    wait "$pid" || fail "the server stopped with $?"
}

start MOCK_MODE=true
answer=$(ask 'What is the capital of France?') || fail "no answer: $answer"
grep -q '"answer": *"[^"]' <<<"$answer" || fail "not an answer: $answer"
say "mock mode answers"
[ -s "$root/data/history.db" ] || fail "no /data/history.db"
say "/data/history.db is there"
healthcheck || fail "healthcheck says $? of a running server"
stop
if healthcheck >"$work/unhealthy" 2>&1; then fail "healthcheck says 0 of no server"; fi
say "healthcheck says 0 while it runs, not 0 after; SIGTERM ends it with 0"

# --- names ----------------------------------------------------------------------------------------------------------
# An upstream that gives one answer to everything, and (root only: it is port 53) a name server that knows llm.test
# and denies all other names, llm.internal of /etc/hosts among them. Prints the upstream's port.
cat >"$work/upstream.py" <<'PYTHON'
import http.server, json, os, socket, struct, threading

class Upstream(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "reached " + self.headers["Host"].split(":")[0]}
        body = json.dumps({"id": "1", "object": "chat.completion", "model": "fake", "choices": [
            {"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

def name_server(dns):
    while True:
        query, client = dns.recvfrom(512)
        end = query.index(0, 12) + 5
        known = query[12:end - 4] == b"\x03llm\x04test\x00"
        is_a = query[end - 4:end - 2] == b"\x00\x01"
        head = struct.pack(">HHHHH", 0x8180 if known else 0x8183, 1, known and is_a, 0, 0)
        record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04" + socket.inet_aton("127.0.0.1")
        dns.sendto(query[:2] + head + query[12:end] + (record if known and is_a else b""), client)

if os.getuid() == 0:
    dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    dns.bind(("127.0.0.153", 53))
    threading.Thread(target=name_server, args=[dns], daemon=True).start()
server = http.server.HTTPServer(("127.0.0.1", 0), Upstream)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
python3 "$work/upstream.py" >"$work/upstream.port" 2>"$log" &
for _ in {1..200}; do
    [ -s "$work/upstream.port" ] && break
    sleep 0.05
done
upstream=$(cat "$work/upstream.port")
[ -n "$upstream" ] || fail "the fake upstream does not start"

names=(llm.internal)
if [ "$(id -u)" = 0 ]; then
    names+=(llm.test)
else
    say "without root there is no name server to ask: DNS is left out"
fi
for name in "${names[@]}"; do
    start OPENAI_API_KEY=sk-test OPENAI_BASE_URL="http://$name:$upstream/v1" UPSTREAM_RETRIES=0
    answer=$(ask 'Who are you?') || fail "no answer from $name: $answer"
    grep -q "\"reached $name\"" <<<"$answer" || fail "not the answer of $name: $answer"
    say "found its upstream by the name $name"
    stop
done
say "all is well"
