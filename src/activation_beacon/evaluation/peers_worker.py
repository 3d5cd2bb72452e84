"""The process that runs kvpress: jobs in, answers out, as JSON lines. It knows nothing of this package.

It runs in an environment that has kvpress and an older transformers: `python -I peers_worker.py --help`. Its last line on stderr
says what went wrong, if something did. What stands in the answers' file already is not done again.

A context is read once, for all methods and sizes together: a press looks at a layer's keys and values when attention is done with
them, and what it drops there does not change what the later layers read. Questions are then answered for all of them together too,
one pass for a token of each; in it every row attends to its own entries, and to those of them that its press has left visible.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = "0.5."  # versions of kvpress whose presses work as is written here
PLAIN = "none"  # reads and answers without a press
SLACK = 1e-3  # of an entry: presses cut fractions off, and a share of the length need not be a round number
BY = ("kvpress", "transformers", "torch")

try:
    import torch
    from kvpress import (
        BasePress,
        ExpectedAttentionPress,
        KnormPress,
        KVzipPress,
        PyramidKVPress,
        SnapKVPress,
        StreamingLLMPress,
    )
    from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
    from transformers.cache_utils import DynamicLayer
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(f"{sys.executable} cannot run kvpress ({error})")

PRESSES = {
    "snapkv": SnapKVPress,
    "expected-attention": ExpectedAttentionPress,
    "pyramidkv": PyramidKVPress,
    "knorm": KnormPress,
    "streaming-llm-kvpress": StreamingLLMPress,
}
MASKING = "kvzip"


@dataclass
class Held:
    """What is left of a context.

    Attributes:
        cache: keys and values.
        seconds: that it took.
        masks: of each layer, the entries that attention is not to see; None where what is dropped is gone.
    """

    cache: Any
    seconds: float
    masks: list[Any] | None = None

    def num_entries(self) -> float:
        """Entries that attention sees, in the mean over layers and heads."""
        heads = self.cache.layers[0].keys.shape[1]
        held = sum(layer.keys.shape[2] * heads for layer in self.cache.layers)
        hidden = sum(len(mask[0]) for mask in self.masks or ())
        return (held - hidden) / (heads * len(self.cache.layers))

    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Several(BasePress):
    """Several presses on one reading, each into a cache of its own; the model's cache stays whole."""

    def __init__(self, presses: Sequence[Any]) -> None:
        self.presses = presses
        self.helds = [Held(DynamicCache(), 0.0) for _ in presses]

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Called by kvpress after each layer's attention."""
        for press, held in zip(self.presses, self.helds, strict=True):
            start = clock()
            kept = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            held.cache.update(*kept, module.layer_idx)
            held.seconds += clock() - start
        return keys, values


class SeveralMasks(KVzipPress):
    """KVzip at several sizes: its scores, which take two more readings of the context, do not depend on the size."""

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__(compression_ratio=max(shares))
        self.shares = shares
        self.masks: list[list[Any]] = []

    def compress_post(self, model: Any) -> None:
        """Called by kvpress when the scores are there."""
        for share in self.shares:
            self.compression_ratio = share
            super().compress_post(model)
            self.masks.append([layer.self_attn.masked_key_indices for layer in model.model.layers])


def read(model: Any, job: dict[str, Any]) -> list[Held]:
    """The context of a job as each of its ways holds it."""
    length = len(job["context"])
    shares = [max(0.0, 1 - (way["entries"] + SLACK) / length) for way in job["ways"]]
    names = [way["press"] if share else PLAIN for way, share in zip(job["ways"], shares, strict=True)]
    pairs = list(zip(names, shares, strict=True))
    several = Several([PRESSES[name](compression_ratio=share) for name, share in pairs if name in PRESSES])
    masking = [share for name, share in pairs if name == MASKING]
    kvzip = SeveralMasks(masking) if masking else None
    cache = DynamicCache()
    with kvzip(model) if kvzip else contextlib.nullcontext():  # it loads a tokenizer here
        start = clock()
        if kvzip is not None:
            kvzip.prefix_length = job["opening"]  # it takes a chat template for granted
        with several(model):
            model.model(input_ids=row(model, job["context"]), past_key_values=cache)
        middle = clock()
    plain_seconds = middle - start - sum(held.seconds for held in several.helds)
    masked_seconds = plain_seconds + clock() - middle
    for held in several.helds:
        held.seconds += plain_seconds
    pressed = iter(several.helds)
    masks = iter(kvzip.masks if kvzip else ())
    return [
        next(pressed)
        if name in PRESSES
        else Held(cache, masked_seconds, next(masks))
        if name == MASKING
        else Held(cache, plain_seconds)
        for name in names
    ]


