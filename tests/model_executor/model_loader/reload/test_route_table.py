# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs of a list end where they must, and bring what single tensors bring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.kernels.strided_copy import copy_strided
from vllm.model_executor.model_loader.reload.calls import TensorSpec
from vllm.model_executor.model_loader.reload.copying import Copies
from vllm.model_executor.model_loader.reload.errors import WeightSyncError
from vllm.model_executor.model_loader.reload.ledger import Box, Ledger
from vllm.model_executor.model_loader.reload.plan import Plan
from vllm.model_executor.model_loader.reload.planned import PlannedCopies
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.route import Copy, Route
from vllm.model_executor.model_loader.reload.route_table import RouteTable
from vllm.model_executor.model_loader.reload.staging import StagedTensor, close
from vllm.model_executor.model_loader.reload.view import View

CPU = torch.device("cpu")
EXPERTS, ROWS, COLUMNS = 3, 2, 4
LAYERS = ("mlp.0", "mlp.1")
SPEC = TensorSpec((ROWS, COLUMNS), torch.float32)
WHOLE = View.whole(SPEC.shape)


def shard(expert: int, half: int) -> Box:
    start = half * ROWS
    return Box((expert, start, 0), (expert + 1, start + ROWS, COLUMNS))


def route(layer: str, *shards: tuple[int, int], dtype=torch.float32) -> Route:
    """One of a matrix that is copied to shards of a layer's w13."""
    copies = []
    for expert, half in shards:
        start = (2 * expert + half) * ROWS * COLUMNS
        to = View(SPEC.shape, (COLUMNS, 1), start)
        boxes = (shard(expert, half),)
        copies.append(Copy.of((layer, "w13"), WHOLE, to, boxes, SPEC, dtype))
    return Route(SPEC, tuple(copies))


EACH = [(layer, e, half) for layer in LAYERS for e in range(EXPERTS) for half in (0, 1)]
ROUTES = {f"{layer}.{e}.{half}": route(layer, (e, half)) for layer, e, half in EACH}
# Where nothing is copied, two copies are made, and a copy casts.
ROUTES |= {"elsewhere": Route(SPEC, ()), "both": route("mlp.0", (0, 0), (1, 1))}
ROUTES["cast"] = route("mlp.1", (0, 0), dtype=torch.bfloat16)


def layers() -> list[StagedTensor]:
    shape = (EXPERTS, 2 * ROWS, COLUMNS)
    owed = Ledger([shard(e, half) for e in range(EXPERTS) for half in (0, 1)])
    return [
        StagedTensor(
            layer,
            "w13",
            torch.empty(shape, device="meta"),
            CPU,
            FirstLoad(),
            owed.fresh(),
            initial=torch.zeros(shape),
        )
        for layer in LAYERS
    ]


def table(tensors: list[StagedTensor]) -> RouteTable:
    return RouteTable(ROUTES, {t.key: t.ledger.numbers for t in tensors})


def test_a_table_has_the_routes_that_are_one_strided_copy_of_a_box():
    made = table(layers())
    assert ROUTES.keys() - made.numbers.keys() == {"both", "cast"}
    assert len(made.distinct) == 3 and len(made.kinds) == len(made.numbers)


def test_a_box_that_is_owed_only_in_part_is_in_no_table():
    owed = {("mlp.0", "w13"): Ledger([Box((0, 0, 0), (1, 4, 4))]).numbers}
    assert RouteTable({"a": route("mlp.0", (0, 0))}, owed).numbers == {}


def test_a_table_that_grows_is_the_one_that_is_made_at_once():
    owed = {t.key: t.ledger.numbers for t in layers()}
    names = list(ROUTES)
    grown = RouteTable({name: ROUTES[name] for name in names[:5]}, owed)
    grown.add({"mlp.0.0.0": ROUTES["both"], "mlp.0.0.1": ROUTES["elsewhere"]}, owed)
    assert "mlp.0.0.0" not in grown.numbers
    grown.add(ROUTES, owed)
    for name, number in (made := table(layers())).numbers.items():
        at = grown.numbers[name]
        assert grown.kinds[at] == made.kinds[number]
        assert grown.copies[at] == made.copies[number]
        assert grown.distinct[grown.kind_R[at]] == grown.kinds[at]
        for column in ("box_R", "source_R", "target_R"):
            assert getattr(grown, column)[at] == getattr(made, column)[number]
    assert grown.numbers.keys() == made.numbers.keys()


def test_a_table_grows_with_routes_and_is_made_again_when_more_changes():
    plan = Plan()
    owed = {t.key: t.ledger.numbers for t in layers()}
    plan.take_over(dict(ROUTES), "layout")
    first = plan.table_for(owed)
    plan.take_over({}, "layout")
    assert plan.table_for(dict(owed)) is first
    plan.take_over({"new": route("mlp.0", (2, 1))}, "layout")
    second = plan.table_for(owed)
    assert second is first and "new" in second.numbers
    others = {k: {b: 5 - i for b, i in numbers.items()} for k, numbers in owed.items()}
    third = plan.table_for(others)
    name = "mlp.0.0.0"
    boxes = [t.box_R[t.numbers[name]] for t in (second, third)]
    assert boxes[0] != boxes[1]
    plan.take_over({"new": route("mlp.0", (2, 1))}, "another layout")
    assert plan.table_for(others).numbers.keys() == {"new"}


