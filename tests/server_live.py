"""A server of a tiny model on a port of its own, in a thread."""

import contextlib
import threading
import time

import httpx
import openai

from activation_beacon import BeaconConfig
from activation_beacon.server.app import create_app
from activation_beacon.server.http import HttpServer, bound_socket
from activation_beacon.server.settings import Settings
from evaluation_models import byte_tokenizer
from server_models import serving_model

CONFIG = BeaconConfig(chunk_size=32, ratios=(2, 4, 8))
MODEL = "tiny"
BOOK = "The lion said nothing at all to the tiger. It was late! Nobody knew why; the moon rose. " * 6


class Live:
    """A running server and ways to talk to it."""

    def __init__(self, app, port):
        self.app = app
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def server(self):
        return self.app.state.server

    def create(self, text=BOOK, **options):
        reply = self.http.post("/v1/contexts", json={"text": text, **options})
        assert reply.status_code == 201, reply.text
        return reply.json()

    def ask(self, question, *, context=None, **options):
        options = {"model": MODEL, "max_tokens": 12, "temperature": 0, **options}
        extra = {} if context is None else {"context": context}
        return self.openai.chat.completions.create(
            messages=[{"role": "user", "content": question}], extra_body=extra, **options
        )


def live_model(**overrides):
    return serving_model(CONFIG, **{"max_position_embeddings": 1024, **overrides})


@contextlib.contextmanager
def live(folder, *, model=None, **settings):
    """Serve a tiny model while the block runs."""
    settings = Settings(**{"folder": str(folder), "model_name": MODEL, "ratio": 4, **settings})
    with live_app(create_app(model or live_model(), byte_tokenizer(), settings)) as running:
        yield running


@contextlib.contextmanager
def live_app(app):
    """Serve an application while the block runs."""
    bound = bound_socket("127.0.0.1", 0)
    port = bound.getsockname()[1]
    server = HttpServer(app, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        running = Live(app, port)
        yield running
        running.http.close()
        running.openai.close()
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(is_so, seconds=30.0):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
