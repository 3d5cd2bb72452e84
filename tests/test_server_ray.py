"""Replicas and a corpus on Ray, in its local mode."""

import contextlib
import os
import socket
import warnings

import httpx
import pytest

from activation_beacon import BeaconCache, ChatPrompt, load
from activation_beacon.errors import InputError
from saved_models import save_adapter, save_base
from server_live import BOOK

ray = pytest.importorskip("ray", reason="ray is not installed (extra `ray`)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own deprecations


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    return save_adapter(root / "adapter", save_base(root / "base", seed=0), seed=2)


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), os.path.dirname(__file__)])  # noqa: PTH120
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}}
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        yield
        ray.shutdown()


def test_a_corpus_is_compressed_and_gone_on_with(cluster, adapter, tmp_path):
    from activation_beacon.server.ray_corpus import compress_corpus

    sources = []
    for number in range(4):
        path = tmp_path / f"text-{number}.txt"
        path.write_text(BOOK[number * 10 :], encoding="utf-8")
        sources.append(path)
    (tmp_path / "empty.txt").write_text(" ")
    told = compress_corpus([*sources, tmp_path / "empty.txt"], tmp_path / "out", model=str(adapter), ratio=4)
    assert [each["error"] for each in told if each["source"].endswith("empty.txt")] == ["The file is empty."]
    assert len(list((tmp_path / "out").glob("*.beacon"))) == 4
    model, tokenizer = load(adapter)
    context = BeaconCache.load(tmp_path / "out" / "text-2.beacon", model)
    expected = model.compress([ChatPrompt(tokenizer).opening(BOOK[20:])], ratio=4)
    assert context.rows == expected.rows
    assert compress_corpus(sources, tmp_path / "out", model=str(adapter), ratio=4) == []


def test_texts_of_one_name_are_refused(tmp_path):
    from activation_beacon.server.ray_corpus import compress_corpus

    with pytest.raises(InputError, match="would become one file: a"):
        compress_corpus([tmp_path / "a.txt", tmp_path / "x" / "a.txt"], tmp_path / "out")


@contextlib.contextmanager
def served(adapter, folder, **arguments):
    """A client of replicas that run while the block does."""
    from ray import serve

    from activation_beacon.server.ray_serve import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        built = build({"model": str(adapter), "name": "tiny", "folder": str(folder), **arguments})
        serve.run(built, name="beacon", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()


def test_replicas_share_contexts_and_requests_find_the_one_that_holds_theirs(cluster, adapter, tmp_path):
    with served(adapter, tmp_path / "contexts", replicas="2", ratio="4") as client:
        context = client.post("/v1/contexts", json={"text": BOOK}).json()
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4, "temperature": 0}
        body["context"] = context["id"]
        header = {"serve_multiplexed_model_id": context["id"]}
        replies = [client.post("/v1/chat/completions", json=body, headers=header) for _ in range(4)]
        replies += [client.post("/v1/chat/completions", json=body) for _ in range(4)]
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
        assert client.get("/v1/contexts/ctx_none").status_code == 404


def test_the_key_is_the_environments_where_none_is_named(monkeypatch):
    from activation_beacon.server.ray_serve import build

    def settings(**arguments):
        return build(arguments)._bound_deployment.init_args[1]

    monkeypatch.delenv("BEACON_API_KEY", raising=False)
    assert settings().api_key is None
    monkeypatch.setenv("BEACON_API_KEY", "")
    with pytest.raises(InputError, match=r"^The API key is empty"):
        settings()
    monkeypatch.setenv("BEACON_API_KEY", "sesame")
    assert settings().api_key == "sesame"
    assert settings(api_key="open").api_key == "open"


def test_what_is_refused_at_the_gate_loads_no_context(cluster, adapter, tmp_path):
    model, tokenizer = load(adapter)
    (tmp_path / "contexts").mkdir()
    model.compress([ChatPrompt(tokenizer).opening(BOOK)], ratio=4).save(tmp_path / "contexts" / "book.beacon")
    with served(adapter, tmp_path / "contexts", api_key="sesame") as client:
        header, key = {"serve_multiplexed_model_id": "book"}, {"authorization": "Bearer sesame"}
        assert client.get("/v1/contexts/book", headers=header).status_code == 401
        assert client.get("/v1/contexts/book", headers=key).json()["in_memory"] is False
        assert client.get("/v1/contexts/book", headers={**header, **key}).json()["in_memory"] is True
