from __future__ import annotations

import pytest
import torch
from torch import Tensor

from superpose_server.cache import SlotCache, Window

HEADS, WIDTH = 2, 3


def numbered(rows: int, tokens: int, start: int = 1) -> Tensor:
    """Different numbers everywhere, (rows, heads, tokens, head_dim)."""
    count = rows * HEADS * tokens * WIDTH
    return torch.arange(start, start + count).float().reshape(rows, HEADS, tokens, WIDTH)


def write(
    cache: SlotCache, first: int, positions: list[list[int]], values: Tensor, layer: int = 0
) -> tuple[Tensor, Tensor]:
    at = torch.tensor(positions)
    cache.select(Window(first, at, int(at.max()) + 1))
    return cache.update(values, -values, layer)


def test_tokens_are_read_where_they_were_written() -> None:
    cache = SlotCache(slots=3, max_length=8)
    prompt = numbered(1, 4)
    keys, values = write(cache, 1, [[0, 1, 2, 3]], prompt)
    assert torch.equal(keys, prompt)
    assert torch.equal(values, -prompt)
    token = numbered(1, 1, start=500)
    keys, values = write(cache, 1, [[4]], token)
    assert torch.equal(keys, torch.cat([prompt, token], dim=2))
    assert torch.equal(values, -keys)


def test_each_row_of_a_batch_writes_at_its_own_position() -> None:
    cache = SlotCache(slots=3, max_length=8)
    for slot, length in enumerate((4, 1, 2)):
        write(cache, slot, [list(range(length))], numbered(1, length, start=100 * slot + 1))
    tokens = numbered(3, 1, start=900)
    keys, _ = write(cache, 0, [[4], [1], [2]], tokens)
    assert keys.shape == (3, HEADS, 5, WIDTH)
    for slot, length in enumerate((4, 1, 2)):
        assert torch.equal(keys[slot, :, :length], numbered(1, length, start=100 * slot + 1)[0])
        assert torch.equal(keys[slot, :, length], tokens[slot, :, 0])


def test_layers_and_slots_do_not_touch_one_another() -> None:
    cache = SlotCache(slots=2, max_length=4)
    one, two = numbered(1, 2), numbered(1, 2, start=50)
    write(cache, 0, [[0, 1]], one)
    write(cache, 0, [[0, 1]], two, layer=1)
    write(cache, 1, [[0, 1]], numbered(1, 2, start=99))
    cache.select(Window(0, torch.tensor([[2]]), 3))
    keys, _ = cache.update(numbered(1, 1), numbered(1, 1), 0)
    assert torch.equal(keys[:, :, :2], one)
    keys, _ = cache.update(numbered(1, 1), numbered(1, 1), 1)
    assert torch.equal(keys[:, :, :2], two)


def test_what_is_read_is_a_view_of_the_cache() -> None:
    cache = SlotCache(slots=2, max_length=4)
    keys, _ = write(cache, 1, [[0, 1]], numbered(1, 2))
    assert keys.data_ptr() == cache._keys[0][1].data_ptr()
    assert cache.nbytes == 2 * 2 * HEADS * 4 * WIDTH * 4


def test_a_moved_row_is_whole_and_a_cleared_one_is_empty() -> None:
    cache = SlotCache(slots=3, max_length=6)
    prompt = numbered(1, 5)
    write(cache, 2, [[0, 1, 2, 3, 4]], prompt)
    cache.clear(0)
    cache.move(2, 0, 5)
    keys, values = write(cache, 0, [[5]], numbered(1, 1))
    assert torch.equal(keys[:, :, :5], prompt)
    assert torch.equal(values[:, :, :5], -prompt)
    cache.clear(0)
    assert not cache._keys[0][0].any()
    assert not cache._values[0][0].any()
    assert cache._keys[0][2].any()


def test_a_cache_made_under_inference_mode_moves_and_clears_outside_it() -> None:
    cache = SlotCache(slots=2, max_length=2)
    with torch.inference_mode():
        write(cache, 1, [[0, 1]], numbered(1, 2))
    cache.move(1, 0, 2)
    cache.clear(1)
    assert torch.equal(cache._keys[0][0], numbered(1, 2)[0])


def test_a_pass_without_a_window_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="select a window"):
        SlotCache(1, 1).update(numbered(1, 1), numbered(1, 1), 0)
