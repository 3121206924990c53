#!/usr/bin/env python3
"""The server against its own OpenAPI document.

    python3 tests/openapi.py

Every example in the document fits its schema; schemathesis (PyPI), with all its checks, asks a server in mock mode that
was built from this tree and finds nothing; Prometheus' own parser reads its /metrics; and all the while the server logs no error and answers no 500. Takes a minute
or two. Makes itself a virtual environment under ${CARGO_TARGET_DIR:-target}. EXAMPLES (per operation) and SEED can be set.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
NEEDS = ["schemathesis==4.32.5", "jsonschema-rs", "prometheus-client"]
KEY = "secret1"

# What schemathesis takes for a refusal, beyond its own list: a body that is too large is one. What it does not: a 5xx.
# A field of the query that nobody knows is passed over, as everywhere.
CONFIG = """
generation.allow-extra-parameters = false
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "404", "405", "413", "415", "422"]
[checks.positive_data_acceptance]
expected-statuses = ["200", "404"]
"""


def enter_venv(name, needs):
    """Goes on in a virtual environment of that name, which is made where it is not there or not as it should be."""
    venv = TARGET / name
    if pathlib.Path(sys.prefix) == venv:
        return
    python = venv / "bin" / "python"
    made_of = venv / "made-of.txt"
    if not made_of.is_file() or made_of.read_text() != "\n".join(needs):
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *needs], check=True)
        made_of.write_text("\n".join(needs))
    os.execv(python, [str(python), *sys.argv])


class Server:
    """The program that this tree makes, on a free port, with a database and a log of its own in `folder`."""

    def __init__(self, folder, **settings):
        subprocess.run(["cargo", "build", "--quiet", "--bin", "ai-proxy"], cwd=ROOT, check=True)
        settings |= {"PORT": "0", "API_KEYS": f"tester:{KEY}", "DATABASE_PATH": f"{folder}/history.db"}
        program = TARGET / "debug" / "ai-proxy"
        self.process = subprocess.Popen([program], cwd=folder, env=settings, stdout=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stdout:
            self.log.append(line)
            if "listening on http://" in line:
                self.url = line.split("listening on ")[1].strip()
                break
        else:
            sys.exit(f"the server did not start: {self.log}")
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stdout))
        self.reader.start()

    def stop(self):
        """Ends it in good order; returns what in its log should not be there."""
        self.process.terminate()
        code = self.process.wait(timeout=30)
        self.reader.join()
        wrong = [line.strip() for line in self.log if "[ERROR]" in line or " status=500 " in line]
        return wrong + ([f"the server ended with exit code {code}"] if code else [])


def misfits(document):
    """Every example that does not fit the schema beside it, as text."""
    import jsonschema_rs

    found = []

    def check(place, schema, value):
        # References are relative to the document, so the document holds the schema.
        fit = jsonschema_rs.Draft202012Validator({"components": document["components"], "allOf": [schema]})
        found.extend(f"{place}: {error.message}" for error in fit.iter_errors(value))

    def walk(place, node):
        if isinstance(node, list):
            for index, inner in enumerate(node):
                walk(f"{place}/{index}", inner)
        elif isinstance(node, dict):
            # A stream's schema is that of one event.
            if "schema" in node and not place.endswith("text/event-stream"):
                if "example" in node:
                    check(place, node["schema"], node["example"])
                for name, example in node.get("examples", {}).items():
                    check(f"{place}: {name}", node["schema"], example["value"])
            for name, inner in node.items():
                walk(f"{place}/{name}", inner)

    walk("", document)
    return found


def metrics_misread(text):
    """What Prometheus' own parser does not find in the text of /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    answered = sum(sample.value for sample in families["ai_proxy_requests"].samples)
    wrong = [] if answered > 0 else ["/metrics counts no requests"]
    for name, family in families.items():
        if not family.documentation or family.type == "unknown":
            wrong.append(f"/metrics does not describe {name}")
    for name in ["ai_proxy_request_duration_seconds", "ai_proxy_time_to_first_token_seconds", "ai_proxy_history_batch_size"]:
        if families[name].type != "histogram":
            wrong.append(f"/metrics: {name} is no histogram")
    return wrong


def main():
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, MOCK_DELAY_MS="0", HISTORY_SYNC="normal")
        try:
            document = json.load(urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10))
            wrong = misfits(document)
            config = pathlib.Path(folder) / "schemathesis.toml"
            config.write_text(CONFIG)
            program = pathlib.Path(sys.prefix) / "bin" / "schemathesis"
            command = [program, "--config-file", config, "run", f"{server.url}/openapi.json"]
            command += ["--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--no-color", "--warnings", "off"]
            command += ["--max-examples", os.environ.get("EXAMPLES", "100"), "--seed", os.environ.get("SEED", "1")]
            command += ["--url", server.url, "--generation-database", "none", "--output-sanitize", "false"]
            hooks = {"SCHEMATHESIS_HOOKS": "openapi", "PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1"}
            if subprocess.run(command, cwd=folder, env=os.environ | hooks).returncode:
                wrong.append("schemathesis has findings")
            wrong += metrics_misread(urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode())
        finally:
            wrong_in_log = server.stop()
    for line in wrong + wrong_in_log:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong or wrong_in_log else 0)


if __name__ == "__main__":
    enter_venv("venv-openapi", NEEDS)
    main()
elif "SCHEMATHESIS_HOOKS" in os.environ:
    import schemathesis

    @schemathesis.hook
    def filter_case(context, case):
        """Not the key of a stream, which is not looked at."""
        return not (isinstance(case.body, dict) and case.body.get("stream") and "Idempotency-Key" in (case.headers or {}))

    @schemathesis.hook
    def before_call(context, case, **_):
        """Requests differ, so that a key for one that was used before would rightly be refused: each gets a new one."""
        fit = case.meta is None or case.meta.generation.mode.is_positive
        if fit and "Idempotency-Key" in (case.headers or {}):
            case.headers["Idempotency-Key"] = str(uuid.uuid4())
