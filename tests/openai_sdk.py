#!/usr/bin/env python3
"""The official `openai` package against the running server: any program that speaks to OpenAI goes on working.

    python3 tests/openai_sdk.py [BINARY]

BINARY is the built ai-proxy: the argument, or $AI_PROXY_BIN, or debug/ai-proxy in ${CARGO_TARGET_DIR:-target}. The script
makes a virtual environment of its own in ${CARGO_TARGET_DIR:-target}/venv-openai and installs there what REQUIREMENTS
pins. It then runs each case in mock mode or against a small upstream that this file scripts, prints one line a case, and
exits with 1 where one failed. Nothing but the installation leaves 127.0.0.1.
"""

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = ["openai==3.54.0", "pydantic==2.14.3"]
ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
VENV = TARGET / "venv-openai"
# No run takes as long, the installation apart.
WATCHDOG_SECS = 55


def enter_venv():
    """Goes on in the virtual environment, which is made where it is missing or of other versions."""
    python = VENV / "bin" / "python"
    marker = VENV / "requirements"
    wanted = "\n".join([sys.version, *REQUIREMENTS])
    if not (marker.exists() and marker.read_text() == wanted):
        print(f"installing {', '.join(REQUIREMENTS)} into {VENV}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        subprocess.run(pip, check=True)
        marker.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


if __name__ == "__main__" and not (VENV.exists() and os.path.samefile(sys.prefix, VENV)):
    enter_venv()

import asyncio
import json
import shutil
import tempfile
import threading
import time
import traceback
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Neither a proxy nor a key of the machine has a say here.
for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
    del os.environ[name]

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

UPSTREAM_KEY = "sk-upstream-0123456789abcdef"
CLIENT_KEY = "secret1"
PATIENCE = 20.0


# The upstream


def completion(text, message=None, reason="stop"):
    message = message or {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "fake-model-1",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17},
    }


def chunk(delta, reason=None):
    choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "fake-model-1", "choices": choices}


