"""The command line: through typer's runner, and through real processes where a signal or a start-up time matters."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import activation_beacon
from activation_beacon import BeaconCache, ChatPrompt, load
from activation_beacon.cli import app
from saved_models import CHUNK, byte_tokenizer, save_adapter, save_base

torch.set_num_threads(1)  # threads that wait for one another make models as small as these slower

BEACON = [sys.executable, "-m", "activation_beacon"]
ROOT = Path(__file__).parents[1]
TEXT = "The lion said nothing at all to the tiger, and went to sleep under a tree.\n" * 12
UNTRAINED = "untrained: this adapter's beacons have not been trained; do not trust what is said of a compressed text."
USUAL = '"auto" chose ratio 2, the smallest that fits the model\'s positions. --ratio 8 would hold 29.5 KiB and read faster.'


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder with base models, adapters, a text and contexts."""
    root = tmp_path_factory.mktemp("cli")
    save_base(root / "base", seed=0)
    save_base(root / "other-base", seed=1)
    save_adapter(root / "adapter", root / "base", seed=2)
    save_adapter(root / "trained", root / "base", seed=3, training={"steps": 7})
    save_adapter(root / "of-other-base", root / "other-base", seed=2)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    for name in ("adapter", "trained", "of-other-base"):
        model, tokenizer = load(root / name)
        model.compress(ChatPrompt(tokenizer).opening(TEXT), ratio=4).save(root / f"{name}.beacon")
    return root


