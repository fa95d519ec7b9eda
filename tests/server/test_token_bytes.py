"""The bytes of single tokens."""

from __future__ import annotations

import pytest
from tests.makers import byte_fallback_tokenizer, save_base, tiny_gpt2, tokenizer_adding

from superpose_adapters.bundled import MINI
from superpose_server.engine.token_bytes import TokenBytes
from superpose_server.engine.tokenizer import Tokenizer

TEXTS = ["Häuser, 日本 🙂", "a  b\nc", "ab ab abc", "né en Côte d'Ivoire"]


@pytest.fixture(scope="module", params=["bytes", "SentencePiece", "mini"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "mini":
        return Tokenizer(MINI.base())
    made = {"bytes": tokenizer_adding("<s>"), "SentencePiece": byte_fallback_tokenizer()}
    folder = save_base(tiny_gpt2(), tmp_path_factory.mktemp("base"), made[request.param])
    return Tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.inner.encode(text, add_special_tokens=False)
    joined = b"".join(map(TokenBytes(tokenizer), ids))
    # SentencePiece writes a space before the first word, and takes it off the text.
    assert joined.decode().removeprefix(" ") == text


def test_special_tokens_have_the_bytes_of_their_names(tokenizer: Tokenizer) -> None:
    token_bytes = TokenBytes(tokenizer)
    assert tokenizer.special
    for text, token in tokenizer.special.items():
        assert token_bytes(token) == text.encode()


def test_an_id_that_no_token_has_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert TokenBytes(tokenizer)(10**6) == b""