class RowsLayer(DynamicLayer):
    """One layer of several caches of one row, with room for what is written.

    Args:
        layers: of each row.
        masked: of each row, the entries that attention is not to see, as kvpress has them; None where it sees all.
        num_new: entries to come.
    """

    def __init__(self, layers: Sequence[Any], masked: Sequence[Any], num_new: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.filled = [layer.keys.shape[2] for layer in layers]
        self.rows = [
            (with_room(layer.keys, num_new), with_room(layer.values, num_new), visible(layer.keys, indices, num_new))
            for layer, indices in zip(layers, masked, strict=True)
        ]

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """Append entries to each row; the new keys carry the rows to `attend_rows`."""
        key_states.rows = []
        for number, (keys, values, seen) in enumerate(self.rows):
            start = self.filled[number]
            self.filled[number] = stop = start + key_states.shape[2]
            keys[:, :, start:stop] = key_states[number]
            values[:, :, start:stop] = value_states[number]
            whole = keys[:, :, :stop], values[:, :, :stop], seen if seen is None else seen[..., :stop]
            key_states.rows.append(whole)
        return key_states, value_states

    def keep(self, numbers: Sequence[int]) -> None:
        """Drop the other rows."""
        self.rows, self.filled = [self.rows[n] for n in numbers], [self.filled[n] for n in numbers]

    def get_seq_length(self) -> int:
        """Entries of the longest row."""
        return max(self.filled)


def visible(keys: Any, masked: Any, num_new: int) -> Any:
    """What attention sees of (1, K, S, D) and of what is to come, (1, K, 1, S + num_new); None if that is all."""
    if masked is None:
        return None
    seen = torch.ones(1, keys.shape[1], 1, keys.shape[2] + num_new, dtype=torch.bool, device=keys.device)
    rows, heads, places = masked
    seen[rows, heads, 0, places] = False
    return seen


def attend_rows(
    _module: Any, query: Any, key: Any, _value: Any, _mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """Attention of each row's queries, (B, H, N, D), to the row's own entries; heads that share a key stand as its queries."""
    outputs = []
    for own, (keys, values, seen) in zip(query, key.rows, strict=True):
        shared = own.reshape(1, keys.shape[1], -1, own.shape[-1])
        mask = mask_of(own, keys, seen, kwargs.get("sliding_window"))
        output = torch.nn.functional.scaled_dot_product_attention(shared, keys, values, attn_mask=mask, scale=scaling)
        outputs.append(output.reshape(1, *own.shape).transpose(1, 2))
    return torch.cat(outputs), None


def mask_of(queries: Any, keys: Any, seen: Any, window: int | None) -> Any:
    """Which of a row's keys its last tokens see, (1, K, G * N, S) for queries (H, N, D); None if all."""
    heads, num, _ = queries.shape
    count = keys.shape[2]
    if num == 1 and window is None:
        return seen
    ends = torch.arange(count - num, count, device=keys.device)[:, None]
    places = torch.arange(count, device=keys.device)
    mask = places <= ends
    if window is not None:
        mask &= places > ends - window
    if seen is not None:
        mask = mask & seen
    return mask.expand(1, keys.shape[1], num, count).repeat(1, 1, heads // keys.shape[1], 1)


def answers_of(model: Any, helds: Sequence[Held], job: dict[str, Any]) -> list[list[tuple[list[int], float]]]:
    """The answers of each way to all questions, and the seconds; what is done together is shared out evenly.

    Alone go conversations, whose turns depend on the answers before.
    """
    if job["is_conversation"]:
        return [list(answer_turns(model, held, job)) for held in helds]
    last = len(job["questions"]) - 1
    together = [
        answer_together(model, helds, job, question, is_last=number == last)
        for number, question in enumerate(job["questions"])
    ]
    return [list(answers) for answers in zip(*together, strict=True)]


def answer_together(
    model: Any, helds: Sequence[Held], job: dict[str, Any], question: dict[str, Any], *, is_last: bool
) -> list[tuple[list[int], float]]:
    """The answer to a question from each of several ways to hold the context; after the last one they hold nothing."""
    start, position = clock(), len(job["context"])
    put_masks(model, None)  # each row has its own
    rows = rows_of(helds, len(question["ids"]) + question["max_new_tokens"], is_last=is_last)
    answers: list[list[int]] = [[] for _ in helds]
    writing = list(range(len(helds)))
    read = [question["ids"]] * len(helds)
    while True:
        tokens = step_rows(model, rows, read, position)
        position += len(read[0])
        kept = []
        for number, (answer, token) in enumerate(zip(writing, tokens, strict=True)):
            if token not in job["end_ids"]:
                answers[answer].append(token)
                if len(answers[answer]) < question["max_new_tokens"]:
                    kept.append(number)
        if not kept:
            break
        if len(kept) < len(writing):
            writing = [writing[number] for number in kept]
            for layer in rows.layers:
                layer.keep(kept)
        read = [answers[answer][-1:] for answer in writing]
    share = (clock() - start) / len(answers)
    return [(answer, share) for answer in answers]


def rows_of(helds: Sequence[Held], num_new: int, *, is_last: bool) -> Any:
    """One cache of which each row is what a way holds; for the last time, layers are let go of when they have been copied."""
    cache = DynamicCache()
    for number in range(len(helds[0].cache.layers)):
        layers = [held.cache.layers[number] for held in helds]
        masked = [held.masks and held.masks[number] for held in helds]
        cache.layers.append(RowsLayer(layers, masked, num_new))
        if is_last:
            for held in helds:
                held.cache.layers[number] = None
    return cache


def step_rows(model: Any, cache: Any, rows: Sequence[Sequence[int]], position: int) -> list[int]:
    """The likeliest tokens after as many tokens of each row, the first of which stand at `position`."""
    before, model.config._attn_implementation = model.config._attn_implementation, "rows"
    taken_as_it_is = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # `attend_rows` has masks of its own
    try:
        logits = model(
            input_ids=torch.tensor(rows, device=model.device),
            position_ids=torch.arange(position, position + len(rows[0]), device=model.device)[None],
            attention_mask=taken_as_it_is,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
    finally:
        model.config._attn_implementation = before
    return [int(token) for token in logits[:, -1].argmax(-1)]


def with_room(tensor: Any, num_new: int) -> Any:
    """A copy (1, K, S + num_new, D) of (1, K, S, D)."""
    whole = tensor.new_empty((*tensor.shape[:2], tensor.shape[2] + num_new, tensor.shape[3]))
    whole[:, :, : tensor.shape[2]] = tensor
    return whole


def put_masks(model: Any, masks: Sequence[Any] | None) -> None:
    """Tell the layers which entries attention is not to see."""
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.masked_key_indices = masks[number] if masks else None


def answer_turns(model: Any, held: Held, job: dict[str, Any]) -> Iterator[tuple[list[int], float]]:
    """The answer to each question of a conversation, without its end mark, and the seconds that it took."""
    put_masks(model, held.masks)
    cache, position = copied(held.cache), len(job["context"])
    unread: list[int] = []
    for question in job["questions"]:
        start = clock()
        ids = [*unread, *question["ids"]]
        logits = read_question(model, cache, ids, position, one_by_one=held.masks is not None)
        position += len(ids)
        answer, has_ended = generate(model, cache, logits, position, question["max_new_tokens"], job["end_ids"])
        yield answer, clock() - start
        unread = [] if has_ended else answer[-1:]
        position += len(answer) - len(unread)


def read_question(model: Any, cache: Any, ids: list[int], position: int, *, one_by_one: bool) -> Any:
    """The logits after a question. Positions go on from the length of the context, as in kvpress's pipeline.

    Token by token where kvpress cannot do better: where layers differ in length transformers has no mask for several tokens, and
    masking looks for a key that no query of a pass attends to, which many queries may not have.
    """
    if len({layer.keys.shape[2] for layer in cache.layers}) > 1:
        one_by_one = True
    for piece in [[token] for token in ids] if one_by_one else [ids]:
        logits = step(model, cache, piece, position)
        position += len(piece)
    return logits


def generate(
    model: Any, cache: Any, logits: Any, position: int, max_new_tokens: int, end_ids: list[int]
) -> tuple[list[int], bool]:
    """What follows greedily, and whether an end mark ended it; kvpress's own pipeline does not heed one that comes first."""
    answer: list[int] = []
    while (token := int(logits.argmax())) not in end_ids:
        answer.append(token)
        if len(answer) == max_new_tokens:
            return answer, False
        logits = step(model, cache, [token], position)
        position += 1
    return answer, True


def step(model: Any, cache: Any, ids: list[int], position: int) -> Any:
    """The logits after `ids`, whose first stands at `position`."""
    positions = torch.arange(position, position + len(ids), device=model.device).unsqueeze(0)
    output = model(input_ids=row(model, ids), past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return output.logits[0, -1]


def copied(cache: Any) -> Any:
    """A cache that goes on by itself; tensors are shared, since layers replace rather than change them."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def row(model: Any, ids: Sequence[int]) -> Any:
    """Ids as a batch of one."""
    return torch.tensor([list(ids)], device=model.device)


def clock() -> float:
    """Seconds, when the device is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- files -----------------------------------------------------------------------------------------------------------


def run(model: Any, jobs: Sequence[dict[str, Any]], path: Path) -> None:
    """Do what is not done yet, and append it to the file of answers."""
    done = {(line["job"], line["press"], line["entries"]) for line in finished(path)}
    by = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in BY)
    with path.open("ab") as file:
        for job in jobs:
            job["ways"] = [way for way in job["ways"] if (job["id"], way["press"], way["entries"]) not in done]
            if not job["ways"]:
                continue
            note(f"reading {len(job['context']):,} tokens")
            helds = read(model, job)
            note(f"answering in {len(helds)} ways")
            sizes = [(held.num_entries(), held.num_bytes()) for held in helds]
            answered = answers_of(model, helds, job)
            for way, held, (num_entries, num_bytes), answers in zip(job["ways"], helds, sizes, answered, strict=True):
                line = {
                    "job": job["id"],
                    **way,
                    "answers": [ids for ids, _ in answers],
                    "cache_length": num_entries,
                    "cache_bytes": num_bytes,
                    "only_masks": held.masks is not None,
                    "read_seconds": round(held.seconds, 3),
                    "answer_seconds": [round(seconds, 3) for _, seconds in answers],
                    "by": by,
                }
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                note(f"{way['press']} with {way['entries']:,} entries")


def finished(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that was cut short is dropped from it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def note(text: str) -> None:
    """A line on stderr: what has been done."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> None:
    """Do the jobs of a file."""
    parser = argparse.ArgumentParser(description="Answer questions on contexts that kvpress has compressed.")
    parser.add_argument("jobs", type=Path, help="JSON lines, as `beacon eval` writes them to DIR/peers/jobs.jsonl")
    parser.add_argument("answers", type=Path, help="JSON lines are appended here")
    parser.add_argument("--base", required=True, help="the base model: a folder or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not (found := importlib.metadata.version("kvpress")).startswith(SUPPORTED):
        sys.exit(f"{sys.executable} has kvpress {found}; {SUPPORTED}x is needed")
    AttentionInterface.register("rows", attend_rows)
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    disable_progress_bar()
    jobs = [json.loads(line) for line in options.jobs.read_text(encoding="utf-8").splitlines()]
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.base, revision=options.revision, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    with torch.no_grad():
        run(model.to(options.device).eval(), jobs, options.answers)


if __name__ == "__main__":
    main()
