# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A tensor takes its loader's way past the loader, or goes through it again."""

from ctypes import memmove
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import CASES, chunks
from tests.harness.snapshot import assert_same, snapshot
from vllm.model_executor.kernels.strided_copy import copy_strided
from vllm.model_executor.model_loader.reload import (
    copying,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    transaction,
)
from vllm.model_executor.model_loader.reload.calls import TensorSpec
from vllm.model_executor.model_loader.reload.copying import Copies, copy_values
from vllm.model_executor.model_loader.reload.ledger import Box, Ledger
from vllm.model_executor.model_loader.reload.plan import Plan, fingerprint
from vllm.model_executor.model_loader.reload.planned import PlannedCopies
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.registry import get_layerwise_info
from vllm.model_executor.model_loader.reload.route import Copy, Route
from vllm.model_executor.model_loader.reload.route_table import RouteTable
from vllm.model_executor.model_loader.reload.routing import RouteRecorder
from vllm.model_executor.model_loader.reload.staging import (
    StagedTensor,
    StagingMode,
    close,
)
from vllm.model_executor.model_loader.reload.sync_report import read_report
from vllm.model_executor.model_loader.reload.view import View

CPU = torch.device("cpu")
BUCKET = torch.arange(96.0)
A, B = BUCKET[:24].view(4, 6), BUCKET[24:48].view(4, 6)


def staged(shape=(4, 6), dtype=torch.float32, owed=None) -> StagedTensor:
    meta = torch.empty(shape, dtype=dtype, device="meta")
    ledger = Ledger(owed or [Box.whole(shape)])
    return StagedTensor("layer", "weight", meta, CPU, FirstLoad(), ledger)


def record(target: StagedTensor, load, **tensors: torch.Tensor) -> dict[str, Route]:
    """Routes of tensors that `load(meta, tensor)` is given one after the other."""
    recorder = RouteRecorder()
    with StagingMode([target], recorder):
        for name, tensor in tensors.items():
            recorder.begin(name, tensor)
            load(target.meta, tensor)
            recorder.end()
    return recorder.routes()


def whole(meta, tensor):
    meta.data.copy_(tensor)


def rows(meta, tensor):
    for row in (0, 1):
        meta.data.narrow(0, 2 * row, 2).copy_(tensor.narrow(0, 2 - 2 * row, 2))


def transposed(meta, tensor):
    meta.data.copy_(tensor.reshape(6, 4).t())


def padded(meta, tensor):
    rows(meta, tensor)
    meta[len(meta) :].fill_(0)


def broadcast(meta, tensor):
    meta.data.copy_(tensor[:1])


def nothing(meta, tensor):
    tensor.narrow(0, 0, 1)


@pytest.mark.parametrize("load", [whole, rows, transposed, padded, broadcast, nothing])
def test_a_route_copies_what_its_loader_copied(load):
    routes = record(staged(), load, a=A)
    by_loader, by_route = staged(), staged()
    with StagingMode([by_loader]):
        load(by_loader.meta, B)
    complete: list[StagedTensor] = []
    planned = PlannedCopies(routes, [by_route], complete.append)
    assert planned.take("a", B) and planned.taken == 1
    assert planned.layers == {"layer" if by_loader.written else None: 1}
    assert by_route.ledger.written == by_loader.ledger.written
    assert by_route.ledger.missing() == by_loader.ledger.missing()
    if by_loader.written:
        assert torch.equal(by_route.memory, by_loader.memory)
    assert set(complete) == ({by_route} if by_route.ledger.complete else set())


def test_a_route_casts_as_its_loader_did():
    routes = record(staged(dtype=torch.bfloat16), whole, a=A)
    target = staged(dtype=torch.bfloat16)
    assert PlannedCopies(routes, [target], lambda _: None).take("a", B)
    assert torch.equal(target.memory, B.bfloat16())


@pytest.mark.parametrize("columns", [1, 4096, 4097])
def test_short_and_long_runs_are_copied_alike(columns):
    """Up to 32 KiB, and more, in two runs of two rows."""
    sent = torch.arange(8.0 * columns).view(2, 4, columns)
    routes = record(staged((4, columns)), rows, a=sent[0])
    target = staged((4, columns))
    assert PlannedCopies(routes, [target], lambda _: None).take("a", sent[1])
    assert torch.equal(target.memory, torch.cat([sent[1, 2:], sent[1, :2]]))