USAGE_CHUNK = {**chunk({}), "choices": [], "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}}


def error(message, kind="server_error", code=None):
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def tool_call(index, city):
    return {"id": f"call_{index}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


class Upstream(ThreadingHTTPServer):
    """Does what the question says. Remembers what it was asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Asked)
        self.lock = threading.Lock()
        self.requests = []
        self.left = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # A caller that goes away is no news.

    def calls(self, question):
        with self.lock:
            return [body for asked, body in self.requests if asked == question]


class Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in [("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def event(self, data):
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def wait_until_left(self):
        self.connection.settimeout(PATIENCE)
        try:
            self.connection.recv(1)
        except OSError:
            pass
        self.server.left.release()
        self.close_connection = True

    def do_GET(self):
        assert self.headers["Authorization"] == f"Bearer {UPSTREAM_KEY}"
        model = {"id": "openai/fake:free", "object": "model", "created": 1790000000, "owned_by": "fake"}
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [model]})
        elif self.path in ("/v1/models/openai/fake:free", "/v1/models/openai%2Ffake:free"):
            self.reply(200, model)
        else:
            self.reply(404, error("The model does not exist", code="model_not_found"))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append((question, body))
            count = sum(1 for asked, _ in self.server.requests if asked == question)
        if self.headers["Authorization"] != f"Bearer {UPSTREAM_KEY}":
            return self.reply(401, error("wrong key"))
        script = getattr(self, "on_" + question.split(":")[0], None)
        if script:
            script(body, count)
        elif body.get("stream"):
            self.stream_words(["About ", question], body)
        else:
            self.reply(200, completion(f"About {question}"), [("x-request-id", "req_upstream"), ("openai-processing-ms", "12")])

    def stream_words(self, words, body):
        self.begin_stream()
        for word in words:
            self.event(chunk({"content": word}))
        self.event(chunk({}, "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            self.event(USAGE_CHUNK)
        self.event("[DONE]")
        self.close_connection = True

    def on_tools(self, body, _):
        assert body["tools"][0]["function"]["name"] == "weather"
        calls = [tool_call(0, "Paris"), tool_call(1, "Řím")]
        if not body.get("stream"):
            return self.reply(200, completion(None, {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"))
        self.begin_stream()
        for index, call in enumerate(calls):
            arguments = call["function"]["arguments"]
            head = {**call, "index": index, "function": {"name": "weather", "arguments": ""}}
            self.event(chunk({"tool_calls": [head]}))
            for piece in (arguments[:5], arguments[5:]):
                self.event(chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}))
        self.event(chunk({}, "tool_calls"))
        self.event("[DONE]")
        self.close_connection = True

    def on_structured(self, body, _):
        assert body["response_format"]["type"] == "json_schema", body
        content = json.dumps({"city": "Paris", "people": 2100000, "river": {"name": "Seine"}})
        self.reply(200, completion(content))

    def on_429(self, body, _):
        headers = [("Retry-After", "7"), ("x-ratelimit-remaining-requests", "0")]
        self.reply(429, error("Rate limit reached", "requests", "rate_limit_exceeded"), headers)

    def on_429_once(self, body, count):
        if count == 1:
            return self.reply(429, error("Rate limit reached", "requests"), [("Retry-After", "1")])
        self.reply(200, completion("At last"))

    def on_quota(self, body, _):
        self.reply(429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota"))

    def on_500(self, body, _):
        self.reply(500, error("The server had an error"))

    def on_400(self, body, _):
        self.reply(400, error("This model's maximum context length is 8 tokens", "invalid_request_error", "context_length_exceeded"))

    def on_402(self, body, _):
        self.reply(402, {"error": {"message": "Insufficient credits", "code": 402}})

    def on_slow(self, body, _):
        self.wait_until_left()

    def on_busy_model(self, body, _):
        if body["model"] != "second":
            return self.reply(503, error(f"{body['model']} is overloaded"))
        if body.get("stream"):
            return self.stream_words(["Yes"], body)
        self.reply(200, {**completion("Yes"), "model": "second"})

    def on_breaks_off(self, body, _):
        self.begin_stream()
        self.event(chunk({"content": "Half"}))
        self.close_connection = True

    def on_error_event(self, body, _):
        self.begin_stream()
        self.event(chunk({"content": "Half"}))
        self.event({**error("Provider disconnected"), "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]})
        self.close_connection = True

    def on_late(self, body, _):
        self.begin_stream()
        time.sleep(1.3)
        self.event(chunk({"content": "Late"}))
        if body["messages"][-1]["content"] == "late:error":
            self.event(error("Too late"))
        else:
            self.event(chunk({}, "stop"))
        self.event("[DONE]")
        self.close_connection = True

    def on_endless(self, body, _):
        self.begin_stream()
        self.event(chunk({"content": "Half"}))
        self.wait_until_left()

    def on_old_server(self, body, _):
        if "stream_options" in body:
            return self.reply(400, error("Unrecognized request argument supplied: stream_options"))
        self.stream_words(["Yes"], body)


# The server


class Proxy:
    """The program on a free port with a clean environment and a folder of its own."""

    def __init__(self, binary, upstream=None, **settings):
        self.folder = tempfile.mkdtemp(prefix="ai-proxy-sdk-")
        environment = {"PORT": "0", "MOCK_DELAY_MS": "0", "API_KEYS": f"alice:{CLIENT_KEY},bob:secret2", **settings}
        if upstream:
            url = f"http://127.0.0.1:{upstream.server_port}/v1"
            environment = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": UPSTREAM_KEY, "UPSTREAM_RETRIES": "0", **environment}
        self.process = subprocess.Popen(
            [binary], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if "listening on http://" in line:
                self.url = line.split("listening on ")[1].strip().rstrip("/")
                break
        else:
            raise RuntimeError(f"{binary} did not start: exit code {self.process.wait()}")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def options(self, **more):
        return {"base_url": f"{self.url}/v1", "api_key": CLIENT_KEY, "max_retries": 0, "timeout": PATIENCE, **more}

    def client(self, **more):
        return OpenAI(**self.options(**more))

    def async_client(self, **more):
        return AsyncOpenAI(**self.options(**more))

    def history(self, key=CLIENT_KEY):
        request = urllib.request.Request(f"{self.url}/api/history?limit=1000", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)["items"]

    def newest(self, question):
        """The pair of this question: one that was cut short is stored a little later."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            found = [pair for pair in self.history() if pair["question"] == question]
            if found:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"{question!r} is not in the history")

    def stop(self):
        self.process.terminate()
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert code == 0, f"exit code {code} after SIGTERM"


def messages(question):
    return [{"role": "user", "content": question}]


def ask(client, question, **more):
    return client.chat.completions.create(model="m", messages=messages(question), **more)


def text_of(stream):
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def expect(kind, work):
    try:
        result = work()
    except kind as problem:
        return problem
    raise AssertionError(f"{kind.__name__} expected, got {result!r}")


def same(got, wanted):
    assert got == wanted, f"{got!r}, not {wanted!r}"


class River(BaseModel):
    name: str


class City(BaseModel):
    city: str
    people: int
    river: River


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
DEMANDED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}


