"""The real default model behind a server: what compressing once is worth to the second question."""

import pytest

from activation_beacon import load
from activation_beacon.bench.serving import Connection, time_first_tokens
from activation_beacon.books import read_demo_book
from activation_beacon.server.app import create_app
from activation_beacon.server.settings import Settings
from server_live import live_app


@pytest.mark.default_model
@pytest.mark.slow
def test_a_second_question_is_answered_ten_times_sooner(tmp_path):
    model, tokenizer = load("default")
    settings = Settings(folder=str(tmp_path / "contexts"), ratio=8)
    with live_app(create_app(model, tokenizer, settings)) as server:
        found = time_first_tokens(Connection(server.url), read_demo_book()[:14_000])
        reply = server.openai.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Say hello."}], max_tokens=5, temperature=0
        )
    assert found["times_sooner_than_first"] >= 10
    assert found["times_sooner_than_anew"] >= 10
    assert reply.choices[0].message.content.strip()
