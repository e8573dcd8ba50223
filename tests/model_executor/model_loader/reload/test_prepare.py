# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A sync that is prepared first: the old weights serve until it is finished."""

from collections.abc import Iterable

import pytest
import torch

from tests.checkpoints import CASES, Case
from tests.harness.memory import allocated
from tests.harness.models import Built
from tests.harness.snapshot import Snapshot, assert_same, snapshot
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    reload_status,
)
from vllm.model_executor.model_loader.reload.layerwise import prepare_layerwise_reload

# Experts, attention that has scales of its own, and attention that processes its child.
NAMES = [
    "qwen3_moe-fp8_block",
    "qwen3_moe-fp8_block-fp8_kv",
    "deepseek_v3-fp8_block",
]
OWED = "model.layers.1.mlp.experts.7.up_proj.weight_scale_inv"

Tensors = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture(params=["model", "layer"])
def policy(request, monkeypatch) -> str:
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", request.param)
    return request.param


@pytest.fixture
def per_model(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")


def serving(built: Built) -> Snapshot:
    """What serves, without the sync that is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(vars(built.model), "load_weights", raising=False)
        return snapshot(built.model)


def send(built: Built, tensors: Tensors) -> None:
    with built.worker_context():
        initialize_layerwise_reload(built.model)
        built.model.load_weights(tensors)


def prepare(built: Built) -> None:
    with built.worker_context():
        prepare_layerwise_reload(built.model, built.vllm_config.model_config)


def finish(built: Built) -> None:
    with built.worker_context():
        finalize_layerwise_reload(built.model, built.vllm_config.model_config)


def lacking(case: Case) -> Tensors:
    return ((name, tensor) for name, tensor in case.tensors(2) if name != OWED)


@pytest.mark.parametrize("amx", [True, False], ids=["any", "no AMX"])
@pytest.mark.parametrize("name", NAMES)
def test_the_old_weights_serve_until_it_is_finished(
    name, amx, per_model, make_model, monkeypatch
):
    if not amx:  # attention then derives its tensors in place
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    new = serving(make_model(CASES[name], seed=2))
    built = make_model(CASES[name], seed=1)
    before = serving(built)
    send(built, CASES[name].tensors(2))
    prepare(built)
    assert_same(serving(built), before)
    finish(built)
    assert_same(serving(built), new)


def test_it_is_finished_whatever_the_policy(policy, make_model, cold_load):
    case = CASES[NAMES[1]]
    built = make_model(case, seed=1)
    send(built, case.tensors(2))
    prepare(built)
    prepare(built)
    finish(built)
    assert_same(serving(built), cold_load(case, 2))
    assert reload_status(built.model).version == 1


def test_what_is_missing_is_told_before(per_model, make_model):
    case = CASES[NAMES[0]]
    built = make_model(case, seed=1)
    before = serving(built)
    send(built, lacking(case))
    with pytest.raises(WeightSyncError, match="incomplete") as raised:
        prepare(built)
    assert [(each.expert, each.shard) for each in raised.value.missing] == [(7, "up")]
    assert_same(serving(built), before)
    with pytest.raises(WeightSyncError, match="no weight sync is open"):
        finish(built)


def test_nothing_comes_after_it(per_model, make_model):
    case = CASES[NAMES[0]]
    built = make_model(case, seed=1)
    send(built, case.tensors(2))
    prepare(built)
    with pytest.raises(WeightSyncError, match="takes no more tensors"):
        built.model.load_weights(case.tensors(3))


def test_it_may_be_aborted_and_holds_no_memory_then(per_model, make_model, cold_load):
    case = CASES[NAMES[0]]
    built = make_model(case, seed=1)
    before = serving(built)
    sent = list(case.tensors(2))
    with allocated() as count:
        send(built, sent)
        prepare(built)
        abort_layerwise_reload(built.model, "another replica refused it")
    total = sum(param.nbytes for param in built.model.parameters())
    assert count.peak > total
    assert count.left <= 0.05 * total
    assert_same(serving(built), before)
    send(built, case.tensors(2))
    finish(built)
    assert_same(serving(built), cold_load(case, 2))


def test_without_a_sync_there_is_nothing_to_prepare(make_model):
    prepare(make_model(CASES[NAMES[0]], seed=1))


@pytest.mark.parametrize("plan", ["0", "1"])
def test_what_comes_after_an_abort_is_refused(plan, policy, make_model, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    case = CASES[NAMES[0]]
    built = make_model(case, 1)
    before = serving(built)

    def tensors() -> Tensors:
        abort_layerwise_reload(built.model, "the trainer gave up")
        yield from case.tensors(2)

    with pytest.raises(WeightSyncError, match="aborted.*the trainer gave up"):
        send(built, tensors())
    assert_same(serving(built), before)
    assert reload_status(built.model).state == "serving"


def test_a_loader_that_somebody_holds_takes_nothing_once_prepared(policy, make_model):
    case = CASES[NAMES[0]]
    built = make_model(case, 1)
    with built.worker_context():
        initialize_layerwise_reload(built.model, exposed=True)
        held = built.model.model.embed_tokens.weight
        built.model.load_weights(case.tensors(2))
    prepare(built)
    with pytest.raises(WeightSyncError, match="takes no more tensors"):
        held.weight_loader(held, torch.zeros(held.shape))
    finish(built)
    assert reload_status(built.model).version == 1


def test_what_is_complete_and_waits_is_not_served_by_an_incomplete_sync(
    make_model, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "off")
    case = CASES[NAMES[0]]
    built = make_model(case, seed=1)
    before = serving(built)
    sent = {"model.layers.0.input_layernorm.weight", OWED.removesuffix("_scale_inv")}
    send(built, ((name, tensor) for name, tensor in case.tensors(2) if name in sent))
    with pytest.raises(WeightSyncError, match="incomplete"):
        finish(built)
    assert_same(serving(built), before)
    assert reload_status(built.model).state == "serving"
