"""A corpus compressed as a Ray Data job: one context file for each text, by as many workers as there are models to spare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activation_beacon.errors import BeaconError, InputError
from activation_beacon.ratios import Ratio


class CompressText:
    """What a worker does; it loads the model once.

    Args:
        model: an adapter's folder or hub id.
        ratio: of all texts.
    """

    def __init__(self, model: str, ratio: Ratio) -> None:
        from activation_beacon.hub import load
        from activation_beacon.prompts import ChatPrompt

        self.model, tokenizer = load(model)
        self.prompt = ChatPrompt(tokenizer)
        self.ratio = ratio

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compress one text; what is wrong with it is told, and ends nothing else."""
        told = {"source": row["source"], "target": row["target"], "tokens": 0, "file_bytes": 0, "error": ""}
        try:
            text = Path(row["source"]).read_text(encoding="utf-8")
            if not text.strip():
                raise InputError("The file is empty.")
            context = self.model.compress([self.prompt.opening(text)], ratio=self.ratio)
            return {**told, "tokens": context.tokens_seen, "file_bytes": context.save(row["target"])}
        except (BeaconError, OSError, UnicodeDecodeError) as error:
            return {**told, "error": str(error)}


def compress_corpus(
    sources: Sequence[Path], folder: Path, *, model: str = "default", ratio: Ratio = "auto", num_workers: int = 1
) -> list[dict[str, Any]]:
    """Compress texts into `folder/STEM.beacon`; those that are there already are left out, so that a job can be gone on with.

    Args:
        sources: UTF-8 files whose names differ.
        folder: made if missing; `beacon serve --folder` serves it as it is.
        model: an adapter's folder or hub id.
        ratio: of all texts.
        num_workers: models that are loaded, one in each worker.

    Returns:
        For each text that was read: `source`, `target`, `tokens`, `file_bytes`, and `error`, empty where all went well.

    Raises:
        InputError: if two texts would become one file.
    """
    import ray.data

    stems = [source.stem for source in sources]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"Texts of one name would become one file: {', '.join(twice[:3])}. Rename them.")
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder.resolve() / f"{stem}.beacon" for stem in stems]
    rows = [
        {"source": str(source.resolve()), "target": str(target)}
        for source, target in zip(sources, targets, strict=True)
        if not target.exists()
    ]
    if not rows:
        return []
    texts = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4 * num_workers))
    compute = ray.data.ActorPoolStrategy(size=num_workers)
    arguments = {"model": model, "ratio": ratio}
    worker: Any = CompressText  # Ray makes one in each worker
    told: list[dict[str, Any]] = texts.map(worker, fn_constructor_kwargs=arguments, compute=compute).take_all()
    return told
