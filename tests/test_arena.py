"""Memory of a step: what lives is never given away, what is gone is used again."""

from __future__ import annotations

import pytest
import torch

from qlora_tune.arena import ALIGNED, LASTING, SMALL, Arena

LIKE = torch.empty(0, dtype=torch.bfloat16)


def fill(arena: Arena, count: int, number: float) -> torch.Tensor:
    return arena.lasting((count,), LIKE).fill_(number)


def test_a_lasting_tensor_keeps_its_values_while_others_come_and_go() -> None:
    arena = Arena(used=True)
    first, kept = fill(arena, 1000, 1), fill(arena, 77, 2)
    del first
    for number in range(3, 60):
        fill(arena, 1001, number)
    assert kept.tolist() == [2] * 77


def test_memory_is_used_from_the_start_again_when_all_in_it_is_gone() -> None:
    arena = Arena(used=True)
    first = fill(arena, 1000, 1)
    address = first.data_ptr()
    second = fill(arena, 1000, 2)
    assert second.data_ptr() >= address + 2000
    assert second.data_ptr() % ALIGNED == address % ALIGNED == 0
    del first
    assert fill(arena, 8, 3).data_ptr() > second.data_ptr()
    del second
    assert fill(arena, 1000, 4).data_ptr() == address


def test_what_autograd_saved_holds_its_memory_without_a_name_in_python() -> None:
    arena = Arena(used=True)
    weight = torch.ones(5, requires_grad=True)
    product = (fill(arena, 5, 3).float() * 0 + arena.keep(torch.full((5,), 3.0))) * weight
    fill(arena, 500, 7)
    product.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3] * 5


def test_a_tensor_larger_than_a_block_gets_one_of_its_own() -> None:
    arena = Arena(used=True)
    small = fill(arena, 8, 1)
    large = arena.lasting((LASTING + 1000,), torch.empty(0, dtype=torch.uint8))
    assert large.numel() == LASTING + 1000
    assert small.tolist() == [1] * 8
    assert len(arena.kept) == 2


def test_what_is_lasting_already_is_not_copied() -> None:
    arena = Arena(used=True)
    kept = arena.keep(torch.arange(9.0))
    assert arena.keep(kept[3:]).data_ptr() == kept[3:].data_ptr()
    assert kept.tolist() == list(range(9))


def test_a_place_is_used_again_when_its_tensor_is_gone_and_not_before() -> None:
    arena = Arena(used=True)
    one = arena.passing((SMALL,), LIKE)
    other = arena.passing((SMALL,), LIKE)
    assert abs(one.data_ptr() - other.data_ptr()) >= 2 * SMALL
    address = one.data_ptr()
    del one
    assert arena.passing((SMALL - 9, 1), LIKE).data_ptr() == address
    assert len(arena.places) == 2


@pytest.mark.parametrize("arena", [Arena(), Arena(used=True)])
def test_what_it_does_not_serve_comes_from_torch(arena: Arena) -> None:
    like = LIKE if not arena.used else LIKE.to("meta")
    assert arena.lasting((3, 4), like).shape == arena.passing((3, 4), like).shape == (3, 4)
    x = like.new_empty(5)
    assert arena.keep(x) is x
    assert not arena.kept
    assert not arena.places