@pytest.fixture
def run(files, monkeypatch, tmp_path):
    """Runs a command in an empty folder, with `{files}` in its arguments filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args: str, stdin: str | bytes | None = None):
        return CliRunner().invoke(app, [arg.format(files=files) for arg in args], input=stdin)

    return run


def good(result) -> str:
    assert result.exit_code == 0, result.output
    assert result.exception is None
    assert "\x1b" not in result.output
    return result.stdout


def loaded_json(result) -> dict:
    return json.loads(good(result))


def saved(files: Path, name: str) -> BeaconCache:
    return BeaconCache.load(files / name)


def are_same(one: BeaconCache, other: BeaconCache) -> bool:
    tensors = [[t for layer in cache.layers for _, t in layer.named_tensors()] for cache in (one, other)]
    return one.rows == other.rows and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


# --- help ------------------------------------------------------------------------------------------------------------

COMMANDS = ("demo", "compress", "ask", "chat", "inspect", "make-questions", "import-official", "export-official")


def test_help_lists_every_command(run):
    out = good(run("--help"))
    assert [name for name in COMMANDS if f"\n  {name} " not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(run, command):
    assert re.search(rf"Examples?:\n\n    .*beacon {command}\b", good(run(command, "--help")))


def test_version(run):
    assert good(run("--version")) == f"beacon {activation_beacon.__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(run):
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.output


def test_help_is_instant():
    code = (
        "import sys; sys.argv = ['beacon', 'compress', '--help']\n"
        "from activation_beacon.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert "Usage: beacon compress" in done.stdout
        assert done.stderr == "heavy: []\n"
    assert min(seconds) < 2  # 0.2 s on an idle machine; the missing imports above are the sharper test


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_soon_sleep_where_others_work_unless_the_user_says_otherwise(given, spins):
    code = (
        "import os, sys; sys.argv = ['beacon', '--version']\n"
        "from activation_beacon.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == f"{spins} False"


def test_the_reference_in_docs_is_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate_cli.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args", [("compress", "a.txt"), ("ask",), ("compres",), ("compress", "a", "-o", "b", "--dtype", "int3")]
)
def test_what_is_not_understood_exits_with_2(run, args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: beacon" in result.stderr


# --- compress --------------------------------------------------------------------------------------------------------


def test_compress_writes_the_context_that_the_library_makes(run, files):
    result = run("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "{files}/adapter", "--ratio", "4")
    out = good(result)
    assert are_same(BeaconCache.load("out.beacon"), saved(files, "adapter.beacon"))
    assert re.sub(r"[\d.]+ s \([\d,]+ tokens/s\)", "S", out) == (
        "out.beacon (untrained)\n"
        "  tokens  902 (28 chunks, ratio 4)\n"
        "  held    224 beacons + 6 raw tokens in the tail\n"
        "  cache   57.5 KiB; uncompressed 225.5 KiB (3.9x)\n"
        f"  file    {Path('out.beacon').stat().st_size / 1024:.1f} KiB\n"
        "  time    S\n"
    )
    assert result.stderr.splitlines() == [UNTRAINED, "compressing at ratio 4: 902 tokens"]


def test_compress_prints_one_json_object(run, files):
    values = loaded_json(
        run("compress", "{files}/text.txt", "-o", "o.beacon", "--model", "{files}/trained", "--ratio", "8", "--json")
    )
    assert values["file"] == "o.beacon"
    assert (values["tokens"], values["beacons"], values["tail"], values["cache_length"]) == (902, 112, 6, 118)
    assert values["ratios"] == [8] * 28
    assert values["cache_bytes"] * 902 == values["uncompressed_bytes"] * 118
    assert values["file_bytes"] == Path("o.beacon").stat().st_size
    assert values["is_trained"] is True
    assert values["notice"] is None


def test_a_trained_adapter_is_not_called_untrained(run):
    result = run("compress", "{files}/text.txt", "-o", "o.beacon", "--model", "{files}/trained")
    assert "untrained" not in good(result) + result.stderr


def test_auto_takes_the_smallest_ratio_that_fits(run):
    values = loaded_json(run("compress", "{files}/text.txt", "-o", "o.beacon", "--model", "{files}/adapter", "--json"))
    assert set(values["ratios"]) == {2}
    values = loaded_json(
        run("compress", "{files}/text.txt", "-o", "b", "--model", "{files}/adapter", "--budget", "200", "--json")
    )
    assert set(values["ratios"]) == {8}
    assert values["cache_length"] <= 200


def test_local_tokens_stay_raw_and_go_with_the_context(run):
    args = ("compress", "{files}/text.txt", "-o", "o.beacon", "--model", "{files}/trained", "--ratio", "8", "--json")
    values = loaded_json(run(*args, "--local-tokens", "40"))
    assert (values["tokens"], values["beacons"], values["tail"]) == (902, 26 * 4, 902 - 26 * 32)
    assert "at least 40 raw tokens in the tail" in good(run("inspect", "o.beacon"))
    assert good(run("ask", "o.beacon", "Who?", "--model", "{files}/trained", "--max-new-tokens", "3"))
    refused = run(*args[:-1], "--force", "--local-tokens", "100000")
    assert refused.exit_code == 1
    assert "100000 local tokens takes" in refused.stderr


def test_compress_takes_a_ratio_for_each_chunk(run):
    ratios = [2, 4, 8, 2]
    Path("short.txt").write_text(TEXT[:140])
    args = ("compress", "short.txt", "-o", "o.beacon", "--model", "{files}/adapter", "--json")
    assert loaded_json(run(*args, "--ratio", "2,4,8,2"))["ratios"] == ratios


def test_several_texts_make_one_context_with_a_blank_line_between(run):
    Path("a.txt").write_text("one\n\n")
    Path("b.txt").write_text("\ufefftwo\n", encoding="utf-8")
    args = ("-o", "out.beacon", "--model", "{files}/adapter", "--plain")
    result = run("compress", "a.txt", "-", "b.txt", *args, stdin="in between")
    good(result)
    ids = BeaconCache.load("out.beacon").token_ids[0]
    assert byte_tokenizer().decode(ids) == "one\n\nin between\n\ntwo"
    assert "The text has at most 32 tokens: it is kept raw, without beacons." in result.stderr


def test_plain_leaves_the_chat_template_out(run):
    good(run("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "{files}/adapter", "--plain"))
    assert byte_tokenizer().decode(BeaconCache.load("out.beacon").token_ids[0]) == TEXT


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantize_keeps_beacons_in_few_bits(run, bits):
    args = ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "{files}/adapter", "--ratio", "4")
    assert f"beacons in {bits} bits" in good(run(*args, "--quantize", bits))
    assert f"float32, beacons in {bits} bits" in good(run("inspect", "out.beacon"))
    assert good(run("ask", "out.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "3"))


def test_dtype_is_that_of_the_context(run):
    args = ("--model", "{files}/adapter", "--dtype", "bfloat16")
    good(run("compress", "{files}/text.txt", "-o", "out.beacon", *args))
    assert "\n  dtype        bfloat16\n" in good(run("inspect", "out.beacon"))
    assert good(run("ask", "out.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "3"))


def test_force_replaces_a_file(run, files):
    Path("out.beacon").write_text("precious")
    args = ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "{files}/adapter", "--ratio", "4")
    assert run(*args).exit_code == 1
    assert Path("out.beacon").read_text() == "precious"
    good(run(*args, "--force"))
    assert are_same(BeaconCache.load("out.beacon"), saved(files, "adapter.beacon"))


def test_base_names_another_place_for_the_base_model(run, files, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("beacon.safetensors", "beacon_config.json"):
        (moved / name).write_bytes((files / "adapter" / name).read_bytes())
    settings = json.loads((moved / "beacon_config.json").read_text())
    (moved / "beacon_config.json").write_text(json.dumps(settings | {"base_model": "/nowhere"}))
    args = ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "moved")
    assert run(*args).exit_code == 1
    good(run(*args, "--base", "{files}/base"))


# --- ask -------------------------------------------------------------------------------------------------------------


def greedy_answer(files: Path, context: BeaconCache, ids: list[int], count: int) -> str:
    model, tokenizer = load(files / "adapter")
    out = model.generate(torch.tensor([ids]), context=context, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_ask_streams_the_answer_that_the_library_gives(run, files):
    result = run("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "9")
    ids = ChatPrompt(byte_tokenizer()).question("Who?")
    assert good(result) == greedy_answer(files, saved(files, "adapter.beacon"), ids, 9) + "\n"
    notices = result.stderr.splitlines()
    assert notices[0] == UNTRAINED
    assert re.fullmatch(r"9 tokens in [\d.]+ s", notices[1])


def test_ask_plain_lets_the_question_follow_the_text(run, files):
    args = ("--model", "{files}/adapter", "--plain")
    good(run("compress", "{files}/text.txt", "-o", "out.beacon", *args))
    out = good(run("ask", "out.beacon", "And then", *args, "--max-new-tokens", "5"))
    ids = byte_tokenizer()("And then")["input_ids"]
    assert out == greedy_answer(files, BeaconCache.load("out.beacon"), ids, 5) + "\n"


def test_ask_prints_one_json_object(run):
    args = ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "4", "--json")
    values = loaded_json(run(*args))
    assert values["question"] == "Who?"
    assert values["answer_tokens"] == 4
    assert values["is_complete"] is False
    assert values["notice"] == UNTRAINED


ASKED = ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter")


def test_ask_answers_in_json_by_a_schema(run):
    Path("schema.json").write_text('{"enum": [{"who": "lion"}, {"who": "tiger", "age": 7}]}', encoding="utf-8")
    answer = good(run(*ASKED, "--schema", "schema.json", "--max-new-tokens", "40"))
    assert json.loads(answer) in ({"who": "lion"}, {"who": "tiger", "age": 7})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            "--schema schema.json cannot be read as JSON: No such file or directory. Give a file with a JSON schema.",
        ),
        ("{", "--schema schema.json cannot be read as JSON: "),
        ("[1]", '--schema schema.json must hold a JSON object; it holds list. {"type": "object"} is one.'),
        ('{"type": "strin"}', "The JSON schema cannot be served: Invalid type: strin. Change it, or leave it out."),
    ],
)
def test_what_is_no_schema_is_told_in_one_line(run, text, message):
    if text is not None:
        Path("schema.json").write_text(text, encoding="utf-8")
    result = run(*ASKED, "--schema", "schema.json")
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_seed_gives_the_same_answer_again(run):
    args = ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "12")
    hot = [good(run(*args, "--temperature", "2", "--seed", seed)) for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_reads_nothing_twice_and_equals_the_whole_conversation(run, files):
    args = ("chat", "{files}/adapter.beacon", "--model", "{files}/adapter", "--max-new-tokens", "6")
    result = run(*args, stdin="Who?\nWhy?\n/info\n/save talk.beacon\n/quit\nnever read\n")
    first, second, *info = good(result).splitlines()
    prompt, start = ChatPrompt(byte_tokenizer()), saved(files, "adapter.beacon")
    assert first == greedy_answer(files, start, prompt.question("Who?"), 6)
    encoded = byte_tokenizer()(first)["input_ids"]
    ids = [*prompt.question("Who?"), *encoded, *prompt.follow_up("Why?")]
    assert second == greedy_answer(files, start, ids, 6)
    talk = BeaconCache.load("talk.beacon")
    assert talk.token_ids[0].tolist() == [*start.token_ids[0].tolist(), *ids, *byte_tokenizer()(second)["input_ids"]]
    assert info[0].startswith(
        f"BeaconCache: {talk.tokens_seen - 1:,} tokens seen"
    )  # the last is read with what follows
    assert info[-1] == "2 turns since the chat began"
    assert "model (untrained): " in result.stderr


def test_a_saved_chat_goes_on_as_if_it_had_not_ended(run):
    args = ("--model", "{files}/adapter", "--max-new-tokens", "6")
    whole = good(run("chat", "{files}/adapter.beacon", *args, stdin="Who?\nWhy?\nWhere?\n")).splitlines()
    good(run("chat", "{files}/adapter.beacon", *args, stdin="Who?\nWhy?\n/save talk.beacon\n"))
    assert good(run("chat", "talk.beacon", *args, stdin="Where?\n")).splitlines() == whole[-1:]
    assert good(run("ask", "talk.beacon", "Where?", *args)).splitlines() == whole[-1:]


def test_what_ratio_8_would_hold_is_what_it_holds(run):
    for ratio, hints in (("auto", [USUAL]), ("2", []), ("8", [])):
        result = run(
            "compress", "{files}/text.txt", "-o", f"{ratio}.beacon", "--model", "{files}/adapter", "--ratio", ratio
        )
        assert [line for line in result.stderr.splitlines() if "auto" in line and "would" in line] == hints
    assert "29.5 KiB" in good(result)


def test_a_chat_replaces_a_file_when_it_is_told_to(run):
    args = ("chat", "{files}/adapter.beacon", "--model", "{files}/adapter", "--max-new-tokens", "3")
    result = run(*args, stdin="/save talk.beacon\nWho?\n/save talk.beacon\n/save! talk.beacon\n")
    good(result)
    assert "Error: talk.beacon exists already. Choose another name, or replace it: /save! talk.beacon" in result.stderr
    assert len(re.findall(r"^talk\.beacon: [\d,]+ bytes$", result.stderr, re.MULTILINE)) == 2


def test_an_answer_that_goes_round_in_a_circle_is_ended(run, monkeypatch):
    monkeypatch.setattr("activation_beacon.conversation.is_circle", lambda ids: len(ids) == 5)
    args = ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "40")
    result = run(*args)
    assert re.search(r"^5 tokens in [\d.]+ s; ended, since it repeats itself$", result.stderr, re.MULTILINE)
    values = loaded_json(run(*args, "--json"))
    assert (values["answer_tokens"], values["is_complete"], values["is_repeating"]) == (5, False, True)
    assert loaded_json(run(*args, "--json", "--temperature", "1"))["answer_tokens"] > 5


def test_reset_goes_back_to_the_loaded_context(run):
    args = ("chat", "{files}/adapter.beacon", "--model", "{files}/adapter", "--max-new-tokens", "6")
    answers = good(run(*args, stdin="Who?\nWhy?\n/reset\nWho?\nWhy?\n")).splitlines()
    assert answers[:2] == answers[2:]


def test_chat_needs_no_file(run, files):
    args = ("chat", "--model", "{files}/adapter", "--max-new-tokens", "6")
    result = run(*args, stdin="/save empty.beacon\nHello.\n/reset\nHello.\n")
    first, second = good(result).splitlines()
    assert first == second
    model, tokenizer = load(files / "adapter")
    ids = torch.tensor([ChatPrompt(tokenizer).message("Hello.")])
    out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert first == tokenizer.decode(out, skip_special_tokens=True)
    assert "Error: There is nothing to save yet: no text was read, and nothing was said." in result.stderr
    assert not Path("empty.beacon").exists()


def test_a_bad_line_does_not_end_the_chat(run):
    args = ("chat", "{files}/adapter.beacon", "--model", "{files}/adapter", "--max-new-tokens", "3")
    result = run(*args, stdin=f"/what\n/save\n/save {'{files}'}/text.txt\n{'long ' * 200}\n\nWho?\n")
    assert len(good(result).strip().splitlines()) == 1
    assert "/what is not a command. Commands are:" in result.stderr
    assert "/save needs the name of a file." in result.stderr
    assert "exists already" in result.stderr or "there is no folder" in result.stderr
    assert "Error: The question has 1," in result.stderr


def test_a_line_that_is_no_text_ends_its_turn_and_not_the_chat(run):
    args = ("chat", "{files}/adapter.beacon", "--model", "{files}/adapter", "--max-new-tokens", "3")
    result = run(*args, stdin=b"Who\xff?\n/what \xfe\nWho?\n")
    assert len(good(result).strip().splitlines()) == 1
    assert "Error: The message is not UTF-8: byte 0xff after 3 characters. Write it in UTF-8." in result.stderr
    assert "is not a command. Commands are:" in result.stderr


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_a_context_holds(run, files):
    model, _ = load(files / "adapter")
    assert good(run("inspect", "{files}/adapter.beacon")) == (
        f"{files}/adapter.beacon\n"
        "  kind         compressed context\n"
        "  tokens seen  902 (28 chunks, ratio 4)\n"
        "  held         224 beacons + 6 raw tokens in the tail = 230 entries\n"
        "  cache        57.5 KiB; uncompressed 225.5 KiB (3.9x)\n"
        "  saved        168.0 KiB\n"
        f"  file         {(files / 'adapter.beacon').stat().st_size / 1024:.1f} KiB\n"
        "  dtype        float32\n"
        "  next chunks  ratio 4\n"
        f"  base         {files}/base, fingerprint {model.base_fingerprint[:16]}\n"
        f"  adapter      fingerprint {model.adapter_fingerprint[:16]}\n"
        "  chunks       32 tokens, 0 sinks\n"
        "  trained      no (untrained)\n"
    )
    values = loaded_json(run("inspect", "{files}/adapter.beacon", "--json"))
    assert values["rows"][0]["beacons"] == 224
    assert values["ratio_policy"] == {"ratio": 4, "budget": None, "spans": []}


def test_inspect_tells_what_an_adapter_is(run, files):
    model, _ = load(files / "trained")
    out = good(run("inspect", "{files}/trained"))
    assert f"fingerprint       {model.adapter_fingerprint[:16]}\n" in out
    assert f"base fingerprint  {model.base_fingerprint[:16]}\n" in out
    assert "ratios            2, 4, 8\n" in out
    assert "trained           yes\n" in out
    assert "training steps    7\n" in out
    values = loaded_json(run("inspect", "{files}/adapter", "--json"))
    assert values["parameters"] == sum(parameter.numel() for _, parameter in model.beacon_parameters())
    assert values["chunk_size"] == CHUNK
    assert values["is_trained"] is False


def test_an_anchored_adapter_that_is_untrained_says_what_it_holds(run, files):
    save_adapter(Path("anchored"), files / "base", seed=4, num_sinks=2, anchored=True)
    assert "chunks            32 tokens, 2 sinks, anchored beacons\n" in good(run("inspect", "anchored"))
    assert loaded_json(run("inspect", "anchored", "--json"))["anchored"] is True
    exact = {"anchored": True, "placement": "append", "exact_ids": (5, 6, 7)}
    save_adapter(Path("exact"), files / "base", seed=4, **exact)
    shown = good(run("inspect", "exact"))
    assert (
        "chunks            32 tokens, 0 sinks, anchored beacons with 3 exact ids, beacons placed by 'append'\n" in shown
    )
    assert loaded_json(run("inspect", "exact", "--json"))["exact_ids"] == [5, 6, 7]
    result = run("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "anchored", "--ratio", "4")
    assert "held    2 sinks + 224 beacons + 6 raw tokens in the tail\n" in good(result)
    assert result.stderr.splitlines()[0] == (
        "untrained: this adapter's beacons hold one token of each unit of a compressed text, and nothing of the others."
    )


def test_inspect_knows_the_default_adapter(run):
    values = loaded_json(run("inspect", "default", "--json"))
    assert values["base_model"] == "default"
    assert values["chunk_size"] == 1024


# --- the authors' checkpoints ----------------------------------------------------------------------------------------


def test_an_adapter_goes_out_to_the_authors_layout_and_comes_back(run, files):
    out = good(run("export-official", "{files}/adapter", "{files}/base", "theirs"))
    assert re.fullmatch(r"theirs: [\d,]+ bytes\n", out)
    out = good(run("import-official", "theirs", "back", "--with-base"))
    assert out == "back: chunks of 32 tokens, ratios 2, 4, 8, 0 sinks, base model included\n"
    args = ("compress", "{files}/text.txt", "--ratio", "4", "-o")
    good(run(*args, "back.beacon", "--model", "back"))
    assert are_same(BeaconCache.load("back.beacon"), saved(files, "adapter.beacon"))
    assert loaded_json(run("import-official", "theirs", "alone", "--json"))["with_base"] is False


# --- bad input -------------------------------------------------------------------------------------------------------

COMPRESS = ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "{files}/adapter")
ASK = ("ask", "bad.beacon", "Who?", "--model", "{files}/adapter")


def write_bytes(name: str, content: bytes):
    return lambda files: Path(name).write_bytes(content)


def damaged(change):
    return lambda files: Path("bad.beacon").write_bytes(change((files / "adapter.beacon").read_bytes()))


def flip(content: bytes) -> bytes:
    middle = len(content) * 3 // 4
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty_adapter(files: Path) -> None:
    Path("hollow").mkdir()


def unknown_architecture(files: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1)).save_pretrained("mamba")
    byte_tokenizer().save_pretrained("mamba")


def no_tokenizer(files: Path) -> None:
    Path("mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (Path("mute") / name).write_bytes((files / "base" / name).read_bytes())


BAD_INPUT = {
    "missing file": (
        None,
        ("compress", "nothing.txt", "-o", "out.beacon"),
        "nothing.txt does not exist. Name a UTF-8 text file, or - for standard input.",
    ),
    "folder": (None, ("compress", ".", "-o", "out"), ". is a folder. Name a UTF-8 text file, or - for standard input."),
    "empty file": (
        write_bytes("a.txt", b""),
        ("compress", "a.txt", "-o", "out.beacon"),
        "a.txt is empty: there is no text to compress.",
    ),
    "white space": (
        write_bytes("a.txt", b" \n\t\n"),
        ("compress", "a.txt", "-o", "out.beacon"),
        "a.txt holds nothing but white space: there is no text to compress.",
    ),
    "empty standard input": (
        None,
        ("compress", "-", "-o", "out.beacon"),
        "Standard input is empty: there is no text to compress.",
    ),
    "standard input twice": (
        None,
        ("compress", "-", "-", "-o", "out.beacon"),
        "Standard input (-) can be read once; it is named twice. Name it once.",
    ),
    "binary file": (
        write_bytes("a.txt", b"text\0more"),
        ("compress", "a.txt", "-o", "out.beacon"),
        "a.txt is a binary file (or UTF-16): it has a NUL byte at offset 4. Convert it to UTF-8 text first.",
    ),
    "invalid UTF-8": (
        write_bytes("a.txt", b"caf\xe9 noir"),
        ("compress", "a.txt", "-o", "out.beacon"),
        "a.txt is not UTF-8: byte 0xe9 at offset 3. Convert it first, for example with iconv -f LATIN1 -t UTF-8.",
    ),
    "output folder missing": (
        None,
        ("compress", "{files}/text.txt", "-o", "no/out.beacon"),
        "no/out.beacon cannot be written: there is no folder no. Make it, or choose another place.",
    ),
    "output is a pipe": (
        lambda _: os.mkfifo("out.beacon"),
        ("compress", "{files}/text.txt", "--force", "-o", "out.beacon"),
        "out.beacon is a device, a pipe or the like, not a file. Name a file, such as book.beacon.",
    ),
    "output is a folder": (
        None,
        ("compress", "{files}/text.txt", "-o", "."),
        ". is a folder. Name a file, such as book.beacon.",
    ),
    "output exists": (
        write_bytes("out.beacon", b"precious"),
        COMPRESS,
        "out.beacon exists already. Choose another name, or replace it with --force.",
    ),
    "malformed ratio": (
        None,
        (*COMPRESS, "--ratio", "eight"),
        "--ratio must be \"auto\", an int such as 8, or a list such as 2,4,8 with one for each chunk; got 'eight'.",
    ),
    "ratio 7": (None, (*COMPRESS, "--ratio", "7"), "ratio (7) must divide chunk_size (32). Use 2, 4, 8."),
    "ratio 0": (
        None,
        (*COMPRESS, "--ratio", "0"),
        "A compression ratio is an int of at least 2 (raw tokens per beacon); got 0. Use 2, 4, 8.",
    ),
    "ratio larger than the chunk": (
        None,
        (*COMPRESS, "--ratio", "64"),
        "ratio (64) must not exceed chunk_size (32). Use 2, 4, 8.",
    ),
    "too few ratios": (
        None,
        (*COMPRESS, "--ratio", "2,4"),
        (
            "ratio names 2 chunks, but the text of 902 tokens closes 28. Give one ratio for each chunk of the whole text, or "
            "one int for all."
        ),
    ),
    "budget with a ratio": (
        None,
        (*COMPRESS, "--ratio", "8", "--budget", "100"),
        'A budget (100) chooses the ratio by itself and needs ratio="auto"; got 8.',
    ),
    "budget too small": (
        None,
        (*COMPRESS, "--budget", "10"),
        "budget must be at least 36 cache entries (0 sinks, 32 raw tokens, 4 beacons of one chunk at ratio 8); got 10.",
    ),
    "adapter without config": (
        empty_adapter,
        ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "hollow"),
        "hollow holds no adapter: beacon_config.json is missing. Name a folder that save_pretrained wrote.",
    ),
    "adapter of nowhere": (
        None,
        ("compress", "{files}/text.txt", "-o", "out.beacon", "--model", "./nowhere"),
        "nowhere holds no adapter: beacon_config.json is missing. Name a folder that save_pretrained wrote.",
    ),
    "base without tokenizer": (
        no_tokenizer,
        (*COMPRESS, "--base", "mute"),
        (
            "The base model of {files}/adapter has no tokenizer, and text cannot be read without one. Put its tokenizer.json "
            "beside the base model's config.json."
        ),
    ),
    "context from another base": (
        None,
        ("ask", "{files}/of-other-base.beacon", "Who?", "--model", "{files}/adapter"),
        (
            r"The context was made with another base model \(fingerprint \w{{16}}, this one has \w{{16}}\)\. Compress the text "
            r"again with this model, or load the one that made it\. \(--model {files}/adapter\)"
        ),
    ),
    "context from another adapter": (
        None,
        ("ask", "{files}/trained.beacon", "Who?", "--model", "{files}/adapter"),
        (
            r"The context was made with another adapter \(fingerprint \w{{16}}, this one has \w{{16}}\)\. Compress the text "
            r"again with this model, or load the one that made it\. \(--model {files}/adapter\)"
        ),
    ),
    "no context": (
        None,
        ASK,
        "bad.beacon does not exist. Name a file that `beacon compress` or context.save wrote.",
    ),
    "truncated context": (
        damaged(lambda content: content[:-100]),
        ASK,
        r"bad\.beacon is damaged, cut short, or not a compressed context \(.*\)\. Compress the text again\.",
    ),
    "empty context": (
        damaged(lambda content: b""),
        ASK,
        r"bad\.beacon is damaged, cut short, or not a compressed context \(.*\)\. Compress the text again\.",
    ),
    "bit-flipped context": (
        damaged(flip),
        ASK,
        "bad.beacon is damaged: its contents do not match their SHA-256. Compress the text again.",
    ),
    "bit-flipped context, inspected": (
        damaged(flip),
        ("inspect", "bad.beacon"),
        "bad.beacon is damaged: its contents do not match their SHA-256. Compress the text again.",
    ),
    "text given to ask": (
        None,
        ("ask", "{files}/text.txt", "Who?"),
        (
            "{files}/text.txt is a text, not a compressed context. Compress it first: beacon compress {files}/text.txt -o "
            "{files}/text.beacon"
        ),
    ),
    "text given to chat": (
        None,
        ("chat", "{files}/text.txt"),
        (
            "{files}/text.txt is a text, not a compressed context. Compress it first: beacon compress {files}/text.txt -o "
            "{files}/text.beacon"
        ),
    ),
    "question longer than the window": (
        None,
        ("ask", "{files}/adapter.beacon", "why " * 200, "--model", "{files}/adapter"),
        (
            "The question has 806 tokens; the base model reads 640 at once. Put what is long into a text, compress it (beacon "
            "compress TEXT... -o FILE), and ask about it in fewer words."
        ),
    ),
    "empty question": (
        None,
        ("ask", "{files}/adapter.beacon", " ", "--model", "{files}/adapter"),
        "The question is empty. Write at least one word.",
    ),
    "answer that cannot fit": (
        None,
        ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "3000"),
        r"A text of [\d,]+ tokens needs [\d,]+ positions at ratio 4; the base model has 640\. .*",
    ),
    "answer longer than any ratio allows": (
        None,
        ("ask", "{files}/adapter.beacon", "Who?", "--model", "{files}/adapter", "--max-new-tokens", "2147483647"),
        r"A text of [\d,]+ tokens needs [\d,]+ cache entries at ratio 8, the largest .* has 640\. Read at most 4,896 tokens\.",
    ),
    "unknown architecture": (
        unknown_architecture,
        (*COMPRESS, "--base", "mamba"),
        r".*Mamba.*",
    ),
    "base of nowhere": (
        None,
        (*COMPRESS, "--base", "./nowhere"),
        r"There is no folder './nowhere'\. Give \"default\", a folder .*",
    ),
    "device that is not there": (
        None,
        (*COMPRESS, "--device", "abacus"),
        r'Device "abacus" cannot be used: .*',
    ),
    "nothing to inspect": (
        None,
        ("inspect", "nothing"),
        "nothing does not exist. Name a context file, an adapter folder, or default.",
    ),
    "folder that is no adapter, inspected": (
        empty_adapter,
        ("inspect", "hollow"),
        "hollow holds no adapter: beacon_config.json is missing. Name a folder that save_pretrained wrote.",
    ),
    "import of nothing": (
        empty_adapter,
        ("import-official", "hollow", "out"),
        "hollow/config.json cannot be read: No such file or directory. Name a folder with config.json and safetensors.",
    ),
    "export over a folder in use": (
        lambda files: (Path("out").mkdir(), Path("out/mine").touch()),
        ("export-official", "{files}/adapter", "{files}/base", "out"),
        "out exists already and is not empty. Choose another folder for what comes of {files}/adapter.",
    ),
    "malformed ratios of the demo": (
        None,
        ("demo", "--ratios", "2,x"),
        "--ratios must be ints such as 2,8,32; got '2,x'.",
    ),
    "ratio of the demo": (
        None,
        ("demo", "--ratios", "3", "--out", "out"),
        "ratio (3) must divide chunk_size (1024). Use 2, 4, 8, 16, 32.",
    ),
    "questions on nothing": (
        None,
        ("make-questions",),
        "There is nothing to ask about. Name texts, or questions with --questions.",
    ),
    "questions over a file": (
        write_bytes("own.jsonl", b"mine"),
        ("make-questions", "{files}/text.txt", "-o", "own.jsonl"),
        "own.jsonl exists already. Choose another name, or replace it with --force.",
    ),
    "questions into a folder": (
        None,
        ("make-questions", "{files}/text.txt", "-o", "."),
        ". is a folder. Name a file, such as own-words.jsonl.",
    ),
    "questions on short texts": (
        None,
        ("make-questions", "{files}/text.txt"),
        "No document has 2,000 characters to hide needles in. Name longer texts.",
    ),
    "questions of an unknown kind": (
        None,
        ("make-questions", "{files}/text.txt", "--kinds", "fact, sword"),
        "There is no needle of kind 'sword'. Use some of .*",
    ),
    "questions on texts of nowhere": (
        None,
        ("make-questions", "./nothing.txt"),
        r".*nothing\.txt.*",
    ),
    "questions to a model of nowhere": (
        write_bytes("long.txt", b"A lion slept. " * 200),
        ("make-questions", "long.txt", "--base", "./nowhere"),
        r"There is no folder './nowhere'\. Give \"default\", a folder .*",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gives_one_line_and_leaves_nothing_behind(run, files, tmp_path, name):
    prepare, args, message = BAD_INPUT[name]
    if prepare is not None:
        prepare(files)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    result = run(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    *notices, line = result.stderr.splitlines()
    assert [text for text in notices if text != UNTRAINED and not text.startswith("compressing at ratio")] == []
    expected = "Error: " + message.format(files=files)
    assert line == expected or re.fullmatch(expected, line)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_questions_are_written_with_the_bases_answers(run, monkeypatch, tmp_path):
    from activation_beacon.training.own_words import BaseAnswers

    Path("long.txt").write_text("A lion slept under the tree. " * 200, encoding="utf-8")
    (tmp_path / "asked.jsonl").write_text(
        '{"context": "The lion slept.", "question": "Who slept?", "answer": "lion"}\n'
    )
    args = ("make-questions", "long.txt", "--questions", "asked.jsonl", "--needles", "6", "--base", "{files}/base")
    monkeypatch.setattr(BaseAnswers, "fits", lambda self, question: True)  # of a model with a token for each letter
    made = run(*args, "--max-new-tokens", "4")
    assert made.exit_code == 1  # a random model
    assert made.stderr.splitlines()[-1].startswith("Error: The base model answered none of 7 questions rightly (")
    monkeypatch.setattr(BaseAnswers, "batch", lambda self, questions: [f"It is {each.answer}." for each in questions])
    made = run(*args, "-o", "own.jsonl")
    assert re.fullmatch(
        r"own\.jsonl\n  all +7 of +7 kept\n(  needles: \w+ +\d of +\d kept\n)+  questions +1 of +1 kept\n"
        r"  left out: 0 wrong, 0 without an end, 0 too long for the base\n"
        r"  train with: beacon train TEXT... --questions own\.jsonl -o my-run\n",
        good(made),
    )
    lines = Path("own.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    assert any(json.loads(line)["answers"] == ["It is lion.", "lion"] for line in lines)
    values = loaded_json(run(*args, "-o", "own.jsonl", "--force", "--json"))
    assert (values["file"], values["asked"], values["kept"]) == ("own.jsonl", 7, 7)
    assert Path("own.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_a_context_that_was_compressed_plain_says_how_to_be_asked(run):
    good(run("compress", "{files}/text.txt", "-o", "plain.beacon", "--model", "{files}/adapter", "--plain"))
    for args in (("ask", "plain.beacon", "Who?"), ("chat", "plain.beacon")):
        result = run(*args, "--model", "{files}/adapter")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            "Error: The context does not open with this model's chat template (it was compressed with --plain, or without "
            "ChatPrompt.opening). Ask with --plain: the question then follows the text as it is."
        )


def test_a_full_disk_leaves_the_older_file_as_it_was(run, monkeypatch, tmp_path):
    Path("out.beacon").write_text("precious")

    def full(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("activation_beacon.files.save_file", full)
    result = run(*COMPRESS, "--force")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "Error: out.beacon cannot be written: No space left on device. Nothing was changed; free space or choose another "
        "place."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.beacon"]
    assert Path("out.beacon").read_text() == "precious"


def test_too_little_memory_is_one_line(run, monkeypatch):
    def exhausted(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("activation_beacon.hub.load", exhausted)
    result = run(*COMPRESS)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: There is not enough memory. Use a larger --ratio, --dtype bfloat16, or a smaller model.\n"
    )


def test_our_own_mistakes_keep_their_traceback(run, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("activation_beacon.hub.load", broken)
    assert isinstance(run(*COMPRESS).exception, ZeroDivisionError)


# --- processes -------------------------------------------------------------------------------------------------------


def process(*args: str, **options: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    # A shell that runs the tests in the background may have them ignore Ctrl-C, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([*BEACON, *args], text=True, env=environment, **pipes, **options)


def test_ctrl_c_leaves_nothing_half_written(files, tmp_path):
    """A text that takes half a minute, interrupted as soon as compressing has begun."""
    save_base(tmp_path / "base", seed=0)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    (tmp_path / "work").mkdir()
    (tmp_path / "work/long.txt").write_text(TEXT * 300)
    args = (
        "compress",
        "long.txt",
        "-o",
        "out.beacon",
        "--model",
        str(files / "adapter"),
        "--base",
        str(tmp_path / "base"),
    )
    with process(*args, cwd=tmp_path / "work") as running:
        lines = list(itertools.takewhile(lambda line: not line.startswith("compressing"), running.stderr))
        assert lines[-2] == f"{UNTRAINED}\n"  # on a slow machine, progress of loading stands before it
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert (out, err.splitlines()[-1]) == ("", "Interrupted: nothing was left half-written.")
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["long.txt"]


def test_ctrl_c_that_falls_into_the_end_of_an_object_is_not_passed_over():
    script = """
