"""How the commands generate: by the likeliest tokens, or drawn with a temperature and a seed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int | None = None

    def begin(self) -> dict[str, Any]:
        """Set the seed for an answer; options of `generate`."""
        if self.seed is not None:
            import transformers

            transformers.set_seed(self.seed)
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature}
