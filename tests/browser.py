#!/usr/bin/env python3
"""The console and the API docs in a real browser: headless Chromium, driven by playwright (PyPI).

    python3 tests/browser.py
    python3 tests/browser.py --pictures docs     (makes the README's pictures, in two minutes)

Asks, sees a stream grow before it ends, stops one, finds the pairs in the history, searches, draws the last minutes, tries
the docs; and all the while the browser asks no other host, blocks nothing and reports no error but the refusals that are
provoked. Where Chromium is neither there ($CHROMIUM names one) nor to be had with apt-get, it says so and does nothing.
"""

import http.server
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

sys.dont_write_bytecode = True  # No __pycache__ in the tree.
from openapi import KEY, Server, enter_venv  # noqa: E402

NEEDS = ["playwright==1.65.2"]
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
MODEL = "gpt-4o-mini-2024-07-18"
QUESTION = "What is the capital of France, and what is worth seeing there?"
FIRST = "The capital of France is Paris. "
REST = [
    "It lies on the Seine and has been the capital, with short breaks, since the tenth century.\n\n",
    "Three things worth seeing:\n",
    " 1. the Louvre, the largest art museum in the world;\n",
    " 2. Notre-Dame, open again since December 2024;\n",
    " 3. <script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">, which is text here.",
]


def chromium():
    """Its path; None where it cannot be had."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    found = [path for name in names if name and (path := shutil.which(name))]
    if not found and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in ["apt-get update -qq", "apt-get install -y -qq --no-install-recommends chromium"]:
            subprocess.run(command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = [path for path in [shutil.which("chromium")] if path]
    return found[0] if found else None


class Llm(http.server.BaseHTTPRequestHandler):
    """An LLM that says the first words of a stream at once, and the others when `go_on` lets it."""

    protocol_version = "HTTP/1.1"
    go_on = threading.Event()
    rest = "".join(REST)
    pause = 0.0

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = len((FIRST + self.rest).split())
        usage = {"prompt_tokens": 14, "completion_tokens": words, "total_tokens": 14 + words}
        if "fail" in asked["messages"][-1]["content"]:
            return self.reply(400, {"error": {"message": "<b>this is against the rules</b>"}})
        time.sleep(self.pause * random.randint(1, 4))
        if not asked.get("stream"):
            message = {"role": "assistant", "content": FIRST + self.rest}
            return self.reply(200, {"model": MODEL, "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.event({"choices": [{"index": 0, "delta": {"content": FIRST}}]})
            self.go_on.wait(timeout=30)
            for word in re.findall(r"\S+\s*", self.rest):
                self.event({"choices": [{"index": 0, "delta": {"content": word}}]})
                time.sleep(self.pause / 10)
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # The server hung up, since the browser did.
        self.close_connection = True

    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def event(self, value):
        self.wfile.write(f"data: {json.dumps({'model': MODEL, **value})}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Watched:
    """A page, and everything of it that may not happen."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15000)
        self.wrong = []
        self.page.on("pageerror", lambda error: self.wrong.append(f"uncaught: {error}"))
        self.page.on("console", self.on_console)
        self.page.on("request", lambda r: r.url.startswith((url + "/", "data:", "blob:")) or self.wrong.append(f"foreign: {r.url}"))
        self.page.on("requestfailed", self.on_failed)

    def on_console(self, message):
        # A browser reports each answer of 400 and more by itself; those here are provoked.
        provoked = re.search(r"responded with a status of 40[01] ", message.text)
        if message.type in ("error", "warning") and not provoked:
            self.wrong.append(f"console: {message.text}")

    def on_failed(self, request):
        # A stream that is stopped, and the look that is under way when a page is left.
        stopped = request.url.endswith(("/api/streaming", "/metrics")) and request.failure == "net::ERR_ABORTED"
        if not stopped:
            self.wrong.append(f"blocked: {request.url} {request.failure}")

    def close(self):
        self.context.close()
        assert not self.wrong, "\n".join(self.wrong)