import sys, time
from activation_beacon.cli import interrupt_again
class Interrupted:
    def __del__(self):
        raise KeyboardInterrupt
sys.unraisablehook = interrupt_again
made = Interrupted()
try:
    del made
    print("goes on")
    time.sleep(60)
except KeyboardInterrupt:
    print("ends")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("goes on\nends\n", "")


def test_ctrl_c_stops_an_answer_but_not_the_chat(files):
    args = ("chat", str(files / "adapter.beacon"), "--model", str(files / "adapter"), "--max-new-tokens", "1500")
    with process(*args) as running:
        running.stdin.write("Who?\n")
        running.stdin.flush()
        opening = f"{UNTRAINED}\nmodel (untrained): \n"
        assert running.stderr.read(len(opening)) == opening
        running.send_signal(signal.SIGINT)  # at once: later the answer may have ended by itself
        out, err = running.communicate("/info\n", timeout=60)
    assert running.returncode == 0, err
    assert err == "(stopped)\n"
    assert out.endswith("\n1 turn since the chat began\n")


def test_the_output_of_a_process_is_clean(files, tmp_path):
    args = ("compress", str(files / "text.txt"), "-o", "out.beacon", "--model", str(files / "adapter"), "--json")
    with process(*args, cwd=tmp_path) as running:
        out, err = running.communicate(timeout=60)
    assert json.loads(out)["tokens"] == 902
    assert err.splitlines() == [UNTRAINED, USUAL, "compressing at ratio 2: 902 tokens"]
    args = ("ask", "out.beacon", "Who?", "--model", str(files / "adapter"), "--max-new-tokens", "2")
    with process(*args, cwd=tmp_path) as running:
        out, err = running.communicate(timeout=60)
    assert re.fullmatch(rf"{re.escape(UNTRAINED)}\n2 tokens in [\d.]+ s\n", err)


