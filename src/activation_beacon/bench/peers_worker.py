"""The process that times kvpress: a job a line comes in, what was measured goes out, as JSON. It knows nothing of this package.

It runs in an environment that has kvpress and an older transformers: `python -I peers_worker.py --help`. Its last line on
stderr says what went wrong, if something did.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

SUPPORTED = "0.5."  # versions of kvpress whose presses work as is written here
SLACK = 1e-3  # of an entry: presses cut fractions off, and a share of the length need not be a round number
BY = ("kvpress", "transformers", "torch")

try:
    import torch
    from kvpress import ExpectedAttentionPress, KnormPress, PyramidKVPress, SnapKVPress
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(f"{sys.executable} cannot run kvpress ({error})")

PRESSES = {
    "snapkv": SnapKVPress,
    "expected-attention": ExpectedAttentionPress,
    "pyramidkv": PyramidKVPress,
    "knorm": KnormPress,
}


class Pressed:
    """A model that is called as ours is: its first call reads a text under a press, its later ones go on at the text's end."""

    def __init__(self, model: Any, press: Any) -> None:
        self.model, self.press, self.position = model, press, 0

    def __call__(self, ids: Any, **options: Any) -> Any:
        """Logits of ids (B, T)."""
        positions = torch.arange(self.position, self.position + ids.shape[1], device=ids.device)[None]
        with contextlib.nullcontext() if self.position else self.press(self.model):
            output = self.model(ids, position_ids=positions, **options)
        self.position += ids.shape[1]
        return output


def run(timing: Any, model: Any, job: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of one job; None if it does not fit the GPU. What memory is left over is given back to the GPU."""
    found = None
    with contextlib.suppress(torch.OutOfMemoryError):
        found = measured(timing, model, job)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def measured(timing: Any, model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Read and continue a text under a press."""
    length = job["length"]
    press = PRESSES[job["press"]](compression_ratio=max(0.0, 1 - (job["entries"] + SLACK) / length))
    ids = timing.random_ids(job["vocabulary"], job["batch_size"], length, model.device)
    found = timing.timed(Pressed(model, press), DynamicCache(), ids, job["num_new"])
    return {**found.to_dict(), "by": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in BY)}


def timing_module() -> Any:
    """The file beside this one that times all ways, loaded without its package."""
    spec = importlib.util.spec_from_file_location("timing", Path(__file__).with_name("timing.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["timing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(options: argparse.Namespace) -> Any:
    """The base model, or one of its configuration with random weights."""
    dtype = getattr(torch, options.dtype)
    if options.config is None:
        model = AutoModelForCausalLM.from_pretrained(
            options.base, revision=options.revision, dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(options.device).eval()
    with torch.device(options.device):
        config = AutoConfig.from_pretrained(options.config)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def main() -> None:
    """Time jobs as long as some come."""
    parser = argparse.ArgumentParser(description="Time kvpress on random tokens; jobs come as JSON lines.")
    parser.add_argument("--base", help="the base model: a folder or a hub id")
    parser.add_argument("--config", help="a folder with a configuration, for random weights instead")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes where it does no harm
    if not (found := importlib.metadata.version("kvpress")).startswith(SUPPORTED):
        sys.exit(f"{sys.executable} has kvpress {found}; {SUPPORTED}x is needed")
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    timing, model = timing_module(), load(options)
    with torch.no_grad():
        for line in sys.stdin:
            print(json.dumps({"run": run(timing, model, json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
