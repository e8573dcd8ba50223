# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Experts that load balancing has moved get their own weights, wherever they are."""

from collections.abc import Callable, Iterable

import pytest
import torch

from tests.checkpoints import CASES, Case
from tests.harness.models import Built
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.placement import (
    ExpertPlacement,
    expert_placements,
)
from vllm.model_executor.model_loader.reload.registry import get_layerwise_info
from vllm.model_executor.model_loader.reload.transaction import ReloadTransaction

CASE = CASES["qwen3_moe-fp8_block"]


def move_experts(model: torch.nn.Module, layer: int, places: list[int]) -> None:
    """Tell the router of a layer that its experts are at these places."""
    experts = model.model.layers[layer].mlp.experts
    owner = experts if "eplb_state" in vars(experts) else experts.router
    state = EplbLayerState(logical_to_physical_map=torch.tensor(places)[:, None])
    owner.eplb_state = state


@pytest.fixture(params=[list, iter], ids=["list", "iterator"])
def sync(request) -> Callable[[Built, Case, int], int]:
    """Sync all tensors of a seed, as both are sent; return how many went by plan."""

    def sync(built: Built, case: Case, seed: int) -> int:
        return sync_by_plan(built, request.param(case.tensors(seed)))

    return sync


def sync_by_plan(built: Built, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    model, vllm_config = built
    with built.worker_context():
        initialize_layerwise_reload(model)
        reload = get_layerwise_info(model).model
        assert reload is not None
        transaction = reload.transaction
        assert isinstance(transaction, ReloadTransaction)
        model.load_weights(weights)
        finalize_layerwise_reload(model, vllm_config.model_config)
    return transaction._planned.taken


def experts_of(model: torch.nn.Module, layer: int) -> dict[str, torch.Tensor]:
    experts = model.model.layers[layer].mlp.experts
    return {
        name.rpartition(".")[2]: param.data
        for name, param in experts.named_parameters()
        if param.dim() > 2  # the router is no expert
    }


def assert_placed(built: Built, cold: Built, layer: int, places: list[int]) -> None:
    expected = experts_of(cold.model, layer)
    for name, tensor in experts_of(built.model, layer).items():
        bits = tensor[places].view(torch.uint8)
        assert torch.equal(bits, expected[name].view(torch.uint8)), name


def test_an_expert_goes_to_the_place_where_it_is_now(make_model, sync):
    built, cold = make_model(CASE, seed=1), make_model(CASE, seed=2)
    count = CASE.sizes.experts
    here, moved = list(range(count)), [*range(1, count), 0]
    move_experts(built.model, 0, here)
    move_experts(built.model, 1, moved)
    sync(built, CASE, seed=2)
    assert_placed(built, cold, 0, here)
    assert_placed(built, cold, 1, moved)


def test_a_plan_lasts_until_experts_move(make_model, sync):
    built, cold = make_model(CASE, seed=1), make_model(CASE, seed=2)
    count = CASE.sizes.experts
    move_experts(built.model, 1, [*range(1, count), 0])
    assert sync(built, CASE, seed=3) == 0
    assert sync(built, CASE, seed=3) > 0
    moved = [*range(2, count), 0, 1]
    move_experts(built.model, 1, moved)
    assert sync(built, CASE, seed=2) == 0
    assert_placed(built, cold, 1, moved)


def load(param, weight, name, shard_id, expert_id, return_success=False):
    """A loader of a rank that has places 2 and 3."""
    if expert_id < 2:
        return False if return_success else None
    param[expert_id - 2] = weight
    return True if return_success else None


def test_every_copy_of_an_expert_is_loaded_once():
    placement = ExpertPlacement.of(torch.tensor([[2, -1], [0, 3], [1, -1]]))
    param = torch.zeros(2)

    def loaded(expert: int) -> bool:
        args = param, torch.tensor(expert + 1.0), "w13_weight"
        named = dict(shard_id="w1", expert_id=expert, return_success=True)
        return placement.load(load, args, named)

    assert [loaded(expert) for expert in range(4)] == [True, True, False, False]
    assert param.tolist() == [1, 2]


def test_a_loader_without_experts_is_called_as_ever():
    placement = ExpertPlacement(((1,), (0,)))
    assert placement.load(lambda param, weight: weight, (None, 3), {}) == 3


def test_all_experts_at_once_are_refused_where_they_have_moved():
    def load_all(param, loaded_weight, expert_id):
        param.copy_(loaded_weight)

    here = torch.zeros(2, 2, 2)
    args = here, torch.ones(2, 2, 2), 0
    with pytest.raises(WeightSyncError, match="one by one"):
        ExpertPlacement(((1,), (0,))).load(load_all, args, {})
    assert here.eq(0).all()
    ExpertPlacement(((0,), (1,))).load(load_all, args, {})
    assert here.eq(1).all()


def test_layers_that_are_not_balanced_have_no_placement(make_model):
    model = make_model(CASE, seed=1).model
    modules = dict(model.named_modules())
    assert not expert_placements(modules)
    move_experts(model, 1, list(range(CASE.sizes.experts)))
    placed = expert_placements(modules)
    names = {name for name, module in modules.items() if module in placed}
    assert names and all(name.startswith("model.layers.1.mlp") for name in names)