def console(browser, url, expect):
    watched = Watched(browser, url, viewport={"width": 1200, "height": 800}, color_scheme="light")
    page = watched.page
    page.goto(url + "/")
    expect(page.locator("#state")).to_contain_text("ready")

    # Without a key, the page loads and says in words what is missing.
    expect(page.locator("#history-note")).to_contain_text("Enter your key")
    page.click("#stream")
    expect(page.locator("#problem")).to_contain_text("Type a question first")
    page.fill("#question", QUESTION)
    page.click("#whole")
    expect(page.locator("#problem")).to_contain_text("This server wants a key")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.click("#whole")
    expect(page.locator("#problem")).to_contain_text("does not accept this key")

    # A stream grows before it ends, and says how fast.
    page.fill("#key", KEY)
    page.locator("#key").blur()
    expect(page.locator("#history-note")).to_have_text("Nothing has been asked yet.")
    page.focus("#question")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_have_text(FIRST.strip())
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#fact-first")).to_contain_text("s")
    Llm.go_on.set()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#outcome")).to_contain_text("Number 1 in the history")
    assert page.locator("#answer").text_content() == FIRST + "".join(REST)
    assert page.locator("#answer").evaluate("e => e.childElementCount") == 0, "the answer is text"
    expect(page.locator("#fact-speed")).to_contain_text("tokens/s")
    expect(page.locator("#fact-tokens")).to_contain_text("(prompt 14)")

    # The pair is in the history.
    expect(page.locator("#pairs .asked")).to_have_text([QUESTION])
    page.locator("#pairs summary").press("Enter")
    assert page.locator("#pairs .pair .text").last.text_content() == FIRST + "".join(REST)
    assert page.locator("#pairs .pair .text").last.evaluate("e => e.childElementCount") == 0, "the answer is text"

    # A whole answer; a refusal; a stream that is stopped and kept as far as it came.
    page.fill("#question", "Name three rivers of Europe.")
    page.click("#whole")
    expect(page.locator("#outcome")).to_contain_text("Number 2 in the history")
    page.fill("#question", "please fail")
    page.click("#stream")
    expect(page.locator("#problem")).to_contain_text("The LLM refused this question")
    expect(page.locator("#problem")).to_contain_text("<b>this is against the rules</b>")
    Llm.go_on.clear()
    page.fill("#question", "Stop me.")
    page.click("#stream")
    expect(page.locator("#answer")).to_have_text(FIRST.strip())
    page.keyboard.press("Escape")
    expect(page.locator("#outcome")).to_contain_text("Stopped.")
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#pairs .meta").first).to_contain_text("client_gone")
    Llm.go_on.set()

    # Search, and the way back.
    page.fill("#search", "rivers")
    expect(page.locator("#pairs .asked")).to_have_text(["Name three rivers of Europe."])
    page.fill("#search", "hippopotamus")
    expect(page.locator("#history-note")).to_have_text("Nothing found.")
    page.fill("#search", "")
    expect(page.locator("#pairs .asked")).to_have_count(3)

    # More than a page.
    for number in range(14):
        page.fill("#question", f"And number {number}?")
        page.click("#whole")
        expect(page.locator("#outcome")).to_contain_text(f"Number {4 + number} in")
    expect(page.locator("#pairs li")).to_have_count(15)
    page.click("#older")
    expect(page.locator("#pairs li")).to_have_count(17)
    expect(page.locator("#older")).to_be_hidden()

    # The last minutes are drawn.
    for chart in ["requests", "errors", "latency"]:
        expect(page.locator(f"#chart-{chart} :is(path, circle)").first).to_be_attached()
    expect(page.locator("#chart-latency .legend")).to_contain_text(re.compile(r"p50 .*\d"))
    expect(page.locator("#figures")).to_contain_text("MiB")

    # The key is kept in this tab's session and nowhere else.
    kept = page.evaluate("[sessionStorage.getItem('key'), localStorage.length, document.cookie]")
    assert kept == [KEY, 0, ""], kept
    page.reload()
    expect(page.locator("#pairs li")).to_have_count(15)
    assert page.title() == "AI Proxy console", "no answer ran"
    watched.close()


