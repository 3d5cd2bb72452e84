"""A server under load: many clients at once, each with a context of its own that holds a secret.

Speaks HTTP and knows nothing of the server's inside. What counts as wrong: any error but 429, an answer with another
client's secret, and memory that goes on growing.
"""

import contextlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from activation_beacon.errors import InputError

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heron", "ivory", "jade", "kelp", "lotus")
QUESTION = "What is the password?"
PATIENCE_S = 900.0  # that a reply may take


@dataclass
class Client:
    """One client: its context, its secret, and what the server answers it when nobody else asks."""

    number: int
    secret: str
    context_id: str
    alone: str = ""


@dataclass
class Load:
    """What was found.

    Attributes:
        statuses: how often each HTTP status came; 0 for a connection that broke.
        num_mixed_up: answers with another client's secret.
        num_as_alone: answers that are, letter for letter, what the client got alone.
        num_with_secret: answers with the client's own secret.
        first_s: seconds to the first token of each answer.
        memory_bytes: of the server's process, sampled all along.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    num_mixed_up: int = 0
    num_as_alone: int = 0
    num_with_secret: int = 0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_answers(self) -> int:
        """Requests that were answered."""
        return self.statuses[200]

    @property
    def num_errors(self) -> int:
        """Requests that came to nothing, but for those told to come again later."""
        return sum(count for status, count in self.statuses.items() if status not in (200, 429))

    @property
    def memory_growth(self) -> float:
        """Memory of the last quarter over that of the second: the first one fills caches."""
        quarter = len(self.memory_bytes) // 4
        if not quarter:
            return 1.0
        second, last = self.memory_bytes[quarter : 2 * quarter], self.memory_bytes[-quarter:]
        return (sum(last) / len(last)) / (sum(second) / len(second))

    def numbers(self) -> dict[str, Any]:
        """All of it as plain values."""
        ordered = sorted(self.first_s) or [0.0]
        return {
            "seconds": round(self.seconds, 1),
            "answers": self.num_answers,
            "refused_429": self.statuses[429],
            "errors": self.num_errors,
            "mixed_up": self.num_mixed_up,
            "as_alone": self.num_as_alone,
            "with_own_secret": self.num_with_secret,
            "tokens_per_second": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            "first_token_s_median": round(ordered[len(ordered) // 2], 3),
            "first_token_s_most": round(ordered[-1], 3),
            "memory_bytes_most": max(self.memory_bytes, default=0),
            "memory_growth": round(self.memory_growth, 4),
        }


def _address(url: str) -> tuple[str, int]:
    """Host and port of a server.

    Raises:
        InputError: if they cannot be told.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, 80 if parts.port is None else parts.port
    except ValueError:  # a port beyond 65535, a bracket that is not closed
        pass
    raise InputError(f"The server's address must be like http://127.0.0.1:8000; got {url!r}.")