def test_a_reader_that_goes_away_is_no_error_of_ours(files):
    done = subprocess.run(
        f"{sys.executable} -m activation_beacon inspect {files}/adapter.beacon | true", shell=True, capture_output=True
    )
    assert b"Traceback" not in done.stderr


def ended(command: str, **environment: str) -> subprocess.CompletedProcess:
    """A shell command that has a beacon command in it."""
    python = f"{sys.executable} -m activation_beacon"
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command.replace("beacon ", f"{python} ", 1), shell=True, capture_output=True, env=settings)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "beacon inspect {files}/adapter.beacon >/dev/full",
            "The output cannot be written: No space left on device. Let it",
        ),
        ("beacon --help >/dev/full", "The output cannot be written: No space left on device. Let it"),
        ("beacon compress --help >/dev/full", "The output cannot be written: No space left on device. Let it"),
        (
            "beacon ask {files}/adapter.beacon W --model {files}/adapter >/dev/full",
            "The output cannot be written: No space",
        ),
        (
            "beacon compress - -o {out} <&-",
            "Standard input is closed. Leave it open, or send something through a pipe.",
        ),
        (
            "beacon chat --model {files}/adapter <&-",
            "Standard input is closed. Leave it open, or send something through",
        ),
        (
            r"beacon ask {files}/adapter.beacon $(printf 'Who\377') --model {files}/adapter",
            "The question is not UTF-8: byte 0xff",
        ),
    ],
)
def test_a_shell_that_gives_nothing_to_read_or_write_is_one_line(files, tmp_path, command, message):
    done = ended(command.format(files=files, out=tmp_path / "out.beacon"))
    lines = [line for line in done.stderr.decode().splitlines() if line != UNTRAINED]
    assert (done.returncode, done.stdout) == (1, b"")
    assert len(lines) == 1
    assert lines[0].startswith(f"Error: {message}")


