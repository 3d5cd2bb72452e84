"""Contexts over HTTP: made with progress, asked, grown, copied, deleted; on disk for good, in memory by bytes."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from activation_beacon import BeaconCache, ChatPrompt
from activation_beacon.errors import StorageError
from activation_beacon.server import folder as folder_module
from evaluation_models import byte_tokenizer
from server_live import BOOK, MODEL, live, live_model, wait_until
from server_models import assert_same_cache


@pytest.fixture(scope="module")
def model():
    return live_model()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "contexts"


def events_of(lines):
    """Server-sent events as (kind, values)."""
    kind, events = "", []
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((kind, json.loads(line.removeprefix("data: "))))
    return events


def stream(server, method, path, **options):
    with server.http.stream(method, path, **options) as reply:
        assert reply.status_code == 200, reply.read()
        return events_of(reply.iter_lines())


def test_a_text_becomes_a_context_on_disk(model, folder):
    with live(folder, model=model) as server:
        told = server.create(name="lions", ratio=8)
        assert (told["name"], told["status"], told["ratios"]) == ("lions", "ready", [8])
        assert server.http.get(f"/v1/contexts/{told['id']}").json() == told
        assert server.http.get("/v1/contexts").json()["data"] == [told]
        saved = BeaconCache.load(folder / f"{told['id']}.beacon")
        assert_same_cache(saved, model.compress(ChatPrompt(byte_tokenizer()).opening(BOOK), ratio=8))
        assert told["cache_bytes"] == saved.cache_bytes
        assert "fingerprint" not in json.dumps(told)


def test_progress_comes_as_events(model, folder):
    with live(folder, model=model) as server:
        events = stream(server, "POST", "/v1/contexts", json={"text": BOOK, "ratio": 4, "stream": True})
        done = [values["done"] for kind, values in events if kind == "progress"]
        total = events[0][1]["total"]
        assert done == sorted(done)
        assert set(done) == set(range(total + 1))
        assert events[-1][0] == "context"
        assert events[-1][1]["status"] == "ready"


def test_a_file_is_taken_from_a_form(model, folder):
    with live(folder, model=model) as server:
        form = {"ratio": "8", "stream": "false", "quantize": "8"}
        files = {"file": ("..\\x/lions.txt", b"\xef\xbb\xbf" + BOOK.encode(), "text/plain")}
        told = server.http.post("/v1/contexts", data=form, files=files).json()
        assert (told["name"], told["ratios"], told["quantized_bits"]) == ("lions.txt", [8], 8)
        assert server.ask("Who?", context=told["id"]).choices[0].message.content


@pytest.mark.parametrize(
    ("request_options", "status", "message"),
    [
        ({"json": {"text": "  "}}, 400, "The text is empty"),
        ({"json": {}}, 400, "text: Field required"),
        ({"json": {"text": "x", "wonder": 1}}, 400, "wonder: Extra inputs"),
        ({"json": {"text": "x", "ratio": 3}}, 400, "ratio"),
        ({"json": {"text": "x" * 9000, "ratio": 2}}, 400, "No ratio fits|Use ratio|Read at most"),
        ({"json": {"text": BOOK, "ratio": [2, 8]}}, 400, "names 2 chunks, but the text .* closes"),
        ({"json": {"text": BOOK, "ratio": [2, 8], "stream": True}}, 400, "names 2 chunks, but the text .* closes"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "^The body is not JSON: EOF "),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 400, "Send application/json"),
        ({"files": {"file": ("a.txt", b"\xff\xfe")}}, 400, "not UTF-8"),
        ({"files": {"file": ("a.txt", b"a\0b")}}, 400, "binary"),
        ({"files": {"other": ("a.txt", b"a")}}, 400, "has no file"),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"ratio": "many"}}, 400, "ratio must be"),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"ratio": "9" * 5000}}, 400, "ratio must be"),
        ({"files": {"file": ("a.txt", b"a")}, "data": {"quantize": "9" * 5000}}, 400, "^quantize: Input should be"),
    ],
)
def test_texts_that_cannot_be_compressed(model, tmp_path_factory, request_options, status, message):
    with live(tmp_path_factory.mktemp("refused"), model=model) as server:
        reply = server.http.post("/v1/contexts", **request_options)
        assert reply.status_code == status
        assert re.search(message, reply.json()["error"]["message"])
        assert server.http.get("/v1/contexts").json()["data"] == []


def test_a_context_grows_and_forks(model, folder):
    more = " And the tiger went home at last, over the hills and far away."
    with live(folder, model=model) as server:
        first = server.create(ratio=4)
        fork = server.http.post(f"/v1/contexts/{first['id']}/fork", json={"name": "other"}).json()
        before = server.ask("Who?", context=fork["id"]).choices[0].message.content
        grown = server.http.post(f"/v1/contexts/{first['id']}/append", json={"text": more}).json()
        assert grown["id"] == first["id"]
        prompt = ChatPrompt(byte_tokenizer())
        whole = model.compress([*prompt.opening(BOOK), *byte_tokenizer()(more)["input_ids"]], ratio=4)
        assert_same_cache(BeaconCache.load(folder / f"{first['id']}.beacon"), whole)
        assert server.http.get(f"/v1/contexts/{fork['id']}").json()["tokens"] == first["tokens"]
        assert server.ask("Who?", context=fork["id"]).choices[0].message.content == before
        events = stream(server, "POST", f"/v1/contexts/{first['id']}/append", json={"text": more, "stream": True})
        assert events[-1][1]["tokens"] == grown["tokens"] + len(more)


def test_a_fork_needs_no_body(model, folder):
    with live(folder, model=model) as server:
        first = server.create(name="book")
        assert server.http.post(f"/v1/contexts/{first['id']}/fork").json()["name"] == "book (copy)"


def test_a_context_that_is_deleted_while_text_is_appended_stays_deleted(model, folder, monkeypatch):
    with live(folder, model=model) as server:
        made = server.create()
        written, go_on = threading.Event(), threading.Event()
        replace = server.server.library.folder.replace

        def slow(*values):
            written.set()
            go_on.wait(20)
            return replace(*values)

        monkeypatch.setattr(server.server.library.folder, "replace", slow)
        url, replies = f"{server.url}/v1/contexts/{made['id']}", []
        append = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{url}/append", json={"text": "more"}, timeout=60))
        )
        append.start()
        written.wait(20)
        assert server.http.delete(url).status_code == 200
        go_on.set()
        append.join(60)
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (404, "not_found")
        assert server.http.get(url).status_code == 404


def test_deleting_removes_the_file_and_nothing_else(model, folder):
    with live(folder, model=model) as server:
        one, two = server.create(), server.create(BOOK[::-1])
        assert server.http.delete(f"/v1/contexts/{one['id']}").json()["deleted"] is True
        assert server.http.delete(f"/v1/contexts/{one['id']}").status_code == 404
        assert server.http.get(f"/v1/contexts/{one['id']}").status_code == 404
        assert sorted(path.stem for path in folder.iterdir()) == [two["id"], two["id"]]


def test_a_restart_finds_contexts_and_a_damaged_one_is_set_aside(model, folder, monkeypatch):
    monkeypatch.setattr(folder_module, "STILL_S", -1.0)  # nobody is still copying it
    with live(folder, model=model) as server:
        good, bad = server.create(name="good"), server.create(name="bad")
        answer = server.ask("Who?", context=good["id"]).choices[0].message.content
    path = folder / f"{bad['id']}.beacon"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with live(folder, model=model) as server:
        assert server.ask("Who?", context=good["id"]).choices[0].message.content == answer
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "context": bad["id"]}
        for path, values in (
            ("/v1/chat/completions", body),
            ("/v1/chat/completions", body),
            (f"/v1/contexts/{bad['id']}/append", {"text": "more"}),
            (f"/v1/contexts/{bad['id']}/fork", {}),
        ):
            reply = server.http.post(path, json=values)
            assert (reply.status_code, reply.json()["error"]["code"]) == (422, "context_damaged")
        assert "set aside" in reply.json()["error"]["message"]
        listed = {each["id"]: each for each in server.http.get("/v1/contexts").json()["data"]}
        assert listed[good["id"]]["status"] == "ready"
        assert listed[bad["id"]]["status"] == "unusable"
        assert "set aside" in listed[bad["id"]]["error"]
        assert server.http.delete(f"/v1/contexts/{bad['id']}").status_code == 200
    assert not (folder / f"{bad['id']}.beacon.damaged").exists()


def test_a_context_of_another_model_is_refused_by_name(model, folder):
    with live(folder, model=live_model(num_hidden_layers=2)) as server:
        other = server.create()
    with live(folder, model=model) as server:
        (told,) = server.http.get("/v1/contexts").json()["data"]
        assert "another model" in told["error"]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "context": other["id"]}
        assert server.http.post("/v1/chat/completions", json=body).json()["error"]["code"] == "context_of_another_model"
        assert (folder / f"{other['id']}.beacon").exists()


def test_memory_is_bounded_and_the_disk_is_not_touched(model, folder):
    with live(folder, model=model) as server:
        size = server.create()["cache_bytes"]
    with live(folder, model=model, memory_bytes=int(2.5 * size)) as server:
        ids = [server.create(BOOK[n:])["id"] for n in range(4)]
        memory = server.server.library.memory
        for context_id in ids * 2:
            assert server.ask("Who?", context=context_id, max_tokens=2).choices
            assert memory.num_bytes <= 2.5 * size
        listed = server.http.get("/v1/contexts").json()["data"]
        assert 0 < sum(each["in_memory"] for each in listed) <= 2
        assert len(list(folder.glob("*.beacon"))) == 5


def test_a_full_folder_refuses_new_contexts_and_keeps_the_old(model, folder):
    with live(folder, model=model) as server:
        first = server.create()
    with live(folder, model=model, disk_bytes=first["file_bytes"] + 1000) as server:
        reply = server.http.post("/v1/contexts", json={"text": BOOK})
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "folder_full")
        assert [each["id"] for each in server.http.get("/v1/contexts").json()["data"]] == [first["id"]]


def test_a_full_folder_refuses_to_read_on_before_it_reads(model, folder, monkeypatch):
    with live(folder, model=model) as server:
        first = server.create()
    path, text = f"/v1/contexts/{first['id']}/append", {"text": " And it was late."}
    with live(folder, model=model, disk_bytes=int(1.5 * first["file_bytes"])) as server:
        grown = server.http.post(path, json=text)
        assert grown.status_code == 201, grown.text  # it takes the place of what it was
    with live(folder, model=model, disk_bytes=first["file_bytes"] // 2) as server:
        monkeypatch.setattr(server.server.engine, "submit", lambda *jobs: pytest.fail("it is read"))
        reply = server.http.post(path, json=text)
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "folder_full")


def test_a_context_keeps_its_budget_and_spans_when_text_is_appended_at_another_ratio(model, folder):
    folder.mkdir()
    ids = ChatPrompt(byte_tokenizer()).opening(BOOK)
    spans = [(4, 9, None), (2000, 2010, None)]
    model.compress([ids], ratio="auto", budget=300, spans=spans).save(folder / "book.beacon")
    with live(folder, model=model) as server:
        server.http.post("/v1/contexts/book/append", json={"text": " More of it.", "ratio": "auto"}).raise_for_status()
    policy = BeaconCache.load(folder / "book.beacon", model).policy
    assert (policy.ratio, policy.budget, [tuple(span) for span in policy.spans]) == ("auto", 300, spans)


def test_replicas_share_a_folder(model, folder):
    """One makes, both answer; one changes, the other notices; one deletes, it is gone for both."""
    with live(folder, model=model) as one, live(folder, model=live_model()) as two:
        context = one.create()
        assert two.ask("Who?", context=context["id"]).choices[0].message.content
        one.http.post(f"/v1/contexts/{context['id']}/append", json={"text": " More of it."})
        usage = two.ask("Who?", context=context["id"]).usage
        assert usage.prompt_tokens_details.cached_tokens == context["tokens"] + len(" More of it.")
        one.http.delete(f"/v1/contexts/{context['id']}")
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "context": context["id"]}
        assert two.http.post("/v1/chat/completions", json=body).status_code == 404


def test_the_folder_can_be_an_object_store(model):
    with live("memory://served", model=model) as server:
        context = server.create()
        answer = server.ask("Who?", context=context["id"]).choices[0].message.content
    with live("memory://served", model=model) as server:
        assert server.ask("Who?", context=context["id"]).choices[0].message.content == answer
        server.http.delete(f"/v1/contexts/{context['id']}")
        assert server.http.get("/v1/contexts").json()["data"] == []


def test_a_client_that_goes_away_stops_the_compressing(model, folder, monkeypatch):
    with live(folder, model=model) as server:
        step, go = server.server.engine.step, threading.Event()

        def held():
            if server.server.engine._tasks:
                go.wait(30)
            step()

        monkeypatch.setattr(server.server.engine, "step", held)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/contexts", json={"text": BOOK}, timeout=0.3)
        wait_until(lambda: all(job.is_cancelled for job in server.server.engine._running))
        go.set()
        wait_until(lambda: server.server.engine.num_running == 0)
        assert server.http.get("/v1/contexts").json()["data"] == []
        assert list(folder.iterdir()) == []


def test_many_contexts_at_once_keep_apart(model, folder):
    """Each client asks its own context and gets what it gets alone, to the last digit of its probabilities."""

    def answer(server, context):
        reply = server.ask("What?", context=context["id"], max_tokens=8, logprobs=True)
        return [token.logprob for token in reply.choices[0].logprobs.content]

    with live(folder, model=model) as server:
        contexts = [server.create(f"Secret {n}: {'xyzw'[n % 4] * 50} " + BOOK[n * 10 :]) for n in range(8)]
        alone = [answer(server, context) for context in contexts]
        together = [[] for _ in contexts]

        def talk(n):
            for _ in range(2):
                together[n].append(answer(server, contexts[n]))

        threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for n, answers in enumerate(together):
        assert len(answers) == 2
        for each in answers:
            same = [m for m in range(8) if each == pytest.approx(alone[m], abs=1e-4)]
            assert same == [n]


def forget_all(server):
    """Let the next request read its context from disk."""
    for key in list(server.server.library.memory):
        server.server.library.memory.drop(key)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/contexts/{}/append", "/v1/contexts/{}/fork"])
def test_a_context_that_is_deleted_while_it_is_opened_is_not_found(model, folder, monkeypatch, path):
    with live(folder, model=model) as server:
        made = server.create()
        forget_all(server)
        load = server.server.library.folder.load

        def late(context_id):
            (folder / f"{context_id}.beacon").unlink()  # as another server does
            return load(context_id)

        monkeypatch.setattr(server.server.library.folder, "load", late)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "context": made["id"]}
        values = body if path.endswith("completions") else {"text": "more"} if path.endswith("append") else {}
        reply = server.http.post(path.format(made["id"]), json=values)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_deleting_waits_for_whoever_opens_the_context(model, folder, monkeypatch):
    with live(folder, model=model) as server:
        made = server.create()
        forget_all(server)
        opening, go_on = threading.Event(), threading.Event()
        load = server.server.library.folder.load

        def slow(context_id):
            opening.set()
            assert go_on.wait(20)
            return load(context_id)

        monkeypatch.setattr(server.server.library.folder, "load", slow)
        with ThreadPoolExecutor(2) as threads:
            answer = threads.submit(server.ask, "Who?", context=made["id"])
            assert opening.wait(20)
            deleted = threads.submit(httpx.delete, f"{server.url}/v1/contexts/{made['id']}", timeout=60)
            time.sleep(0.1)  # it could come first only if it did not wait
            go_on.set()
            assert answer.result(60).choices
            assert deleted.result(60).status_code == 200
        assert server.http.get(f"/v1/contexts/{made['id']}").status_code == 404


def test_what_cannot_be_read_can_be_deleted(model, folder, monkeypatch):
    with live(folder, model=model) as server:
        made = server.create()

        def closed(*_):
            raise StorageError(f"{folder}/{made['id']}.beacon cannot be read: Permission denied.")

        server.server.library.folder._records.clear()
        (folder / f"{made['id']}.json").unlink()
        monkeypatch.setattr(server.server.library.folder, "_read", closed)
        reply = server.http.get(f"/v1/contexts/{made['id']}")
        assert reply.status_code == 507
        assert reply.json()["error"]["message"] == f"{made['id']}.beacon cannot be read: Permission denied."
        assert server.http.delete(f"/v1/contexts/{made['id']}").status_code == 200
        assert list(folder.glob("*.beacon")) == []
