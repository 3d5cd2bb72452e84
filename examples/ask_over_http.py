"""Compress a document on a running `beacon serve`, and ask about it with the official OpenAI client.

    beacon serve &
    python examples/ask_over_http.py book.txt "Who is the story about?"

Needs `pip install openai httpx`. BEACON_URL names another server than http://127.0.0.1:8000.
"""

import json
import os
import sys
from pathlib import Path

import httpx
from openai import OpenAI

URL = os.environ.get("BEACON_URL", "http://127.0.0.1:8000")


def compress(path: Path) -> str:
    """Make a context of a file, telling how far it is; returns its id."""
    with (
        path.open("rb") as file,
        httpx.stream(
            "POST", f"{URL}/v1/contexts", files={"file": file}, data={"stream": "true"}, timeout=None
        ) as reply,
    ):
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: "):
                continue
            values = json.loads(line.removeprefix("data: "))
            if "error" in values and isinstance(values["error"], dict):
                sys.exit(values["error"]["message"])
            if "done" in values:
                print(f"{values['done']} of {values['total']} chunks", file=sys.stderr)
            else:
                saved = values["uncompressed_bytes"] - values["cache_bytes"]
                print(f"{values['tokens']:,} tokens, {saved:,} bytes saved", file=sys.stderr)
    return values["id"]


def main() -> None:
    """Compress and ask."""
    context = compress(Path(sys.argv[1]))
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("BEACON_API_KEY", "none"))
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": sys.argv[2]}],
        max_tokens=60,
        temperature=0,
        stream=True,
        extra_body={"context": context},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
