from __future__ import annotations

import pytest
import torch
from torch import Tensor

from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache

HEADS, WIDTH = 2, 3
CPU = torch.device("cpu")


def numbered(tokens: int, start: int = 1) -> Tensor:
    """Different numbers everywhere, (1, heads, tokens, head_dim)."""
    count = HEADS * tokens * WIDTH
    return torch.arange(start, start + count).float().reshape(1, HEADS, tokens, WIDTH)


def span(slot: int, position: int, tokens: int, start: int = 0) -> Span:
    return Span(slot, [0] * tokens, position, start)


def write(
    cache: SlotCache, spans: list[Span], values: Tensor, layer: int = 0
) -> tuple[Tensor, Tensor]:
    cache.select(Batch.of(spans, CPU))
    return cache.update(values, -values, layer)


def test_tokens_are_read_where_they_were_written() -> None:
    cache = SlotCache(slots=3, max_length=8)
    prompt = numbered(4)
    keys, values = write(cache, [span(1, 0, 4)], prompt)
    assert keys.shape == (3, HEADS, 8, WIDTH)
    assert torch.equal(keys[1, :, :4], prompt[0])
    assert torch.equal(values[1, :, :4], -prompt[0])
    token = numbered(1, start=500)
    keys, values = write(cache, [span(1, 4, 1)], token)
    assert torch.equal(keys[1, :, :5], torch.cat([prompt, token], dim=2)[0])
    assert torch.equal(values, -keys)


def test_each_row_of_a_batch_writes_at_its_own_position() -> None:
    cache = SlotCache(slots=3, max_length=8)
    lengths = (4, 1, 2)
    # Prompts of different lengths, laid end to end, in slots of no order.
    slots = (2, 0, 1)
    prompts = [numbered(n, start=100 * n) for n in lengths]
    spans = [span(slot, 0, n) for slot, n in zip(slots, lengths, strict=True)]
    write(cache, spans, torch.cat(prompts, dim=2))
    tokens = numbered(3, start=900)
    spans = [span(slot, n, 1) for slot, n in zip(slots, lengths, strict=True)]
    keys, _ = write(cache, spans, tokens)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        assert torch.equal(keys[slot, :, :length], prompts[row][0])
        assert torch.equal(keys[slot, :, length], tokens[0, :, row])
        assert not keys[slot, :, length + 1 :].any()


def test_rows_behind_each_other_in_one_slot_write_behind_each_other() -> None:
    cache = SlotCache(slots=2, max_length=8)
    both = numbered(5)
    batch = Batch.of([span(1, 0, 2), span(1, 2, 3, start=2)], CPU)
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    cache.select(batch)
    keys, _ = cache.update(both, both, 0)
    assert torch.equal(keys[1, :, :5], both[0])


def test_layers_and_slots_do_not_touch_one_another() -> None:
    cache = SlotCache(slots=2, max_length=4)
    one, two = numbered(2), numbered(2, start=50)
    write(cache, [span(0, 0, 2)], one)
    write(cache, [span(0, 0, 2)], two, layer=1)
    other = numbered(2, start=99)
    write(cache, [span(1, 0, 2)], other)
    cache.select(Batch.of([span(0, 2, 1)], CPU))
    keys, _ = cache.update(numbered(1), numbered(1), 0)
    assert torch.equal(keys[0, :, :2], one[0])
    assert torch.equal(keys[1, :, :2], other[0])
    keys, _ = cache.update(numbered(1), numbered(1), 1)
    assert torch.equal(keys[0, :, :2], two[0])
    assert not keys[1].any()


def test_what_is_read_is_the_cache_itself() -> None:
    cache = SlotCache(slots=2, max_length=4)
    assert cache.nbytes == 0  # the first pass tells what a token takes
    keys, values = write(cache, [span(1, 0, 2)], numbered(2))
    assert keys.data_ptr() == cache._keys[0].data_ptr()
    assert values.data_ptr() == cache._values[0].data_ptr()
    assert cache.nbytes == 2 * 2 * HEADS * 4 * WIDTH * 4


def test_a_moved_row_is_whole_and_a_distrusted_slot_is_empty_once_claimed() -> None:
    cache = SlotCache(slots=3, max_length=6)
    prompt = numbered(5)
    write(cache, [span(2, 0, 5)], prompt)
    cache.move(2, 0, 5)
    keys, values = write(cache, [span(0, 5, 1)], numbered(1))
    assert torch.equal(keys[0, :, :5], prompt[0])
    assert torch.equal(values[0, :, :5], -prompt[0])
    cache.claim(0)
    assert cache._keys[0][0].any()  # nobody distrusts it
    cache.distrust(0)
    assert cache._keys[0][0].any()  # not before somebody needs it
    cache.claim(0)
    assert not cache._keys[0][0].any()
    assert not cache._values[0][0].any()
    assert cache._keys[0][2].any()


def test_what_is_not_trusted_is_gone_before_a_row_is_moved_there_and_moves_with_its_row() -> None:
    cache = SlotCache(slots=3, max_length=6)
    write(cache, [span(0, 0, 6)], numbered(6) * torch.nan)
    prompt = numbered(3)
    write(cache, [span(1, 0, 3)], prompt)
    cache.distrust(0)
    cache.move(1, 0, 3)
    assert torch.equal(cache._keys[0][0, :, :3], prompt[0])
    assert not cache._keys[0][0, :, 3:].any()
    cache.distrust(0)
    cache.move(0, 2, 6)
    cache.claim(2)
    assert not cache._keys[0][2].any()


def test_a_cache_made_under_inference_mode_moves_and_clears_outside_it() -> None:
    cache = SlotCache(slots=2, max_length=2)
    with torch.inference_mode():
        write(cache, [span(1, 0, 2)], numbered(2))
    cache.move(1, 0, 2)
    cache.distrust(1)
    cache.claim(1)
    assert torch.equal(cache._keys[0][0], numbered(2)[0])


def test_a_pass_without_a_batch_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="select a batch"):
        SlotCache(1, 1).update(numbered(1), numbered(1), 0)
