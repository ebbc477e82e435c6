"""What a server refuses before it allocates, how long it waits, and what is left when clients vanish."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from running import pure_model, served

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Gated:
    """Wraps a model: passes wait until it is opened."""

    def __init__(self):
        self._model = pure_model()
        self.config, self.new_cache = self._model.config, self._model.new_cache
        self.is_open, self.arrived = threading.Event(), threading.Event()

    def forward(self, ids, step, rows):
        self.arrived.set()
        assert self.is_open.wait(30)
        return self._model.forward(ids, step, rows)


def answer_of(port, data, timeout=10):
    """What a connection answers to raw bytes, until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# ---- keys


def test_a_key_is_needed_by_all_routes_but_health():
    with served(api_keys=["secret", "other"]) as running, httpx.Client(base_url=running.url) as client:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic secret"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/chat/completions", "/tokenize"):
                answer = client.post(path, json=CHAT, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/health").status_code == 200
        for key in ("secret", "other"):
            answer = client.post(
                "/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code == 200


def test_tenants_of_different_keys_find_nothing_of_each_other():
    with served(api_keys=["one", "two"]) as running, httpx.Client(base_url=running.url) as client:
        cached = []
        for key in ("one", "two", "one", "two"):
            answer = client.post(
                "/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"}
            )
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[:2] == [0, 0] and all(cached[2:])


def test_a_salt_is_no_key_and_no_key_is_a_salt():
    with served() as running:
        salt = running.service.salt
        salts = {
            salt(b"", None),
            salt(b"", ""),
            salt(b"a", None),
            salt(b"", "a"),
            salt(b"a", "b"),
            salt(b"ab", ""),
        }
        assert len(salts) == 6 and all(len(one) == 32 for one in salts)
    with served() as running:
        assert running.service.salt(b"", None) not in salts


# ---- sizes and times


def test_a_body_that_is_too_large_is_refused_before_it_is_read():
    with served() as running:
        answer = answer_of(running.port, HEAD + b"Content-Length: 5000000\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413") and b"4194304" in answer
        answer = answer_of(running.port, HEAD + b"Content-Length: " + b"9" * 15 + b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_chunked_body_is_counted_as_it_comes():
    with served() as running, socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(64):
                connection.sendall(chunk)
            while connection.recv(65536):
                pass
            raise OSError("closed")


def test_headers_that_are_too_large_are_refused():
    with served() as running:
        answer = answer_of(running.port, HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or answer == b""


@pytest.mark.parametrize("begun", [b"", b"POST /v1", HEAD], ids=["nothing", "a line", "headers"])
def test_a_client_that_never_ends_its_headers_is_left(begun):
    with served(max_seconds=0.3) as running:
        begin = time.monotonic()
        answer_of(running.port, begun)
        assert 0.2 < time.monotonic() - begin < 5


def test_a_client_that_never_ends_its_body_is_left():
    with served(max_seconds=0.3) as running:
        answer = answer_of(running.port, HEAD + b'Content-Length: 50\r\n\r\n{"prompt"')
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_later_request_of_a_connection_has_the_same_time():
    with served(max_seconds=0.5) as running, socket.socket() as connection:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        connection.sendall(b"GET /hea")
        assert connection.recv(65536) == b"" and 0.3 < time.monotonic() - begin < 3


def test_an_answer_may_take_longer_than_headers_and_body_may():
    model = Gated()
    with served(model, max_seconds=0.3) as running:
        threading.Timer(1.0, model.is_open.set).start()
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /x HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    ],
)
def test_what_is_no_http_is_refused_and_stops_nothing(data):
    with served(max_seconds=0.5) as running:
        answer = answer_of(running.port, data)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501"))
        assert httpx.get(f"{running.url}/health").status_code == 200


# ---- the queue and the time


def test_a_full_queue_is_429_and_says_when_to_come_again():
    model = Gated()
    with served(model, max_waiting=2) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        threads = [
            threading.Thread(
                target=httpx.post,
                args=(f"{running.url}/v1/chat/completions",),
                kwargs={"json": CHAT, "timeout": 30},
            )
            for _ in range(3)
        ]
        threads[0].start()
        assert model.arrived.wait(10)
        for thread in threads[1:]:
            thread.start()
        engine = running.service.engine
        wait_for(lambda: engine.num_waiting == 2)
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        model.is_open.set()
        for thread in threads:
            thread.join()
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_request_that_takes_too_long_is_504():
    model = Gated()
    with served(model, timeout=0.3) as running:
        threading.Timer(0.6, model.is_open.set).start()
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, timeout=30)
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "timeout_error"


def test_a_model_that_fails_shows_nothing_of_it():
    class Failing(Gated):
        def forward(self, ids, step, rows):
            raise ValueError("a secret path")

    with served(Failing()) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert answer.status_code == 500 and "secret" not in answer.text
            assert answer.json()["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 200


# ---- clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_the_first_token_cancels(stream):
    model = Gated()
    with served(model) as running:
        body = json.dumps({"prompt": "x", "max_tokens": 2000, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert model.arrived.wait(10)
        engine = running.service.engine
        time.sleep(0.1)
        model.is_open.set()
        wait_for(lambda: engine.counters.finished["cancelled"] == 1)
        assert engine.counters.num_new_tokens < 100


async def vanishing_streams(port, count, body):
    """So many streams at once; half the clients go away after some tokens.  How many ended whole."""
    data = json.dumps(body).encode()
    request = HEAD + f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    num_whole = 0

    async def stream(i):
        nonlocal num_whole
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        received = b""
        while part := await reader.read(65536):
            received += part
            if i % 2 and received.count(b"data: ") > i % 13:
                writer.transport.abort()
                return
        num_whole += b"[DONE]" in received
        writer.close()

    await asyncio.gather(*(stream(i) for i in range(count)))
    return num_whole


def test_streams_whose_clients_vanish_leave_nothing_behind():
    """1,000 at once in `make test-long`'s campaign; here fewer."""
    import os

    count = int(os.environ.get("PAGED_KV_NUM_STREAMS", 100))
    num_files, num_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    options = {"num_pages": 8 * count, "max_sequences": 256, "max_waiting": 2 * count}
    with served(**options) as running:
        body = {"prompt": "Hello", "max_tokens": 40, "stream": True, "ignore_eos": True, "seed": 1}
        num_whole = asyncio.run(vanishing_streams(running.port, count, body))
        engine = running.service.engine
        wait_for(lambda: engine.num_running == engine.num_waiting == 0, 60)
        assert num_whole == count // 2
        finished = engine.counters.finished
        assert sum(finished.values()) == count and finished["error"] == 0
        running.service.engine.cache.check()
    wait_for(lambda: threading.active_count() <= num_threads + 8)  # worker threads of event loops end late
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= num_files)
