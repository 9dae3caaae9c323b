"""A server of ours as a process, and requests to it: what the measuring scripts share."""

import contextlib
import http.client
import json
import socket
import subprocess
import time


@contextlib.contextmanager
def serve(binary, folder, threads, *words):
    """The port of a server that is ready; it is ended on the way out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [binary, "serve", str(folder), "--port", str(port), "--threads", str(threads), *words]
    server = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"the server of {folder} ended")
            try:
                if request(port, "GET", "/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def request(port, method, path, body=None):
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def first_token(port, body):
    """Seconds until the first piece of a streamed answer, and until its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first = None
    while line := answer.readline():
        if first is None and line.startswith(b"data: ") and b'"text"' in line:
            first = time.perf_counter() - began
    return first, time.perf_counter() - began
