"""Where a text ends, as a client sees it: at the context's end, and what it may end with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.harness import LoopThread, Served, start
from tests.makers import EOS, save_base, tiny_gpt2

from superpose_client import CallError

CONTEXT = 80


@pytest.fixture(scope="module")
def short(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose context is hardly longer than an answer."""
    folder = tmp_path_factory.mktemp("short")
    base = save_base(tiny_gpt2(n_positions=CONTEXT), folder / "base")
    server = start(loop, base, folder / "state")
    yield server
    server.stop()


def generate(server: Served, prompt: int, **options: Any) -> Any:
    values = {"temperature": 0, "ignore_eos": True} | options
    return server.client.generate([65] * prompt, **values)


@pytest.mark.parametrize(
    ("prompt", "made"), [(1, 64), (15, 64), (16, 64), (17, 63), (50, 30), (CONTEXT - 1, 1)]
)
def test_without_max_new_tokens_an_answer_is_as_long_as_the_context_lets_it_be(
    short: Served, prompt: int, made: int
) -> None:
    answer = generate(short, prompt)
    assert len(answer.token_ids) == made
    assert answer.finish_reason == "FINISH_REASON_LENGTH"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, made)
    # What is asked for by name is given or refused.
    assert generate(short, prompt, max_new_tokens=made).token_ids == answer.token_ids
    if prompt + made == CONTEXT:
        with pytest.raises(CallError, match=f"max_new_tokens is {made + 1}: .* leaves {made}"):
            generate(short, prompt, max_new_tokens=made + 1)


def test_a_least_length_that_the_context_does_not_leave_is_refused_by_its_name(
    short: Served,
) -> None:
    assert len(generate(short, 50, min_new_tokens=30).token_ids) == 30
    with pytest.raises(CallError, match=r"min_new_tokens is 31: .* leaves 30") as caught:
        generate(short, 50, min_new_tokens=31)
    assert caught.value.reason == "MIN_NEW_TOKENS_TOO_LARGE"
    assert [violation.field for violation in caught.value.field_violations] == [
        "options.min_new_tokens"
    ]
    with pytest.raises(CallError, match="from 0 to max_new_tokens, which is 64"):
        generate(short, 1, min_new_tokens=65)


def test_a_prompt_that_leaves_no_room_is_refused(short: Served) -> None:
    with pytest.raises(CallError, match="shorten the prompt"):
        generate(short, CONTEXT)


def test_a_stop_string_beside_a_special_token_is_refused_and_names_it(short: Served) -> None:
    for stop in (f"{EOS}\n", f"a{EOS}", f"{EOS}{EOS}"):
        with pytest.raises(CallError) as caught:
            generate(short, 4, stop=["ok", stop])
        assert f"stop is {stop!r}" in str(caught.value)
        assert f"stop at {EOS!r} alone" in str(caught.value)
        assert caught.value.reason == "STOP_SPECIAL_TOKEN"
