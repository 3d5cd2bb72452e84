"""What an operator sees: health, metrics, logs, keys, limits, full queues, time-outs, and the end."""

import json
import logging
import re
import threading

import httpx
import openai
import pytest

from activation_beacon.cli.serve import LOOPBACK, _allowed_hosts
from activation_beacon.errors import InputError
from activation_beacon.server.logs import JsonFormatter
from activation_beacon.server.settings import Settings
from server_live import BOOK, MODEL, live, live_model, wait_until

SECRET = "the-answer-is-a-secret"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}


@pytest.fixture(scope="module")
def model():
    return live_model()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "contexts"


def metrics_of(server) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_health_and_metrics(model, folder):
    with live(folder, model=model) as server:
        assert server.http.get("/health").json() == {"status": "ok", "model": MODEL}
        context = server.create()
        reply = server.ask("Who?", context=context["id"], max_tokens=40)  # more than a chunk: some tokens close one
        wait_until(lambda: metrics_of(server)["beacon_rows"] == 0)  # a row is dropped after its answer is handed out
        values = metrics_of(server)
        assert values["beacon_tokens_read_total"] >= context["tokens"]
        assert values["beacon_tokens_spared_total"] == context["tokens"]
        assert values["beacon_tokens_written_total"] == reply.usage.completion_tokens == 40
        assert (
            0 < values["beacon_step_seconds_count"] < 39
        )  # the first token comes of reading, and so does one that closes a chunk
        assert values['beacon_requests_total{route="/v1/contexts",status="201"}'] == 1
        assert values["beacon_memory_bytes"] > 0
        assert values["beacon_waiting"] == 0
        server.server.engine.stop()
        assert server.http.get("/health").status_code == 503


def test_the_log_has_numbers_and_no_texts(model, folder, caplog):
    with caplog.at_level(logging.DEBUG), live(folder, model=model) as server:
        context = server.create(f"{BOOK} {SECRET}", name="a private name")
        server.http.post("/v1/chat/completions", json={**BODY, "context": context["id"]})
        server.http.post("/v1/chat/completions", json={**BODY, "stream": True})
        server.http.post("/v1/chat/completions", json={**BODY, "temperature": SECRET})
    ours = [record for record in caplog.records if record.name.startswith("activation_beacon")]
    lines = [json.loads(JsonFormatter().format(record)) for record in ours if record.name.endswith("requests")]
    assert [line["status"] for line in lines] == [201, 200, 200, 400]
    assert lines[1]["context"] == context["id"]
    assert lines[1]["completion_tokens"] == lines[2]["completion_tokens"] == 3
    assert lines[1]["route"] == "/v1/chat/completions"
    everything = " ".join(JsonFormatter().format(record) for record in ours)
    assert SECRET not in everything
    assert "lion" not in everything
    assert "private" not in everything


def test_a_log_line_is_one_json_object():
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "went %s\nwrong", ("all",), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "went all\nwrong"
    assert "\n" not in JsonFormatter().format(record)


def test_a_key_is_asked_for_everywhere_but_at_the_page_and_health(model, folder):
    with live(folder, model=model, api_key="sesame") as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.ask("Who?")
        assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/v1/contexts", "/metrics", "/openapi.json"):
            assert server.http.get(path).status_code == 401
            assert server.http.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert server.http.get(path, headers={"authorization": "sesame"}).status_code == 401
            for scheme in ("Bearer", "bearer"):
                assert server.http.get(path, headers={"authorization": f"{scheme} sesame"}).status_code == 200
        assert server.http.get("/").status_code == server.http.get("/health").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame") as client:
            assert client.models.list().data


def test_pages_of_other_origins_are_refused_unless_allowed(model, folder):
    here, other = {"origin": "http://here"}, {"origin": "https://other.example"}
    with live(folder, model=model) as server:
        reply = server.http.post("/v1/contexts", headers=other, files={"file": ("a.txt", b"words")})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert server.http.get("/v1/models", headers={"origin": server.url}).status_code == 200
        assert server.http.get("/v1/models", headers={**here, "host": "here"}).status_code == 200
        assert "access-control-allow-origin" not in server.http.get("/v1/models").headers
    with live(folder, model=model, cors_origins=("https://other.example",)) as server:
        reply = server.http.get("/v1/models", headers=other)
        assert reply.headers["access-control-allow-origin"] == "https://other.example"
        preflight = {**other, "access-control-request-method": "POST"}
        assert server.http.options("/v1/contexts", headers=preflight).status_code == 200
        assert server.http.get("/v1/models", headers={"origin": "https://third.example"}).status_code == 403
        assert server.http.get("/v1/models", headers={"origin": "http://[x"}).status_code == 403


def test_all_origins_may_call_where_the_operator_says_so(model, folder):
    with live(folder, model=model, cors_origins=("*",)) as server:
        for origin in ("https://other.example", "null", "http://[x"):
            preflight = {"origin": origin, "access-control-request-method": "POST"}
            assert server.http.options("/v1/contexts", headers=preflight).status_code == 200
            reply = server.http.get("/v1/models", headers={"origin": origin})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://Other.Example/", "https://other.example"),
        ("https://other.example:443", "https://other.example"),
        ("HTTP://[::1]:3000/", "http://[::1]:3000"),
        ("null", "null"),
    ],
)
def test_origins_are_written_as_one_likes(model, folder, given, sent):
    with live(folder, model=model, cors_origins=(given,)) as server:
        reply = server.http.get("/v1/models", headers={"origin": sent})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, sent)