@st.composite
def sent(draw) -> list[tuple[str, torch.Tensor]]:
    """What a trainer may send: in any order, again, and in other forms."""
    names = st.sampled_from([*ROUTES, "unknown"])
    weights = []
    for name in draw(st.lists(names, max_size=20)):
        tensor = torch.full(SPEC.shape, float(draw(st.integers(0, 3))))
        form = draw(
            st.sampled_from(["plain"] * 5 + ["grad", "columns", "long", "half"])
        )
        weights.append((name, FORMS[form](tensor)))
    return weights


FORMS = {
    "plain": lambda tensor: tensor,
    "grad": lambda tensor: tensor.requires_grad_(),
    "columns": lambda tensor: tensor.t().contiguous().t(),
    "long": lambda tensor: tensor.repeat(2, 1),
    "half": lambda tensor: tensor.half(),
}


def stage(weights, tensors, copies, in_runs: RouteTable | None, limit: float):
    """Stage what has a route; what became of each, and the order of completion."""
    complete: list[StagedTensor] = []
    planned = PlannedCopies(ROUTES, tensors, complete.append, copies, in_runs, limit)
    refused, place = [], 0
    while place < len(weights):
        before, place = place, planned.take_run(weights, place)
        if place == before:
            if not planned.take(*weights[place]):
                refused.append(place)
            place += 1
    copies.flush()
    return refused, planned.layers, dict.fromkeys(t.layer for t in complete)


@st.composite
def sent_twice(draw) -> list[list[tuple[str, torch.Tensor]]]:
    """What a trainer may send in two syncs: the same, or up to some place, or not."""
    first, other = draw(sent()), draw(sent())
    kept = draw(st.integers(0, len(first)))
    return [first, first[:kept] + other[: draw(st.integers(0, len(other)))]]


@pytest.mark.parametrize("launch", [None, lambda batches: copy_strided(batches, CPU)])
@settings(deadline=None)
@given(sent_twice(), st.sampled_from([0, 64, 1e9]))
def test_runs_bring_what_single_tensors_bring(launch, syncs, limit):
    known = table(layers())
    for weights in (*syncs, syncs[0]):
        results = []
        for in_runs in (None, known):
            copies, tensors = Copies(launch), layers()
            copies.put_off = launch is not None
            outcome = stage(weights, tensors, copies, in_runs, limit)
            results.append((outcome, tensors))
        (one_by_one, expected), (together, got) = results
        assert together == one_by_one
        for tensor, other in zip(got, expected):
            assert tensor.ledger.complete == other.ledger.complete
            assert tensor.ledger.missing() == other.ledger.missing()
            assert set(tensor.ledger.written) == set(other.ledger.written)
            if other.memory is not None:
                assert torch.equal(tensor.memory, other.memory)


def test_what_a_run_does_not_fill_is_as_it_was_created(nan_memory):
    """A part that comes twice has as many elements as all of the tensor."""
    owed = Ledger([shard(0, 0), shard(0, 1)])
    parts = torch.empty(2, 2 * ROWS, COLUMNS, device="meta"), CPU, FirstLoad(), owed
    tensor = StagedTensor("mlp.0", "w13", *parts, initial=torch.zeros(parts[0].shape))
    weights = [(f"mlp.0.0.{half}", torch.ones(SPEC.shape)) for half in (0, 1, 0, 1)]
    stage(weights, [tensor], Copies(), table([tensor]), 1e9)
    assert tensor.ledger.complete and tensor.memory is not None
    assert tensor.memory[0].eq(1).all() and tensor.memory[1].eq(0).all()


def test_a_run_ends_with_its_layer_once_that_is_large_enough():
    weights = [(name, torch.ones(SPEC.shape)) for name in ROUTES]
    ends = []
    for limit in (0, 1e9):
        tensors = layers()
        planned = PlannedCopies(
            ROUTES, tensors, lambda _: None, None, table(tensors), limit
        )
        ends.append(planned.take_run(weights, 0))
    assert ends == [2 * EXPERTS, 4 * EXPERTS + 1]


def test_a_repeated_tensor_of_a_committed_layer_is_compared():
    tensors = layers()
    planned = PlannedCopies(ROUTES, tensors, lambda _: None, None, table(tensors), 0)
    weights = [(f"mlp.0.{e}.{h}", torch.ones(SPEC.shape)) for _, e, h in EACH[:6]]
    assert planned.take_run(weights, 0) == 6
    close([tensors[0]])
    assert planned.take_run(weights[:2], 0) == 2
    with pytest.raises(WeightSyncError, match="came again with other values"):
        planned.take_run([(weights[0][0], torch.zeros(SPEC.shape))], 0)
