"""The load that `beacon bench serving` makes, against a tiny server and against servers that do wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from activation_beacon.bench.serving import Connection, Load, run, time_first_tokens
from activation_beacon.cli import app
from activation_beacon.errors import InputError
from server_live import BOOK, live, live_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("load") / "contexts", model=live_model()) as running:
        yield running


def test_a_good_server_passes(server):
    load = run(Connection(server.url), BOOK[:200], num_clients=3, seconds=3.0, max_tokens=4)
    assert load.num_answers >= 3
    assert load.num_errors == load.num_mixed_up == 0
    assert load.num_as_alone == load.num_answers
    assert load.memory_bytes
    assert load.numbers()["first_token_s_median"] > 0
    assert server.http.get("/v1/contexts").json()["data"] == []


def test_first_tokens_are_timed(server):
    found = time_first_tokens(Connection(server.url), BOOK)
    assert found["tokens"] > len(BOOK)
    assert found["times_sooner_than_first"] > 1


def test_the_command_prints_one_json_object(server):
    result = CliRunner().invoke(
        app, ["bench", "serving", server.url, "--clients", "2", "--seconds", "1", "--characters", "99", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mixed_up"] == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://x:port", "http://[x", "https://x", "x", ""])
def test_an_address_of_no_server_is_one_line(url):
    result = CliRunner().invoke(app, ["bench", "serving", url])
    assert result.exit_code == 1
    assert result.stderr == f"Error: The server's address must be like http://127.0.0.1:8000; got {url!r}.\n"


class WrongServer(BaseHTTPRequestHandler):
    """Tells everybody the first client's secret, and breaks off now and then."""

    secret = ""
    num_asked = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "wrong"}]})

    def do_DELETE(self):
        self.reply({})

    def do_POST(self):
        kind = type(self)
        values = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "text" in values:
            kind.secret = kind.secret or values["text"].split("password is ")[1].rstrip(".")
            self.reply({"id": "x", "tokens": 1}, 201)
            return
        kind.num_asked += 1
        self.send_response(200)
        self.end_headers()
        event = {"choices": [{"delta": {"content": kind.secret}}]}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        if kind.num_asked % 5:
            self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, values, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())


def test_a_wrong_server_does_not_pass():
    with ThreadingHTTPServer(("127.0.0.1", 0), WrongServer) as wrong:
        threading.Thread(target=wrong.serve_forever, daemon=True).start()
        load = run(Connection(f"http://127.0.0.1:{wrong.server_port}"), "text", num_clients=2, seconds=0.5)
        wrong.shutdown()
    assert load.num_mixed_up > 0
    assert load.num_errors > 0


def test_memory_that_grows_shows():
    assert Load(memory_bytes=[100] * 40).memory_growth == 1
    assert Load(memory_bytes=[100 + n for n in range(40)]).memory_growth == pytest.approx(134.5 / 114.5)


@pytest.mark.parametrize("url", ["", "ftp://x", "https://x:1"])
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match="must be like http"):
        Connection(url)


def test_where_no_server_answers_it_says_so():
    with ThreadingHTTPServer(("127.0.0.1", 0), WrongServer) as gone:
        port = gone.server_port
    with pytest.raises(InputError, match=rf"No server answers at http://127\.0\.0\.1:{port}\. Start one: beacon serve"):
        Connection(f"http://127.0.0.1:{port}").values("GET", "/v1/models")