class Connection:
    """Talks with the server.

    Args:
        url: such as `http://127.0.0.1:8000`.
        key: bearer key, if the server wants one.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self.host, self.port = _address(url)
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def send(self, method: str, path: str, values: Any = None) -> tuple[int, bytes]:
        """Status and body of a reply; status 0 where the connection broke."""
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)) as line:
            try:
                line.request(method, path, None if values is None else json.dumps(values), self.headers)
                reply = line.getresponse()
                return reply.status, reply.read()
            except (OSError, http.client.HTTPException):
                return 0, b""

    def values(self, method: str, path: str, values: Any = None) -> Any:
        """The JSON of a reply that must be good.

        Raises:
            InputError: with what the server says.
        """
        status, content = self.send(method, path, values)
        if status == 0:
            raise InputError(f"No server answers at http://{self.host}:{self.port}. Start one: beacon serve.")
        if status not in (200, 201):
            raise InputError(
                f"The server answered {method} {path} with {status}: {content[:200].decode(errors='replace')}"
            )
        return json.loads(content)

    def streamed(self, values: dict[str, Any]) -> tuple[int, str, float, int]:
        """Status, text, seconds to the first token, and tokens of an answer; status 0 for one that broke off."""
        start = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)) as line:
            try:
                options = {"stream": True, "stream_options": {"include_usage": True}}
                line.request("POST", "/v1/chat/completions", json.dumps({**values, **options}), self.headers)
                reply = line.getresponse()
                if reply.status != 200:
                    reply.read()
                    return reply.status, "", 0.0, 0
                return _gathered(reply, start)
            except (OSError, http.client.HTTPException):
                return 0, "", 0.0, 0


def _gathered(reply: http.client.HTTPResponse, start: float) -> tuple[int, str, float, int]:
    text, first_s, num_tokens, is_whole = "", 0.0, 0, False
    for line in reply:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            is_whole = True
        elif data.startswith("{"):
            values = json.loads(data)
            pieces = [choice["delta"].get("content") or "" for choice in values.get("choices", ())]
            if any(pieces) and not first_s:
                first_s = time.perf_counter() - start
            text += "".join(pieces)
            num_tokens = (values.get("usage") or {}).get("completion_tokens", num_tokens)
    return (200 if is_whole else 0), text, first_s, num_tokens


def run(
    connection: Connection,
    text: str,
    *,
    num_clients: int,
    seconds: float,
    max_tokens: int = 16,
    ratio: int | None = None,
) -> Load:
    """Make a context for each client, ask each alone, then all at once for a while; the contexts are deleted again.

    Contexts are of different lengths, from half of the text to all of it: whether an answer closes a chunk depends on them.

    Args:
        connection: to the server.
        text: what the longest context holds besides its secret.
        num_clients: at once.
        seconds: of load.
        max_tokens: of an answer.
        ratio: of the contexts; the server's by default.
    """
    model = connection.values("GET", "/v1/models")["data"][0]["id"]
    lengths = [round(len(text) * (1 - 0.5 * number / num_clients)) for number in range(num_clients)]
    clients = [_client(connection, number, text[:length], ratio) for number, length in enumerate(lengths)]
    try:
        for client in clients:
            status, client.alone, _, _ = connection.streamed(_question(model, client, max_tokens))
            if status != 200:
                raise InputError(f"The server answered the first question with {status}.")
        return _loaded(connection, model, clients, seconds, max_tokens)
    finally:
        for client in clients:
            connection.send("DELETE", f"/v1/contexts/{client.context_id}")


def _client(connection: Connection, number: int, text: str, ratio: int | None) -> Client:
    chance = random.Random(number)
    secret = f"{chance.choice(WORDS)}-{chance.choice(WORDS)}-{number:03d}"
    values = {"text": f"{text}\n\nThe password is {secret}.", "name": f"load {number}"}
    made = connection.values("POST", "/v1/contexts", values if ratio is None else {**values, "ratio": ratio})
    return Client(number, secret, made["id"])


def _question(model: str, client: Client, max_tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": QUESTION}
    return {
        "model": model,
        "messages": [message],
        "context": client.context_id,
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def _loaded(connection: Connection, model: str, clients: Sequence[Client], seconds: float, max_tokens: int) -> Load:
    load, lock, start = Load(), threading.Lock(), time.perf_counter()
    others = {client.number: [each.secret for each in clients if each is not client] for client in clients}

    def ask(client: Client) -> None:
        while time.perf_counter() - start < seconds:
            status, text, first_s, num_tokens = connection.streamed(_question(model, client, max_tokens))
            with lock:
                load.statuses[status] += 1
                load.num_tokens += num_tokens
                if status == 200:
                    load.first_s.append(first_s)
                    load.num_as_alone += text == client.alone
                    load.num_with_secret += client.secret in text.lower()
                    load.num_mixed_up += any(secret in text.lower() for secret in others[client.number])
            if status == 429:
                time.sleep(1.0)  # Retry-After, as a client does

    def watch() -> None:
        while time.perf_counter() - start < seconds:
            memory = _memory_bytes(connection)
            if memory is not None:
                load.memory_bytes.append(memory)
            time.sleep(min(1.0, seconds / 40))

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - start
    return load


def _memory_bytes(connection: Connection) -> int | None:
    """Memory of the server's process, as its /metrics tells."""
    status, content = connection.send("GET", "/metrics")
    if status != 200:
        return None
    for line in content.decode().splitlines():
        if line.startswith("process_resident_memory_bytes "):
            return int(float(line.split()[1]))
    return None


def time_first_tokens(connection: Connection, text: str, *, ratio: int | None = None) -> dict[str, Any]:
    """Seconds to the first token: of a question with the text in it, and of two on its context.

    A context is compressed by the first request of all, so that its first question's time has the compressing in it.
    """
    model = connection.values("GET", "/v1/models")["data"][0]["id"]
    start = time.perf_counter()
    values: dict[str, Any] = {"text": text, "name": "first tokens"}
    made = connection.values("POST", "/v1/contexts", values if ratio is None else {**values, "ratio": ratio})
    compress_s = time.perf_counter() - start
    client = Client(0, "", made["id"])
    try:
        times = []
        for question in ("What is it about?", "Who is in it?"):
            message = {"role": "user", "content": question}
            values = {**_question(model, client, 1), "messages": [message]}
            times.append(connection.streamed(values)[2])
    finally:
        connection.send("DELETE", f"/v1/contexts/{made['id']}")
    body = {"model": model, "max_tokens": 1, "temperature": 0}
    message = {"role": "user", "content": f"{text}\n\nWho is in it?"}
    anew = connection.streamed({**body, "messages": [message]} | ({} if ratio is None else {"ratio": ratio}))[2]
    return {
        "tokens": made["tokens"],
        "first_question_s": round(compress_s + times[0], 3),
        "second_question_s": round(times[1], 3),
        "reading_anew_s": round(anew, 3),
        "times_sooner_than_first": round((compress_s + times[0]) / times[1], 1),
        "times_sooner_than_anew": round(anew / times[1], 1),
    }
