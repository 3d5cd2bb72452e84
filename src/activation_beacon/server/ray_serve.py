"""`beacon serve` on Ray: n replicas that share the folder of contexts, each request routed to one that holds its context.

```
serve run activation_beacon.server.ray_serve:build model=default folder=contexts replicas=2
```

A client names the context in the header `serve_multiplexed_model_id` as well as in the body: Ray then prefers a replica that
has it in memory. Without the header any replica answers, and reads the context from the folder if need be.
"""

import contextlib
import functools
import os
from typing import Any

from ray import serve

from activation_beacon.errors import BeaconError
from activation_beacon.hub import load
from activation_beacon.ratios import parse_ratio
from activation_beacon.server.app import create_app
from activation_beacon.server.settings import API_KEY, Settings

MOST_HELD = 1000  # contexts that Ray notes for a replica; memory itself is bounded by Settings.memory_bytes


class Holding:
    """ASGI middleware: tells Ray that this replica holds the context that a request was routed by.

    Args:
        app: what is behind it.
        replica: which replica.
    """

    def __init__(self, app: Any, replica: "Replica") -> None:
        self.app = app
        self.replica = replica

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on once the context is in memory; one that cannot be held is the app's to refuse."""
        context_id = serve.get_multiplexed_model_id() if scope["type"] == "http" else ""
        if context_id:
            with contextlib.suppress(BeaconError):
                await self.replica.hold(context_id)
        await self.app(scope, receive, send)


@serve.ingress()
class Replica:
    """One server.

    Args:
        model: an adapter's folder or hub id.
        settings: of the server.
    """

    def __init__(self, model: str, settings: Settings) -> None:
        loaded, tokenizer = load(model)
        holding = functools.partial(Holding, replica=self)
        self.server_app = create_app(loaded, tokenizer, settings, behind_the_gate=holding)  # `app` is Ray's

    def __serve_build_asgi_app__(self) -> Any:
        """The application, which Ray runs."""
        return self.server_app

    @serve.multiplexed(max_num_models_per_replica=MOST_HELD)
    async def hold(self, context_id: str) -> str:
        """Have a context in memory.

        Raises:
            BeaconError: if it cannot be opened.
        """
        await self.server_app.state.server.library.opened(context_id)
        return context_id


def build(arguments: dict[str, str]) -> Any:
    """The application for `serve run`.

    Args:
        arguments: `model`, `folder`, `replicas`, `ratio`, `name` and `api_key` (else BEACON_API_KEY), all of them optional.
    """
    model = arguments.get("model", "default")
    settings = Settings(
        folder=arguments.get("folder", "contexts"),
        model_name=arguments.get("name", model),
        ratio=parse_ratio(arguments.get("ratio", "auto")),
        api_key=arguments.get("api_key", os.environ.get(API_KEY)),
    )
    deployment: Any = serve.deployment(Replica, name="beacon")
    count = int(arguments.get("replicas", "1"))
    return deployment.options(num_replicas=count, max_ongoing_requests=settings.max_waiting).bind(model, settings)