def test_letters_that_a_terminal_does_not_have_do_not_end_an_answer(files):
    args = f"{files}/adapter.beacon 'Who \N{KELVIN SIGN}?' --model {files}/adapter --max-new-tokens 3 --json"
    done = ended(f"beacon ask {args}", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("latin-1"))["question"] == "Who ??"


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_seeds_that_numpy_does_not_take_are_refused(run, command, seed):
    result = run(command, "x.beacon", *(["Who?"] if command == "ask" else []), "--seed", seed)
    assert result.exit_code == 2
    assert "Invalid value for '--seed': " in result.stderr


def test_the_largest_seed_is_taken(run):
    args = (
        "ask",
        "{files}/adapter.beacon",
        "Who?",
        "--model",
        "{files}/adapter",
        "--max-new-tokens",
        "4",
        "--temperature",
        "1",
    )
    first, again = (loaded_json(run(*args, "--json", "--seed", str(2**32 - 1)))["answer"] for _ in range(2))
    assert first == again


# --- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_book(monkeypatch):
    monkeypatch.setattr("activation_beacon.books.read_demo_book", lambda: TEXT)
    monkeypatch.setattr("activation_beacon.cli.demo.NUM_TARGETS", 64)


def test_demo_compares_ratios_and_no_compression(run, small_book, tmp_path):
    result = run("demo", "--model", "{files}/adapter", "--ratios", "2,8")
    out = good(result)
    assert re.search(r"\n  2 +902 +448 +6 +113\.5 KiB +2\.0x +[\d.]+ +[\d.]+ KiB +the same\n", out)
    assert re.search(r"\n  8 +902 +112 +6 +29\.5 KiB +7\.6x +[\d.]+ +[\d.]+ KiB +the same\n", out)
    assert "takes 225.5 KiB,\nand the base model has 640 positions: 262 tokens are beyond them.\n" in out
    assert re.search(r"\n  base alone, the whole book, full attention +902 +225\.5 KiB +\d\.\d\d\n", out)
    assert re.search(r"\n  base alone, the last 640 tokens +640 +160\.0 KiB +\d\.\d\d\n", out)
    assert "\nThe base's shorter window is as large as the cache at ratio 8:\n" in out
    assert re.search(r"\n  base alone, the last 118 tokens +118 +29\.5 KiB +\d\.\d\d\n", out)
    assert re.search(r"\n  base alone, nothing before them +65 +16\.2 KiB +\d\.\d\d\n", out)
    assert re.search(r"\n  beacons, ratio 8 \(untrained\) +118 +29\.5 KiB +\d\.\d\d\n", out)
    assert out.count("(untrained)") == 7
    assert UNTRAINED in result.stderr
    assert max(len(line) for line in out.splitlines() if not line.startswith("  model")) <= 80
    assert list(tmp_path.iterdir()) == []


