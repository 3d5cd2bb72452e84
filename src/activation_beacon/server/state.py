"""One server: a model, the engine that runs it, contexts, and what is counted."""

import logging
from typing import Any

from activation_beacon.grammar import Grammars
from activation_beacon.server.engine import Engine, Limits
from activation_beacon.server.library import Library
from activation_beacon.server.metrics import Metrics
from activation_beacon.server.prompting import Prompting
from activation_beacon.server.settings import Settings

logger = logging.getLogger(__name__)


class Server:
    """What all routes share.

    Args:
        model: with beacons; the engine's own from now on.
        tokenizer: of its base model.
        settings: of the server.

    Raises:
        StorageError: if the folder of contexts cannot be opened.
        RatioError: if the adapter does not know the ratio.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        model.ratio_policy(settings.ratio)
        self.metrics = Metrics()
        limits = Limits(settings.max_rows, settings.max_waiting, settings.batch_bytes)
        self.engine = Engine(model, tokenizer, limits, observer=self.metrics)
        self.prompting = Prompting(tokenizer)
        self.grammars = Grammars(
            self.prompting.tokenizer, model.get_input_embeddings().weight.shape[0], self.engine.ends
        )
        self.library = Library(model, self.engine, settings)
        self._watch()

    def _watch(self) -> None:
        memory, engine = self.library.memory, self.engine
        self.metrics.watch("waiting", "Requests that wait for their turn.", lambda: engine.num_waiting)
        self.metrics.watch("running", "Requests that are being read or answered.", lambda: engine.num_running)
        self.metrics.watch("rows", "Answers that are decoded together.", lambda: engine.num_rows)
        self.metrics.watch("memory_bytes", "Bytes of contexts and conversations in memory.", lambda: memory.num_bytes)
        self.metrics.watch("memory_caches", "Contexts and conversations in memory.", lambda: len(memory))

    def start(self) -> None:
        """Begin."""
        self.engine.start()

    def close(self) -> None:
        """Take no more work; requests get the settings' `shutdown_s` to finish, and are then told. Returns at once."""
        self.engine.close(seconds=self.settings.shutdown_s)

    def stop(self) -> None:
        """Close, wait until all requests have finished or been told, and finish files that are being written."""
        self.engine.stop(seconds=self.settings.shutdown_s)
        self.library.close()

    def failed(self, error: Exception, told: dict[str, Any]) -> dict[str, Any]:
        """Log an error that is our own mistake; returns what the client is told."""
        if told["error"]["code"] == "internal_error":
            logger.error("a request failed", exc_info=error)
        return told