def phone(browser, url, expect):
    watched = Watched(browser, url, viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True, is_mobile=True)
    page = watched.page
    page.goto(url + "/")
    page.fill("#key", KEY)
    page.fill("#question", "Does it fit?")
    page.tap("#stream")
    expect(page.locator("#outcome")).to_contain_text("in the history")
    page.locator("#pairs summary").first.tap()
    expect(page.locator("#pairs .pair")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing sticks out"
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", paper)[:3])) < 150, f"it is dark: {paper}"
    for field in page.locator("input, textarea, button").all():
        assert field.evaluate("e => e.labels?.length || e.innerText || e.hidden"), "every field has a name"
    watched.close()


def docs(browser, url, expect):
    watched = Watched(browser, url, viewport={"width": 1200, "height": 900}, color_scheme="light")
    page = watched.page
    page.goto(url + "/docs")
    expect(page.locator(".opblock")).to_have_count(12)

    def execute(operation):
        block = page.locator(f".opblock[id$='-{operation}']")
        if not block.locator(".execute").count():
            block.locator(".opblock-summary-control").click()
        block.locator(".execute").click()
        block.locator(".loading-container").wait_for(state="detached")
        return block.locator(".live-responses-table tbody")

    expect(execute("ask")).to_contain_text("no key given")
    page.click(".auth-wrapper .authorize")
    page.fill(".auth-container input", KEY)
    page.click(".auth-btn-wrapper .authorize")
    page.click(".btn-done")
    expect(execute("ask")).to_contain_text("The capital of France is Paris.")
    expect(execute("streaming")).to_contain_text("[DONE]")
    expect(execute("history")).to_contain_text("next_before")
    expect(execute("readyz")).to_contain_text("workers_total")
    page.locator(".models-control").first.click()
    expect(page.locator(".models")).to_contain_text("ChatRequest")
    watched.close()


def pictures(browser, url, expect, folder):
    """The pictures of the README: the console in the middle of a stream after two minutes of traffic, and the docs."""
    Llm.rest = "".join(REST[:-1])
    Llm.pause = 0.25
    Llm.go_on.clear()
    questions = ["Name three rivers of Europe.", "What does HTTP 429 mean?", "How many legs has a spider?", "please fail"]
    questions += ["Translate “good morning” into French.", "Who wrote Moby-Dick?", "What is 17 times 23?"]

    def ask(question):
        body = json.dumps({"question": question}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/api/ask", body, headers)).read()
        except urllib.error.HTTPError:
            pass  # A question that fails, for the chart of errors.

    watched = Watched(browser, url, viewport={"width": 1100, "height": 940}, color_scheme="light")
    page = watched.page
    page.goto(url + "/")
    page.fill("#key", KEY)
    page.locator("#key").blur()
    began = time.monotonic()
    while (passed := time.monotonic() - began) < 120:
        for question in random.sample(questions, 1 + int(passed / 20) % 4):
            threading.Thread(target=ask, args=[question]).start()
        page.wait_for_timeout(700)
    page.locator("#search").dispatch_event("input")
    page.fill("#question", QUESTION)
    page.click("#stream")
    expect(page.locator("#answer")).to_have_text(FIRST.strip())
    Llm.go_on.set()
    expect(page.locator("#answer")).to_contain_text("Louvre")
    page.screenshot(path=folder / "console.png", full_page=True)
    expect(page.locator("#stop")).to_be_hidden()
    watched.close()

    watched = Watched(browser, url, viewport={"width": 1100, "height": 940}, color_scheme="light")
    watched.page.goto(url + "/docs")
    expect(watched.page.locator(".opblock")).to_have_count(12)
    watched.page.screenshot(path=folder / "docs.png")
    watched.close()


def main():
    binary = chromium()
    if binary is None:
        print("SKIPPED: there is no Chromium here, and apt-get cannot install it; set CHROMIUM to the path of one")
        return
    enter_venv("venv-browser", NEEDS)
    from playwright.sync_api import expect, sync_playwright

    folder_for_pictures = pathlib.Path(sys.argv[2]).absolute() if sys.argv[1:2] == ["--pictures"] else None
    llm = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Llm)
    threading.Thread(target=llm.serve_forever, daemon=True).start()
    upstream = {"OPENAI_API_KEY": "test", "OPENAI_BASE_URL": f"http://127.0.0.1:{llm.server_port}/v1", "UPSTREAM_RETRIES": "0"}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, **upstream)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=binary, headless=True, args=FLAGS.split())
                if folder_for_pictures:
                    pictures(browser, server.url, expect, folder_for_pictures)
                else:
                    for part in [console, phone, docs]:
                        part(browser, server.url, expect)
                        print(f"{part.__name__}: ok", flush=True)
                browser.close()
        finally:
            wrong = server.stop()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