def test_the_losses_of_the_demo_are_those_of_the_models(run, small_book, files):
    values = loaded_json(run("demo", "--model", "{files}/adapter", "--ratios", "4", "--json"))
    model, tokenizer = load(files / "adapter")
    ids = torch.tensor([ChatPrompt(tokenizer).opening(TEXT)])
    with torch.no_grad(), model.beacon_disabled():
        whole = torch.nn.functional.cross_entropy(model(ids).logits[0, -65:-1], ids[0, -64:])
        windows = [
            torch.nn.functional.cross_entropy(model(ids[:, -count:]).logits[0, -65:-1], ids[0, -64:])
            for count in (640, values["nats_per_token"][-1]["cache_length"], 65)
        ]
    with torch.no_grad():
        beacons = model(ids, labels=ids, beacon_ratio=4).nll[0, -64:].mean()
    nats = [reading["nats"] for reading in values["nats_per_token"]]
    assert nats == pytest.approx([float(whole), *map(float, windows), float(beacons)], abs=2e-4)
    assert values["uncompressed_bytes"] == 902 * values["nats_per_token"][1]["cache_bytes"] // 640


def test_demo_keeps_its_files_where_it_is_told(run, small_book, files):
    args = ("demo", "--model", "{files}/adapter", "--quick", "--json", "--out", "kept/here")
    values = loaded_json(run(*args))
    assert [run["ratio"] for run in values["ratios"]] == [8]
    assert values["nats_per_token"] == []
    assert len(values["answers"]) == 3
    assert values["notice"] == UNTRAINED
    assert BeaconCache.load(values["ratios"][0]["file"]).tokens_seen == 902
    assert "exists already" in run(*args).stderr
    good(run(*args, "--force"))


@pytest.mark.default_model
@pytest.mark.slow
def test_demo_runs_on_the_default_model(run, monkeypatch):
    from activation_beacon import books

    opening = books.read_demo_book()[:36_000]  # longer than the positions, and shorter than the whole
    monkeypatch.setattr("activation_beacon.books.read_demo_book", lambda: opening)
    values = loaded_json(run("demo", "--quick", "--ratios", "8", "--json", "--out", "kept"))
    assert values["tokens"] > values["max_positions"] == 8192
    assert values["ratios"][0]["is_same_after_loading"]
    assert values["ratios"][0]["cache_bytes"] * 4 < values["uncompressed_bytes"]
    assert [answer["question"] for answer in values["answers"]] == list(books.DEMO_QUESTIONS)
    assert Path("kept/book-ratio-8.beacon").stat().st_size == values["ratios"][0]["file_bytes"]