def calls_of(stream):
    """Tool calls put together from their pieces, as programs do it."""
    calls = {}
    for part in stream:
        for piece in (part.choices[0].delta.tool_calls or []) if part.choices else []:
            call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
            call["arguments"] += piece.function.arguments or ""
    return [calls[index] for index in sorted(calls)]


CASES = []


def case(name, **settings):
    """A case for the mock (`def f(proxy)`) or for the upstream (`def f(proxy, upstream)`)."""

    def add(work):
        upstream = "upstream" in work.__code__.co_varnames[: work.__code__.co_argcount]
        CASES.append(("upstream" if upstream else "mock", name, work, settings))
        return work

    return add


# Mock mode


@case("plain")
def _(proxy):
    said = ask(proxy.client(), "What is it?")
    assert "What is it?" in said.choices[0].message.content
    same((said.object, said.model, said.choices[0].finish_reason), ("chat.completion", "m", "stop"))
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens > 0
    assert said._request_id
    same(proxy.newest("What is it?")["answer"], said.choices[0].message.content)


@case("streaming")
def _(proxy):
    client = proxy.client()
    whole = ask(client, "Tell me a story!").choices[0].message.content
    parts = list(ask(client, "Tell me a story!", stream=True))
    same(text_of(parts), whole)
    assert len(parts) > 3 and all(part.choices for part in parts), "word by word, and no usage that nobody asked for"
    parts = list(ask(client, "Tell me a story!", stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage.total_tokens > 0 and not parts[-1].choices


@case("tools, whole and streamed")
def _(proxy):
    client = proxy.client()
    said = ask(client, "Weather?", **DEMANDED).choices[0]
    same((said.finish_reason, said.message.content), ("tool_calls", None))
    call = said.message.tool_calls[0]
    same((call.type, call.function.name), ("function", "weather"))
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    streamed = calls_of(ask(client, "Weather?", stream=True, **DEMANDED))
    same(streamed, [{"id": call.id, "name": "weather", "arguments": call.function.arguments}])


@case("structured output")
def _(proxy):
    client = proxy.client()
    said = client.chat.completions.parse(model="m", messages=messages("A city?"), response_format=City)
    assert isinstance(said.choices[0].message.parsed, City)
    with client.chat.completions.stream(model="m", messages=messages("A city?"), response_format=City) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    same(parsed, said.choices[0].message.parsed)
    free = ask(client, "A city?", response_format={"type": "json_object"})
    assert isinstance(json.loads(free.choices[0].message.content), dict)


@case("async")
def _(proxy):
    async def run():
        async with proxy.async_client() as client:
            whole = await ask(client, "What is it?")
            text = ""
            async for part in await ask(client, "What is it?", stream=True):
                text += part.choices[0].delta.content or ""
            same(text, whole.choices[0].message.content)

    asyncio.run(run())


@case("20 parallel calls", MOCK_DELAY_MS="100")
def _(proxy):
    async def run():
        async with proxy.async_client() as client:
            started = time.monotonic()
            answers = await asyncio.gather(*(ask(client, f"number {n}") for n in range(20)))
            for number, said in enumerate(answers):
                assert said.choices[0].message.content.endswith(f"number {number}"), said
            assert time.monotonic() - started < 1.5, "one after the other would take 2 s"

    asyncio.run(run())
    same(len(proxy.history()), 20)


@case("wrong key")
def _(proxy):
    for key in ("wrong", CLIENT_KEY + "x"):
        client = proxy.client(api_key=key)
        for work in (lambda: ask(client, "a"), lambda: ask(client, "a", stream=True), lambda: client.models.list()):
            problem = expect(openai.AuthenticationError, work)
            same((problem.status_code, problem.code, problem.type), (401, "unauthorized", "authentication_error"))


@case("models", OPENAI_MODEL="openai/gpt-4o:free")
def _(proxy):
    client = proxy.client()
    same([model.id for model in client.models.list()], ["openai/gpt-4o:free"])
    same(client.models.retrieve("openai/gpt-4o:free").id, "openai/gpt-4o:free")
    expect(openai.NotFoundError, lambda: client.models.retrieve("other"))


@case("a request that is none")
def _(proxy):
    client = proxy.client()
    problem = expect(openai.UnprocessableEntityError, lambda: client.chat.completions.create(model="m", messages=[]))
    same((problem.code, problem.param), ("invalid_request", "messages"))
    assert problem.request_id


@case("Idempotency-Key")
def _(proxy):
    client = proxy.client()
    again = {"extra_headers": {"Idempotency-Key": "order-1"}}
    same(ask(client, "Once?", **again), ask(client, "Once?", **again))
    same(len(proxy.history()), 1)
    expect(openai.UnprocessableEntityError, lambda: ask(client, "Something else?", **again))


@case("rate limit of the server's own", RATE_LIMIT_PER_MINUTE="2")
def _(proxy):
    client = proxy.client()
    ask(client, "One?"), ask(client, "Two?")
    problem = expect(openai.RateLimitError, lambda: ask(client, "Three?"))
    same((problem.code, problem.response.headers["x-ratelimit-remaining-requests"]), ("rate_limited", "0"))
    assert 1 <= int(problem.response.headers["retry-after"]) <= 30
    ask(proxy.client(api_key="secret2"), "Another key?")


# Against an upstream


@case("plain")
def _(proxy, upstream):
    raw = proxy.client().chat.completions.with_raw_response.create(
        model="m", messages=messages("Paris"), seed=7, extra_body={"next_year": {"a": [None, 1.0]}}
    )
    same(raw.parse().choices[0].message.content, "About Paris")
    same((raw.headers["x-request-id"], raw.headers["openai-processing-ms"]), ("req_upstream", "12"))
    sent = upstream.calls("Paris")[0]
    same((sent["model"], sent["seed"], sent["next_year"]), ("m", 7, {"a": [None, 1.0]}))
    pair = proxy.newest("Paris")
    same((pair["answer"], pair["model"], pair["usage"]["total_tokens"]), ("About Paris", "fake-model-1", 17))


@case("streaming")
def _(proxy, upstream):
    client = proxy.client()
    parts = list(ask(client, "Rome", stream=True))
    same(text_of(parts), "About Rome")
    assert all(part.choices for part in parts), "no usage that nobody asked for"
    same(proxy.newest("Rome")["usage"]["total_tokens"], 17)
    *_, last = ask(client, "Rome", stream=True, stream_options={"include_usage": True})
    same(last.usage.total_tokens, 17)


@case("tools, whole and streamed")
def _(proxy, upstream):
    client = proxy.client()
    said = ask(client, "tools:1", **DEMANDED).choices[0]
    same(said.finish_reason, "tool_calls")
    same([json.loads(call.function.arguments)["city"] for call in said.message.tool_calls], ["Paris", "Řím"])
    whole = proxy.newest("tools:1")["answer"]
    streamed = calls_of(ask(client, "tools:2", stream=True, **DEMANDED))
    same([json.loads(call["arguments"])["city"] for call in streamed], ["Paris", "Řím"])
    kept = proxy.newest("tools:2")
    same((kept["answer"], kept["finish_reason"]), (whole, "tool_calls"))


@case("structured output")
def _(proxy, upstream):
    said = proxy.client().chat.completions.parse(model="m", messages=messages("structured"), response_format=City)
    same(said.choices[0].message.parsed, City(city="Paris", people=2100000, river=River(name="Seine")))
    schema = upstream.calls("structured")[0]["response_format"]["json_schema"]
    same((schema["name"], schema["strict"]), ("City", True))


@case("async")
def _(proxy, upstream):
    async def run():
        async with proxy.async_client() as client:
            said = await ask(client, "Oslo")
            same(said.choices[0].message.content, "About Oslo")
            parts = [part async for part in await ask(client, "Oslo", stream=True)]
            same(text_of(parts), "About Oslo")

    asyncio.run(run())


@case("20 parallel calls")
def _(proxy, upstream):
    client = proxy.client()

    def one(number):
        if number % 2:
            return text_of(ask(client, f"number {number}", stream=True))
        return ask(client, f"number {number}").choices[0].message.content

    with ThreadPoolExecutor(20) as pool:
        same(list(pool.map(one, range(20))), [f"About number {number}" for number in range(20)])
    same(len(proxy.history()), 20)


@case("wrong key")
def _(proxy, upstream):
    expect(openai.AuthenticationError, lambda: ask(proxy.client(api_key="wrong"), "not asked"))
    same(upstream.calls("not asked"), [])


@case("429 of the upstream")
def _(proxy, upstream):
    for stream in (False, True):
        problem = expect(openai.RateLimitError, lambda: ask(proxy.client(), "429", stream=stream))
        same((problem.code, problem.type), ("upstream_rate_limited", "rate_limit_error"))
        headers = problem.response.headers
        same((headers["retry-after"], headers["x-ratelimit-remaining-requests"]), ("7", "0"))
        assert "Rate limit reached" in str(problem)


@case("429 once: the package comes again when it was told to")
def _(proxy, upstream):
    started = time.monotonic()
    said = ask(proxy.client(max_retries=1), "429_once")
    same(said.choices[0].message.content, "At last")
    assert time.monotonic() - started >= 1.0
    same(len(upstream.calls("429_once")), 2)


@case("quota exhausted: nobody comes again", UPSTREAM_RETRIES="2")
def _(proxy, upstream):
    expect(openai.RateLimitError, lambda: ask(proxy.client(max_retries=2), "quota"))
    same(len(upstream.calls("quota")), 1)


@case("500 of the upstream")
def _(proxy, upstream):
    problem = expect(openai.InternalServerError, lambda: ask(proxy.client(), "500"))
    same((problem.status_code, problem.code), (502, "upstream_error"))
    assert "The server had an error" in str(problem)


@case("500: the server's retries and the package's do not multiply", UPSTREAM_RETRIES="1")
def _(proxy, upstream):
    expect(openai.InternalServerError, lambda: ask(proxy.client(max_retries=2), "500"))
    same(len(upstream.calls("500")), 2)


@case("402 of the upstream: nobody comes again", UPSTREAM_RETRIES="2")
def _(proxy, upstream):
    problem = expect(openai.InternalServerError, lambda: ask(proxy.client(max_retries=2), "402"))
    assert "Insufficient credits" in str(problem)
    same(len(upstream.calls("402")), 1)


@case("rejected by the upstream")
def _(proxy, upstream):
    for stream in (False, True):
        problem = expect(openai.BadRequestError, lambda: ask(proxy.client(max_retries=2), "400", stream=stream))
        same((problem.status_code, problem.code), (400, "upstream_rejected"))
        assert "maximum context length" in str(problem)
    same(len(upstream.calls("400")), 2)


@case("timeout of the client: the call ends upstream too")
def _(proxy, upstream):
    expect(openai.APITimeoutError, lambda: ask(proxy.client(timeout=0.3), "slow"))
    assert upstream.left.acquire(timeout=PATIENCE)
    same(proxy.history(), [])


@case("timeout of the server", UPSTREAM_TIMEOUT_SECS="1")
def _(proxy, upstream):
    problem = expect(openai.InternalServerError, lambda: ask(proxy.client(), "slow"))
    same((problem.status_code, problem.code), (503, "upstream_timeout"))
    assert problem.response.headers["retry-after"]


@case("a stream that breaks off is an error")
def _(proxy, upstream):
    for question in ("breaks_off", "error_event"):
        stream = ask(proxy.client(), question, stream=True)
        same(next(stream).choices[0].delta.content, "Half")
        problem = expect(openai.APIError, lambda: list(stream))
        same((problem.code, problem.type), ("upstream_error", "server_error"))
        pair = proxy.newest(question)
        same((pair["answer"], pair["finish_reason"]), ("Half", "upstream_error"))


@case("comments that break the silence of a stream", STREAM_HEARTBEAT_SECS="1")
def _(proxy, upstream):
    client = proxy.client()
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(lambda: expect(openai.APIError, lambda: text_of(ask(client, "late:error", stream=True))))
        same(text_of(ask(client, "late", stream=True)), "Late")
        same(failing.result().code, "upstream_error")


@case("a stream that the client leaves")
def _(proxy, upstream):
    with ask(proxy.client(), "endless", stream=True) as stream:
        same(next(stream).choices[0].delta.content, "Half")
    assert upstream.left.acquire(timeout=PATIENCE)
    pair = proxy.newest("endless")
    same((pair["answer"], pair["finish_reason"]), ("Half", "client_gone"))


@case("a server that does not know stream_options")
def _(proxy, upstream):
    same(text_of(ask(proxy.client(), "old_server", stream=True)), "Yes")


@case("fallback models", OPENAI_FALLBACK_MODELS="first,second")
def _(proxy, upstream):
    client = proxy.client()
    said = ask(client, "busy_model")
    same((said.model, said.choices[0].message.content), ("second", "Yes"))
    same([body["model"] for body in upstream.calls("busy_model")], ["m", "first", "second"])
    same(proxy.newest("busy_model")["model"], "second")
    same(text_of(ask(client, "busy_model", stream=True)), "Yes")


@case("models")
def _(proxy, upstream):
    client = proxy.client()
    same([model.id for model in client.models.list()], ["openai/fake:free"])
    same(client.models.retrieve("openai/fake:free").owned_by, "fake")
    expect(openai.NotFoundError, lambda: client.models.retrieve("other"))


# The run

RUNNING = []


def run(binary, kind, name, work, settings):
    started = time.monotonic()
    problem = None
    upstream = Upstream() if kind == "upstream" else None
    try:
        proxy = Proxy(binary, upstream, **settings)
        RUNNING.append(proxy.process)
        try:
            work(proxy, upstream) if upstream else work(proxy)
        finally:
            proxy.stop()
            RUNNING.remove(proxy.process)
    except Exception as failure:
        problem = failure
    if upstream:
        upstream.shutdown()
        upstream.server_close()
    print(f"{'FAIL' if problem else 'ok  '}  {kind:<8}  {name} ({time.monotonic() - started:.2f} s)", flush=True)
    if problem:
        traceback.print_exception(problem)
    return problem is None


def main():
    built = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("AI_PROXY_BIN") or TARGET / "debug" / "ai-proxy"
    binary = Path(built).resolve()
    if not binary.exists():
        sys.exit(f"{binary} is not there; build it, or name it: python3 tests/openai_sdk.py BINARY")

    def give_up():
        print(f"FAIL  still running after {WATCHDOG_SECS} s", flush=True)
        for process in RUNNING:
            process.kill()
        os._exit(1)

    watchdog = threading.Timer(WATCHDOG_SECS, give_up)
    watchdog.daemon = True
    watchdog.start()
    started = time.monotonic()
    failed = sum(not run(binary, *one) for one in CASES)
    print(f"openai {openai.__version__}: {len(CASES) - failed} of {len(CASES)} cases in {time.monotonic() - started:.1f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