class Wrapper(torch.Tensor):
    """A tensor around another one, as DTensor is."""

    @staticmethod
    def __new__(cls, inner):
        like = dict(dtype=inner.dtype, device=inner.device)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_a_tensor_without_memory_of_its_own_takes_no_route():
    routes = record(staged(), whole, a=A)
    copies = Copies(lambda batches: None)
    copies.put_off = True
    planned = PlannedCopies(routes, [staged()], lambda _: None, copies)
    assert not planned.take("a", Wrapper(B))
    assert planned.take("a", torch.nn.Parameter(B))


def by_value(meta, tensor):
    if tensor.max() > 0:
        meta.data.copy_(tensor)


def with_a_look_at_the_target(meta, tensor):
    meta.data.copy_(tensor)
    assert meta.data.isfinite().all()


def changed(meta, tensor):
    meta.data.copy_(tensor * 2)


def cast_before(meta, tensor):
    meta.data.copy_(tensor.double())


def element_by_element(meta, tensor):
    for i in range(24):
        meta.data.view(-1)[i].fill_(tensor.view(-1)[i].item())


@pytest.mark.parametrize(
    "load",
    [by_value, with_a_look_at_the_target, changed, cast_before, element_by_element],
)
def test_a_tensor_that_was_more_than_copied_has_no_route(load):
    assert not record(staged(), load, a=A)


@pytest.mark.parametrize(
    "use",
    [
        lambda meta, kept, new: meta.data.copy_(kept),
        lambda meta, kept, new: meta.data.copy_(torch.cat([kept[:2], new[:2]])),
        lambda meta, kept, new: meta.data.copy_(kept + 1),
    ],
)
def test_nothing_has_a_route_once_a_loader_kept_a_tensor(use):
    kept = []

    def load(meta, tensor):
        kept.append(tensor)
        if len(kept) == 2:
            use(meta, *kept)

    assert not record(staged(), load, a=A, b=B)


class Collecting(torch.nn.Module):
    """Takes all of its tensors before it loads the first, as many encoders do."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 4, bias=False)
        self.second = torch.nn.Linear(6, 4, bias=False)
        self.requires_grad_(False)

    def load_weights(self, weights) -> None:
        params = dict(self.named_parameters())
        for name, tensor in list(weights):
            params[name].data.copy_(tensor)


def test_a_model_that_takes_all_tensors_first_gets_them_in_each_sync():
    model = Collecting()
    record_metadata_for_reloading(model)
    for value in (0.0, 1.0, 2.0, 3.0):
        sent = [(n, torch.full((4, 6), value)) for n, _ in model.named_parameters()]
        if value:
            initialize_layerwise_reload(model)
        model.load_weights(sent)
        if value:
            finalize_layerwise_reload(model, None)
        assert all(param.eq(value).all() for param in model.parameters())


@pytest.mark.parametrize(
    "use, has_routes",
    [
        (lambda meta, kept: meta.data.copy_(kept), False),
        (lambda meta, kept: meta.data.copy_(kept + 1), False),
        (lambda meta, kept: meta.data[0, 0].fill_(kept[0, 0].item()), False),
        (lambda meta, kept: meta.data[0].copy_(meta.data[1]), True),
    ],
)
def test_nothing_has_a_route_once_a_tensor_is_used_after_the_last(use, has_routes):
    target, recorder = staged(), RouteRecorder()
    with StagingMode([target], recorder):
        recorder.begin("a", A)
        recorder.end()
        use(target.meta, A)
    assert bool(recorder.routes()) == has_routes


def test_tensors_that_write_the_same_have_no_route():
    assert not record(staged(), whole, a=A, b=B)
    halves = [Box((0, 0), (3, 6)), Box((1, 0), (4, 6))]
    assert not record(staged(owed=halves), whole, a=A)


def test_a_small_tensor_that_was_not_copied_has_no_route():
    assert not record(staged(), lambda meta, tensor: tensor.tolist(), a=BUCKET[:1])


def test_a_repeated_tensor_has_no_route():
    target = staged()
    with StagingMode([target]):
        whole(target.meta, A)
    close([target])
    assert not record(target, whole, a=A)


@pytest.mark.parametrize(
    "tensor",
    [A[:3], A.bfloat16(), B.t().contiguous().t(), torch._neg_view(A)],
    ids=str,
)
def test_what_does_not_fit_goes_through_its_loader(tensor):
    routes = record(staged(), whole, a=A)
    planned = PlannedCopies(routes, [staged()], lambda _: None)
    assert not planned.take("a", tensor) and not planned.take("b", A)
    assert planned.taken == 0
    target = staged()
    table = RouteTable(routes, {target.key: target.ledger.numbers})
    planned = PlannedCopies(routes, [target], lambda _: None, None, table)
    assert planned.take_run([("a", tensor)], 0) == 0
    assert planned.take_run([("a", A)], 0) == 1


def modules_with(expert_map):
    model = torch.nn.Module()
    model.expert_map = torch.tensor(expert_map)
    return {"": model}


def test_a_plan_dies_with_the_model_that_it_was_made_for():
    metas = [torch.empty(4, 6, device="meta")]
    before = fingerprint(modules_with([0, 1, -1]), metas)
    route = Route(TensorSpec.of(A), ())
    plan = Plan()
    plan.take_over({"a": route}, before)
    same = fingerprint(modules_with([0, 1, -1]), metas)
    assert plan.routes_for(same) == {"a": route}
    for other in (
        fingerprint(modules_with([0, -1, 1]), metas),
        fingerprint(modules_with([0, 1, -1]), [torch.empty(6, 4, device="meta")]),
        fingerprint(modules_with([0, 1, -1]), [metas[0].bfloat16()]),
    ):
        assert not plan.routes_for(other)
    plan.take_over({"b": route}, fingerprint(modules_with([1, 0, -1]), metas))
    assert set(plan.routes) == {"b"}


def test_a_sync_of_a_part_adds_nothing_to_the_plan(make_model):
    case = CASES["qwen3_moe-fp8_block"]
    model, vllm_config = built = make_model(case, seed=1)
    part = [(n, t) for n, t in case.tensors(2) if ".layers.0." in n]
    with built.worker_context():
        initialize_layerwise_reload(model)
        reload = get_layerwise_info(model).model
        assert reload is not None
        plan = reload.plan
        routes_before = dict(plan.routes)
        model.load_weights(iter(part))
        finalize_layerwise_reload(model, vllm_config.model_config)
        assert plan.routes == routes_before


def test_a_list_is_copied_and_committed_in_batches(
    make_model, cold_load, nan_memory, monkeypatch
):
    """As on an accelerator, in Triton's interpreter."""
    launches: list[int] = []

    def launch(batches):
        launches.append(sum(len(targets) for _, targets, _ in batches))
        copy_strided(batches, CPU)

    monkeypatch.setenv("VLLM_RELOAD_PLAN", "1")
    for module in (transaction, copying):
        monkeypatch.setattr(module, "batch_launcher", lambda device: launch)
    case = CASES["qwen3_moe-fp8_block"]
    model, vllm_config = built = make_model(case, seed=1)
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    with built.worker_context():
        initialize_layerwise_reload(model)
        for chunk in chunks(case.tensors(2), len(bucket), bucket):
            model.load_weights(chunk)
        finalize_layerwise_reload(model, vllm_config.model_config)
    assert_same(snapshot(model), cold_load(case, 2))
    assert sum(launches) > 4 * len(launches)


