# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Boxes and ledgers against brute force."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm.model_executor.model_loader.reload.ledger import Box, Ledger, boxes_of_view

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4)


def mark(shape, boxes: list[Box]) -> torch.Tensor:
    """How often each element lies in a box."""
    count = torch.zeros(shape, dtype=torch.int32)
    for box in boxes:
        count[box.slices()] += 1
    return count


@st.composite
def boxes(draw, shape) -> Box:
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b for _, b in ends))


@st.composite
def owners(draw) -> torch.Tensor:
    """A tensor whose elements are all distinct in memory, strided in some way."""
    shape = draw(SHAPES)
    padded = [n + draw(st.integers(0, 1)) for n in shape]
    memory = torch.zeros(padded, dtype=torch.int32)
    owner = memory[tuple(slice(0, n) for n in shape)]
    return owner.permute(draw(st.permutations(range(len(shape)))))


@st.composite
def views(draw, view: torch.Tensor) -> torch.Tensor:
    for _ in range(draw(st.integers(0, 4))):
        if view.dim():
            view = draw(smaller_views(view))
    return view


@st.composite
def smaller_views(draw, view: torch.Tensor) -> torch.Tensor:
    dim = draw(st.integers(0, view.dim() - 1))
    size = view.shape[dim]
    steps: dict[str, Callable[[], torch.Tensor]] = dict(
        select=lambda: view.select(dim, draw(st.integers(0, size - 1))),
        narrow=lambda: view.narrow(dim, size // 2, size - size // 2),
        step=lambda: view.movedim(dim, 0)[:: draw(st.integers(1, 3))],
        transpose=lambda: view.transpose(0, dim),
        unflatten=lambda: view.unflatten(dim, (-1, 1 + (size % 2 == 0))),
    )
    if view.is_contiguous():
        steps["flatten"] = lambda: view.view(-1)
    return steps[draw(st.sampled_from(sorted(steps)))]()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # torch's first
@given(st.data())
def test_boxes_of_a_view_are_what_it_writes(data):
    owner = data.draw(owners())
    view = data.draw(views(owner))
    view.fill_(1)
    assert torch.equal(mark(owner.shape, boxes_of_view(view, owner)), owner)


@given(st.data())
def test_ledger_agrees_with_a_mask(data):
    shape = data.draw(SHAPES)
    owed = data.draw(st.lists(boxes(shape), max_size=4))
    mask = mark(shape, owed).bool()
    ledger = Ledger(owed)
    assert ledger.empty == (not mask.any())
    for box in data.draw(st.lists(boxes(shape), max_size=6)):
        ledger.write(box)
        mask[box.slices()] = False
        assert ledger.complete == (not mask.any())
        assert torch.equal(mark(shape, ledger.missing()), mask.int())
        assert ledger.missing_within(box) == 0
        region = data.draw(boxes(shape))
        assert ledger.missing_within(region) == mask[region.slices()].sum()


def test_writing_twice_counts_once():
    ledger = Ledger([Box.whole((4, 6))])
    for _ in range(2):
        ledger.write(Box((0, 0), (2, 6)))
    assert ledger.missing() == [Box((2, 0), (4, 6))]


@pytest.mark.parametrize("slack, complete", [(5, False), (6, True)])
def test_slack_is_what_may_stay_unwritten(slack, complete):
    ledger = Ledger([Box.whole((4, 6))], slack)
    ledger.write(Box((0, 0), (3, 6)))
    assert ledger.complete == complete


def test_a_tensor_with_slack_is_not_covered():
    tensor = torch.empty(4, 6)
    assert Ledger([Box.whole((4, 6))]).covers(tensor)
    assert not Ledger([Box.whole((4, 6))], slack=1).covers(tensor)
