"""`beacon ask`: one question on a context file."""

from typing import Annotated

import typer

from activation_beacon.cli import options
from activation_beacon.cli.answering import Sampling, answer
from activation_beacon.cli.console import notice, print_json, seconds_text, trained_fields, warn_untrained
from activation_beacon.cli.models import load_model, place_context, question_ids, read_context


def ask(
    file: options.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.")],
    model: options.Model = "default",
    base: options.Base = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Let the question follow the text as it is, without a chat template.")
    ] = False,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Ask a question about a compressed text.

    The answer is printed as it comes. The file stays as it is: ask as often as you like. The model must be the one
    that compressed the text.
    """
    options.check_text_given("The question", question)
    context = read_context(file)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    context = place_context(loaded, context)
    ids = question_ids(loaded, context, question, plain=plain)
    warn_untrained(loaded.config)
    sampling = Sampling(max_new_tokens, temperature, seed)
    reply = answer(loaded, context, ids, sampling, write=None if json else _write)
    if not json:
        typer.echo()
        end = "; ended, since it repeats itself" if reply.is_repeating else ""
        notice(f"{reply.num_tokens} tokens in {seconds_text(reply.seconds)}{end}")
        return
    print_json(
        {
            "file": str(file),
            "question": question,
            "answer": reply.text,
            "question_tokens": len(ids),
            "answer_tokens": reply.num_tokens,
            "is_complete": reply.is_complete,
            "is_repeating": reply.is_repeating,
            "seconds": round(reply.seconds, 3),
            **trained_fields(loaded.config),
        }
    )


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