def test_of_a_tensor_that_is_repeated_in_a_list_the_last_counts():
    routes = record(staged(), whole, a=A)
    target = staged()
    launches: list[list[list[int]]] = []
    copies = Copies(
        lambda batches: launches.extend(
            [targets.tolist(), sources.tolist()] for _, targets, sources in batches
        )
    )
    copies.put_off = True
    planned = PlannedCopies(routes, [target], lambda _: None, copies)
    assert planned.take("a", A) and planned.take("a", B)
    copies.flush()
    assert target.memory is not None
    assert launches == [[[target.memory.data_ptr()], [B.data_ptr()]]]


@pytest.mark.parametrize("form", [iter, list])
@pytest.mark.parametrize("is_on", [True, False])
def test_the_report_tells_which_way_tensors_went(
    is_on, form, make_model, cold_load, nan_memory, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", str(int(is_on)))
    monkeypatch.setenv("VLLM_RELOAD_REPORT", str(tmp_path / "sync.json"))
    reports = []
    case = CASES["qwen3_moe-fp8_block"]
    model, vllm_config = built = make_model(case, seed=1)
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    for seed in (2, 3):
        with built.worker_context():
            initialize_layerwise_reload(model)
            for chunk in chunks(case.tensors(seed), len(bucket), bucket):
                model.load_weights(form(chunk))
            finalize_layerwise_reload(model, vllm_config.model_config)
        reports.append(read_report(tmp_path / "sync.json"))
    assert_same(snapshot(model), cold_load(case, 3))
    for report in reports:  # the first sync goes the way of the cold load
        planned, loaded = report.planned, report.through_loaders
        assert planned + loaded == sum(1 for _ in case.tensors(3))
        assert planned > 3 * loaded if is_on else planned == 0


def test_of_a_target_the_last_source_counts_also_where_the_first_was_put_off():
    memory = torch.zeros(4)
    view = View.whole((4,))
    spec = TensorSpec((4,), torch.float32)
    copy = Copy.of(("layer", "weight"), view, view, (), spec, torch.float32)
    copies = Copies(lambda batches: copy_strided(batches, CPU))
    copies.put_off = True
    copies.add(copy, torch.ones(4), memory)
    copies.put_off = False
    copies.add(copy, torch.full((4,), 2.0), memory)
    copies.flush()
    assert memory.tolist() == [2] * 4


def test_what_went_by_plan_counts_as_loaded(make_model, monkeypatch):
    case = CASES["qwen3_moe-bf16"]
    model, vllm_config = built = make_model(case, seed=1)
    loaded = []
    with built.worker_context():
        for plan in ("0", "1"):
            monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
            initialize_layerwise_reload(model)
            loaded.append(model.load_weights(list(case.tensors(2))))
            finalize_layerwise_reload(model, vllm_config.model_config)
    assert loaded[0] == loaded[1] == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_values_of_one_byte_are_copied_bit_by_bit(dtype):
    source = torch.arange(256, dtype=torch.uint8).view(16, 16)
    if dtype == torch.bool:
        source = source % 2
    target = torch.zeros(32, 16, dtype=torch.uint8)
    copy_values(target.view(dtype)[::2].T, source.view(dtype))
    assert torch.equal(target[::2], source.T)
    assert not target[1::2].any()


def test_values_of_another_type_are_cast():
    target = torch.zeros(3)
    copy_values(target, torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert target.tolist() == [1, 2, 3]
    narrow = torch.zeros(3, dtype=torch.uint8)
    copy_values(narrow, torch.tensor([True, False, True]))
    assert narrow.tolist() == [1, 0, 1]


# Tensors of which each is loaded into a part of a layer's, [4, 6] or [2, 4, 6].
PARTS = {
    "all": lambda target: target,
    "transposed": lambda target: target.transpose(-1, -2),
    "top": lambda target: target[..., :2, :],
    "top too": lambda target: target[..., :2, :],
    "bottom": lambda target: target[..., 2:, :],
    "middle": lambda target: target[..., 1:3, :],
    "left": lambda target: target[..., :3],
    "first": lambda target: target[:1],
    "second": lambda target: target[1:2],
    "second's top": lambda target: target[1:2, ..., :2],
    "cast": lambda target: target[..., :2, :],
}


def launch(batches) -> None:
    """Copy what waits, in the order of the layouts."""
    for layout, targets, sources in batches:
        pairs = zip(targets.tolist(), sources.tolist())
        steps = product(range(layout.outer), range(layout.rows))
        for (target, source), (i, j) in product(pairs, steps):
            target += i * layout.target_outer + j * layout.target_row
            source += i * layout.source_outer + j * layout.source_row
            memmove(target, source, layout.row_bytes)


def tensor_for(name: str, shape: tuple[int, ...], value: float) -> torch.Tensor:
    dtype = torch.float64 if name == "cast" else torch.float32
    part = PARTS[name](torch.empty(shape))
    return torch.full(part.shape, value, dtype=dtype)


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
@pytest.mark.parametrize("owed", [["all"], ["top", "bottom"]], ids=str)
@settings(deadline=None)
@given(st.lists(st.sampled_from([*PARTS]), max_size=8))
def test_parts_under_several_names_are_copied_in_order(owed, shape, names):
    """Each was recorded in a sync without the others."""
    routes: dict[str, Route] = {}
    boxes: list[Box] = []
    for name, part in PARTS.items():
        target = staged(shape)
        sent = {name: tensor_for(name, shape, 0.0)}
        routes |= record(target, lambda meta, t: part(meta).copy_(t), **sent)  # noqa: B023
        boxes += target.ledger.written if name in owed else []
    target, copies = staged(shape, owed=boxes), Copies(launch)
    table = RouteTable(routes, {target.key: target.ledger.numbers})
    planned = PlannedCopies(routes, [target], lambda _: None, copies, table, 1e9)
    copies.put_off = True
    target.materialize().zero_()
    weights = [(n, tensor_for(n, shape, float(i))) for i, n in enumerate(names, 1)]
    place = 0
    while place < len(weights):
        before, place = place, planned.take_run(weights, place)
        if place == before:
            assert planned.take(*weights[place])
            place += 1
    copies.flush()
    expected = torch.zeros(shape)
    for name, tensor in weights:
        PARTS[name](expected).copy_(tensor)
    assert torch.equal(target.memory, expected)
