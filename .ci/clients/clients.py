"""Clients that are not ours against the server: the openai package, curl, and the chat page in headless Chromium.

usage: clients.py ANYFORMER FOLDER    (the binary; a model folder on bytes)
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import openai
import websocket

KEY = "key-of-the-test"


def start(binary, folder, place, *words):
    keys = place / "keys"
    keys.write_text(KEY + "\n")
    command = [binary, "serve", folder, "--port=0", "--json", "--name=tiny", f"--api-keys={keys}", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = ""
    while not said.endswith("}\n"):
        line = server.stdout.readline()
        assert line, f"the server ended: {said}"
        said += line
    return server, json.loads(said)["url"]


def metric(url, name):
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return float(lines[0].split()[-1]) if lines else 0.0


def wait(what, holds, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} came")


def with_openai(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "Hello"}]
    ask = dict(model="tiny", messages=messages, max_tokens=16, seed=3)
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 16 and len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage.completion_tokens == 16

    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == choice.message.content, (text, choice.message.content)
    assert pieces[-1].usage.total_tokens == answer.usage.total_tokens

    done = client.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=8, temperature=0, logprobs=1)
    assert [one.index for one in done.choices] == [0, 1] and len(done.choices[0].logprobs.tokens) == 8

    biased = client.chat.completions.create(**ask, logit_bias={"65": 100}, presence_penalty=0.5, frequency_penalty=0.5)
    assert biased.choices[0].message.content == "A" * 16, biased

    # A stream that is closed is not worked for.
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1000000, stream=True)
    next(iter(stream))
    wait("it runs", lambda: metric(url, "anyformer_running") == 1)
    stream.close()
    wait("it is cancelled", lambda: metric(url, "anyformer_running") == 0)
    assert metric(url, 'anyformer_finished_total{reason="cancelled"}') >= 1

    bad = raises(openai.BadRequestError, lambda: client.chat.completions.create(**ask | {"temperature": -1}))
    assert "temperature" in bad.message and bad.type == "invalid_request_error"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bad = raises(openai.BadRequestError, lambda: client.chat.completions.create(**ask, tools=tools))
    assert bad.code == "unsupported_parameter" and bad.param == "tools"
    assert raises(openai.NotFoundError, lambda: client.chat.completions.create(**ask | {"model": "x"})).code == "model_not_found"
    # A stream that cannot begin is an error of its own kind, no stream of one error.
    gone = lambda: client.chat.completions.create(**ask, stream=True, extra_body={"state": "none"})
    assert raises(openai.NotFoundError, gone).code == "state_not_found"
    assert raises(openai.BadRequestError, lambda: client.embeddings.create(model="tiny", input="x")).param == "model"
    other = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
    assert raises(openai.AuthenticationError, other.models.list).code == "invalid_api_key"

    # Two run, two wait, the others are refused, and the client knows why.
    def one(outcomes):
        try:
            client.completions.create(model="tiny", prompt="x", max_tokens=1500, temperature=0)
            outcomes.append("answered")
        except openai.RateLimitError as error:
            outcomes.append(error.code)

    outcomes = []
    threads = [threading.Thread(target=one, args=(outcomes,)) for _ in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(outcomes) == {"answered", "rate_limit_exceeded"} and len(outcomes) == 12, outcomes


def with_curl(url):
    def curl(*words):
        done = subprocess.run(["curl", "-sS", "--max-time", "30", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bearer, kind = ["-H", f"Authorization: Bearer {KEY}"], ["-H", "Content-Type: application/json"]
    body = json.dumps({"prompt": "To be", "max_tokens": 5, "stream": True, "temperature": 0})
    text = curl("-N", *bearer, *kind, "-d", body, url + "/v1/completions")
    assert text.startswith("data: {") and text.rstrip().endswith("data: [DONE]"), text
    made = json.loads(curl(*bearer, *kind, "-d", json.dumps({"name": "base", "prompt": "To be"}), url + "/v1/states"))
    assert made["tokens"] == 5, made
    assert json.loads(curl(*bearer, url + "/v1/states"))["data"][0]["name"] == "base"
    assert json.loads(curl(*bearer, "-X", "DELETE", url + "/v1/states/base"))["deleted"]
    form = json.loads(curl(*bearer, "-d", "prompt=x", url + "/v1/completions"))
    assert "application/json" in form["error"]["message"]
    big = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *bearer, *kind, "--data-binary", "@-", url + "/v1/completions"],
        input=b" " * (100 << 20), capture_output=True)
    assert big.stdout == b"413", big
    assert curl(url + "/health") == "ok\n"


def with_tls(binary, folder, place):
    chain, private = place / "chain.pem", place / "private.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", private, "-out", chain],
        check=True, stderr=subprocess.DEVNULL)
    server, url = start(binary, folder, place, f"--tls-cert={chain}", f"--tls-key={private}")
    try:
        assert url.startswith("https://")
        got = subprocess.run(["curl", "-sS", "--cacert", chain, url + "/health"], capture_output=True, text=True)
        assert got.stdout == "ok\n", got
        plain = subprocess.run(["curl", "-s", url.replace("https", "http") + "/health"], capture_output=True)
        assert plain.returncode != 0
    finally:
        server.kill()


class Page:
    """One tab of headless Chromium, over its debugging protocol."""

    def __init__(self, place):
        self.chromium = subprocess.Popen(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", f"--user-data-dir={place / 'profile'}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = place / "profile" / "DevToolsActivePort"
        wait("the browser starts", lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2)
        port = port_file.read_text().splitlines()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        tab = next(tab for tab in tabs if tab["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], suppress_origin=True, timeout=30)
        self.number = 0
        self.asked = []
        self.wrong = []
        for domain in ["Page", "Runtime", "Network", "Log"]:
            self.call(domain + ".enable")

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("method") == "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                entry = said["params"].get("entry", {"level": "error"})
                if entry["level"] == "error":
                    self.wrong.append(said["params"])
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]

    def js(self, code):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self):
        self.socket.close()
        self.chromium.terminate()
        self.chromium.wait()


def with_page(url, place):
    page = Page(place)
    try:
        page.call("Page.navigate", url=url + "/ui")
        wait("the key is asked for", lambda: "API key" in (page.js("document.getElementById('status')?.textContent") or ""))
        refused = len(page.wrong)
        page.js(f"const key = document.getElementById('key'); key.value = '{KEY}'; key.dispatchEvent(new Event('change'))")
        wait("the model is named", lambda: page.js("document.getElementById('model').textContent") == "tiny")

        def bubbles():
            return page.js("[...document.querySelectorAll('.message')].map((box) => box.textContent)")

        def send(words, tokens):
            page.js(f"document.getElementById('tokens').value = {tokens}")
            page.js(f"document.getElementById('text').value = {json.dumps(words)}")
            page.js("document.getElementById('send').click()")

        def idle():
            return page.js("document.getElementById('stop').hidden")

        # Send: the question and the answer stand there, as text and not as HTML.
        send("Hello <b>there</b>", 30)
        wait("an answer", lambda: len(bubbles()) == 2 and idle())
        assert bubbles()[0] == "Hello <b>there</b>"
        assert "30 tokens" in page.js("document.getElementById('status').textContent")

        # Stream and stop: it grows, then it stands still and the server works no more.
        send("Go on", 1000000)
        wait("it grows", lambda: len(bubbles()) == 4 and len(bubbles()[3]) > 20)
        early = len(bubbles()[3])
        wait("it grows further", lambda: len(bubbles()[3]) > early)
        page.js("document.getElementById('stop').click()")
        wait("it stops", idle)
        wait("the server stops too", lambda: metric(url, "anyformer_running") == 0)
        status = page.js("document.getElementById('status').textContent")
        assert status == "stopped", status

        # Reload: the conversation is still there; a new one is empty.
        before = bubbles()
        page.call("Page.reload")
        wait("it is there again", lambda: page.js("document.readyState") == "complete" and bubbles() == before)
        page.js("document.getElementById('clear').click()")
        page.call("Page.reload")
        wait("it is empty", lambda: page.js("document.readyState") == "complete" and bubbles() == [])
        assert page.asked and all(one.startswith((url + "/", "data:")) for one in page.asked), page.asked
        assert len(page.wrong) == refused, page.wrong
    finally:
        page.close()


def main():
    binary, folder = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        server, url = start(binary, folder, place, "--batch=2", "--queue=2", "--drain=5", "--max-tokens=1000000", "--context=2000000")
        try:
            for name, suite in [("openai", with_openai), ("curl", with_curl)]:
                suite(url)
                print(f"{name}: ok")
            with_tls(binary, folder, place)
            print("tls: ok")
            with_page(url, place)
            print("page: ok")
            server.terminate()
            assert server.wait(timeout=20) == 0
        finally:
            server.kill()


main()
