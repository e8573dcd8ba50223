# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The code of the page about reloading layer by layer does what the page says."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from overlay.base import ROOT
from tests.checkpoints import CASES, write_checkpoint
from tests.harness import stand_ins
from tests.harness.models import Built, build, single_rank
from tests.harness.snapshot import assert_same, snapshot
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_processing,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import finish_first_load

CASE = CASES["qwen3_moe-fp8_block"]


def code_below(heading: str) -> dict[str, Any]:
    """What the first Python block below a heading defines."""
    page = (ROOT / "docs" / "layerwise.md").read_text()
    block = page.split(f"## {heading}")[1].split("```python")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


@pytest.fixture(autouse=True)
def rank(monkeypatch) -> Iterator[None]:
    stand_ins.install(monkeypatch)
    with single_rank():
        yield


def test_the_worker_extension_syncs(tmp_path):
    new = dict(CASE.tensors(2))
    built = build(CASE, write_checkpoint(CASE, 1, tmp_path / "old"))
    fresh = build(CASE, write_checkpoint(CASE, 2, tmp_path / "new"))
    extension = extension_of(built)
    half = len(new) // 2
    extension.sync([list(new.items())[:half], list(new.items())[half:]])
    assert_same(snapshot(built.model), snapshot(fresh.model))


def extension_of(built: Built) -> Any:
    extension = code_below("Who starts it")["Extension"]()
    extension.model_runner = SimpleNamespace(get_model=lambda: built.model)
    extension.vllm_config = built.vllm_config
    return extension


class Model(torch.nn.Module):
    """One layer of a quantisation method."""

    def __init__(self, method: Any):
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.quant_method = method
        sizes = 4, [2, 3], 4, 5, torch.float32
        method.create_weights(self.layer, *sizes, weight_loader=self.load)

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data.copy_(loaded)

    def load_weights(self, weights: Any) -> None:
        for _, tensor in weights:
            weight: Any = self.layer.weight
            weight.weight_loader(weight, tensor)


def test_the_method_quantises_what_is_loaded_and_reloaded():
    model = Model(code_below("Quantising while loading")["HalvingMethod"]())
    weight: Any = model.layer.weight
    assert weight.is_meta
    record_metadata_for_reloading(model)
    first, second = torch.randn(2, 5, 4)
    model.load_weights([("layer.weight", first)])
    finish_first_load(model)
    finalize_layerwise_processing(model, None)
    serving: Any = model.layer.weight
    assert torch.equal(serving, first / 2)
    initialize_layerwise_reload(model)
    model.load_weights([("layer.weight", second)])
    finalize_layerwise_reload(model, None)
    assert model.layer.weight is serving
    assert torch.equal(serving, second / 2)
