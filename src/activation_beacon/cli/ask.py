"""`beacon ask`: one question on a context file."""

from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.console import notice, print_json, seconds_text, trained_fields, warn_untrained
from activation_beacon.cli.models import load_model, place_context, read_context
from activation_beacon.cli.sampling import Sampling
from activation_beacon.errors import InputError, reason


def ask(
    file: options.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.")],
    model: options.Model = "default",
    base: options.Base = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            "--schema",
            metavar="FILE",
            help="A JSON schema: the answer is JSON of this form. Say in the question, too, what is wanted.",
        ),
    ] = None,
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
    wanted = None if schema is None else _read_schema(schema)
    context = read_context(file)
    loaded = load_model(model, base=base, device=device, dtype=dtype)
    context = place_context(loaded, context)
    from activation_beacon.conversation import answer, question_ids

    ids = question_ids(loaded.model, loaded.prompt, context, question, is_plain=plain)
    warn_untrained(loaded.config)
    options_of_answer = Sampling(max_new_tokens, temperature, seed).begin()
    if wanted is not None:
        from activation_beacon.grammar import SchemaLogitsProcessor

        options_of_answer["logits_processor"] = [SchemaLogitsProcessor(loaded.model, loaded.tokenizer, wanted)]
    write = None if json else _write
    reply = answer(loaded.model, loaded.tokenizer, context, ids, write=write, **options_of_answer)
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


def _read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema of a file.

    Raises:
        InputError: if it holds none.
    """
    try:
        schema = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--schema {path} cannot be read as JSON: {reason(error)}. Give a file with a JSON schema."
        ) from error
    if not isinstance(schema, dict):
        raise InputError(
            f'--schema {path} must hold a JSON object; it holds {type(schema).__name__}. {{"type": "object"}} is one.'
        )
    return schema


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