@pytest.mark.parametrize(
    "origin", ["other.example", "https://", "https://other.example/app", "http://[x", "http://x:99999"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin):
    with pytest.raises(InputError, match=re.escape("An origin is scheme://host or scheme://host:port, such as")):
        Settings(cors_origins=(origin,))


@pytest.mark.parametrize(
    ("given", "called"), [("Beacon.Example", "beacon.example"), ("[::1]", "[::1]:8000"), ("FE80::1", "[fe80::1]")]
)
def test_host_names_are_written_as_one_likes(model, folder, given, called):
    with live(folder, model=model, allowed_hosts=(given,)) as server:
        assert server.http.get("/v1/models", headers={"host": called}).status_code == 200
        assert server.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert Settings(allowed_hosts=(given, "*")).allowed_hosts == ()


def test_a_server_may_be_called_by_its_own_names_only(model, folder):
    with live(folder, model=model, allowed_hosts=("127.0.0.1", "localhost", "::1")) as server:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
            assert server.http.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[evil"):
            reply = server.http.delete("/v1/contexts/x", headers={"host": host, "origin": f"http://{host}"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("host", "api_key", "named", "allowed"),
    [
        ("127.0.0.1", None, [], LOOPBACK),
        ("127.0.0.1", None, ["box.example"], (*LOOPBACK, "box.example")),
        ("127.0.0.1", None, ["*"], ()),
        ("127.0.0.1", "key", [], ()),
        ("0.0.0.0", None, [], ()),
        ("0.0.0.0", None, ["box.example"], (*LOOPBACK, "box.example")),
    ],
)
def test_names_are_asked_for_where_only_they_tell_a_page_from_the_user(host, api_key, named, allowed):
    assert _allowed_hosts(host, api_key, named) == allowed


def test_large_bodies_are_refused_however_they_come(model, folder):
    with live(folder, model=model, max_body_bytes=2000) as server:
        long = json.dumps({"text": "x" * 3000}).encode()
        headers = {"content-type": "application/json"}
        pieces = (long[start : start + 100] for start in range(0, len(long), 100))
        for content in (long, pieces):
            reply = server.http.post("/v1/contexts", content=content, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        reply = server.http.post("/v1/chat/completions", content=(b"x" * 300 for _ in range(20)), headers=headers)
        assert reply.status_code == 413
        assert server.http.post("/v1/contexts", json={"text": "x" * 500}).status_code == 201


def test_a_full_queue_says_when_to_come_again(model, folder):
    with live(folder, model=model, max_rows=1, max_waiting=1) as server:
        hold = threading.Event()
        engine_step = server.server.engine.step
        server.server.engine.step = lambda: hold.wait(30) and engine_step()
        replies = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60))
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(replies) == 3)
        assert {reply.status_code for reply in replies} == {429}
        assert int(replies[0].headers["retry-after"]) > 0
        assert replies[0].json()["error"]["code"] == "queue_full"
        stream = server.http.post("/v1/contexts", json={"text": BOOK, "stream": True})
        assert stream.status_code == 429
        hold.set()
        for thread in threads:
            thread.join(60)
        assert [reply.status_code for reply in replies].count(200) == 1


def test_what_takes_too_long_is_ended(model, folder):
    with live(folder, model=model, answer_s=0.3) as server:
        reply = server.http.post("/v1/chat/completions", json={**BODY, "max_tokens": 900})
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        body = {**BODY, "max_tokens": 900, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            last = [line for line in stream.iter_lines() if line.startswith("data: ")][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: server.server.engine.num_rows == 0)


def test_our_own_mistakes_are_not_told_in_detail(model, folder, monkeypatch, caplog):
    with live(folder, model=model) as server:

        def broken(*_):
            raise RuntimeError(f"broken: {SECRET}")

        monkeypatch.setattr(server.server.library, "records", broken)
        reply = server.http.get("/v1/contexts")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert SECRET not in reply.text
        assert reply.headers["x-request-id"]
        assert server.http.get("/health").status_code == 200
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_unknown_paths_and_methods_are_told_in_openais_shape(model, folder):
    with live(folder, model=model) as server:
        for method, path, status in (("POST", "/v1/embeddings", 404), ("PUT", "/v1/models", 405), ("GET", "/x", 404)):
            reply = server.http.request(method, path)
            assert reply.status_code == status
            error = reply.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(
                f"{method} {path} is not served here. OpenAI's clients: /v1/chat/completions,"
            )
        paths = server.http.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/models", "/v1/contexts"} <= set(paths)


def test_the_end_lets_requests_finish(model, folder):
    replies = []
    with live(folder, model=model) as server:
        thread = threading.Thread(
            target=lambda: replies.append(
                httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "max_tokens": 40}, timeout=60)
            )
        )
        thread.start()
        wait_until(lambda: server.server.engine.num_rows == 1)
    thread.join(60)
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 40


def test_the_end_tells_requests_that_it_cannot_wait_for(model, folder):
    """An answer in one piece, a stream, and a job that waits: each hears of the end in its own way."""
    long, replies, streamed = {**BODY, "max_tokens": 900}, [], []

    def whole():
        replies.append(httpx.post(f"{server.url}/v1/chat/completions", json=long, timeout=60))

    def stream():
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**long, "stream": True}, timeout=60
        ) as reply:
            streamed.extend(line for line in reply.iter_lines() if line.startswith("data: "))

    threads = [threading.Thread(target=act) for act in (whole, whole, stream)]
    with live(folder, model=model, shutdown_s=0.2, max_rows=2) as server:
        for thread in threads:
            thread.start()
        wait_until(lambda: server.server.engine.num_running == 2 and server.server.engine.num_waiting == 1)
    for thread in threads:
        thread.join(60)
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(503, "shutting_down")] * 2
    assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
