"""Requests drawn from the server's own OpenAPI schema, good and bad: none is answered with a 5xx."""

import hypothesis
import pytest

from server_live import live, live_model

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    settings = {"max_tokens": 4, "answer_s": 20.0, "compress_s": 20.0}
    with live(tmp_path_factory.mktemp("fuzz") / "contexts", model=live_model(), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def drawn(schema, method, path):
    """A test of one operation with hypothesis' cases."""

    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method].as_strategy())
    def check(case):
        reply = case.call(timeout=60)
        assert reply.status_code < 500, (case.as_curl_command(), reply.text)
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/{response_id}"),
        ("DELETE", "/v1/responses/{response_id}"),
        ("POST", "/v1/contexts"),
        ("GET", "/v1/contexts"),
        ("GET", "/v1/contexts/{context_id}"),
        ("DELETE", "/v1/contexts/{context_id}"),
        ("POST", "/v1/contexts/{context_id}/append"),
        ("POST", "/v1/contexts/{context_id}/fork"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    ],
)
def test_no_request_breaks_the_server(schema, server, method, path):
    drawn(schema, method, path)()
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"model": "tiny"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 2}',
        b'{"model": "tiny", "messages": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 99999999999999999999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": 0, "max_tokens": 2}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": "", "max_tokens": 2}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": ""}], "max_tokens": 2}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ratio": [], "max_tokens": 2}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ratio": [1e400], "max_tokens": 2}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ratio": -1, "max_tokens": 2}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1, "name": "\\ud800"}',
        b"\xff\xfe",
    ],
)
def test_what_a_schema_does_not_draw(server, body):
    for path in ("/v1/chat/completions", "/v1/contexts"):
        headers = {"content-type": "application/json"}
        reply = server.http.post(path, content=body, headers=headers)
        assert reply.status_code < 500, reply.text
    reply = server.http.post("/v1/responses", content=body.replace(b'"messages":', b'"input":'), headers=headers)
    assert reply.status_code < 500, reply.text
    as_text = (
        body.replace(b'"messages": [{"role": "user", "content":', b'"text":')
        .replace(b'"}],', b'",')
        .replace(b'"}]}', b'"}')
    )
    reply = server.http.post("/v1/contexts", content=as_text.replace(b'"model": "tiny", ', b""), headers=headers)
    assert reply.status_code < 500, reply.text
    assert server.http.get("/v1/contexts").status_code == 200
