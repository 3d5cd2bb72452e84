"""The real default model behind a server: what compressing once is worth to the second question."""

import pytest

from activation_beacon import load
from activation_beacon.books import read_demo_book
from activation_beacon.server.app import create_app
from activation_beacon.server.settings import Settings
from families import widths
from server_live import live_app


@pytest.mark.default_model
@pytest.mark.slow
def test_questions_on_a_context_take_a_twentieth_of_the_rows_of_reading_it(tmp_path):
    """The seconds that this saves are measured by `beacon bench serving`."""
    model, tokenizer = load("default")
    settings = Settings(folder=str(tmp_path / "contexts"), ratio=8)
    with live_app(create_app(model, tokenizer, settings)) as server:

        def ask(content, context=None):
            extra = {} if context is None else {"context": context}
            message = {"role": "user", "content": content}
            return server.openai.chat.completions.create(
                model="default", messages=[message], max_tokens=5, temperature=0, extra_body=extra
            )

        made = []
        rows_read = sum(widths(model, lambda: made.append(server.create(read_demo_book()[:6_000]))))
        for question in ("What is it about?", "Who is in it?"):
            rows_asked = sum(widths(model, lambda question=question: ask(question, made[0]["id"])))
            assert rows_asked < 60
        assert rows_read > made[0]["tokens"] > 1_200
        assert ask("Say hello.").choices[0].message.content.strip()
