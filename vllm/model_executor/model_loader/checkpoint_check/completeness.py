# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a checkpoint has all that its config and its index say it has."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import regex as re

from vllm.model_executor.model_loader.reload.errors import Finding

from .checkpoint import Checkpoint
from .experts import Expert, find_experts, find_fused_experts

__all__ = ["find_missing", "find_surplus"]

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?layers)\.(?P<index>\d+)\.")
_ROUTER = re.compile(r"(?P<block>.*)\.(?:gate|router)\.weight")
_EXPERT_COUNTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
)


def find_missing(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A finding about each tensor, layer, expert or projection that is not stored.

    An expert needs the projections that half of all have.
    """
    own = find_experts(checkpoint.tensors)
    fused = find_fused_experts(checkpoint.tensors)
    yield from _unlisted(checkpoint)
    yield from _missing_layers(checkpoint)
    yield from _missing_projections(own)
    yield from _missing_projections(fused)
    count = _expert_count(checkpoint.text_config)
    if count is not None:
        yield from _missing_experts([*own, *fused], count)
        yield from _missing_blocks(checkpoint, {e.module for e in own + fused}, count)


def find_surplus(experts: list[Expert], checkpoint: Checkpoint) -> Iterator[Finding]:
    """A finding about each expert beyond those that config.json has."""
    count = _expert_count(checkpoint.text_config)
    for expert in experts:
        if count is not None and expert.index >= count:
            detail = f"stored, but config.json has {count} experts"
            yield Finding(expert.module, str(expert.index), detail)


def _unlisted(checkpoint: Checkpoint) -> Iterator[Finding]:
    for name in sorted(checkpoint.listed.keys() - checkpoint.tensors.keys()):
        layer, _, parameter = name.rpartition(".")
        file = checkpoint.listed[name]
        yield Finding(layer, parameter, f"not stored; the index has it in {file}")


def _missing_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Of the stack with the most tensors: a vision tower has layers of its own."""
    count = checkpoint.text_config.get("num_hidden_layers")
    stacks: dict[str, Counter[int]] = defaultdict(Counter)
    for match in filter(None, map(_LAYER.match, checkpoint.tensors)):
        stacks[match["stack"]][int(match["index"])] += 1
    if not stacks or not isinstance(count, int):
        return
    stack = max(stacks, key=lambda name: stacks[name].total())
    for index in sorted(set(range(count)) - stacks[stack].keys()):
        yield Finding(stack, str(index), f"not stored; config.json has {count} layers")


def _missing_projections(experts: list[Expert]) -> Iterator[Finding]:
    times = Counter(name for expert in experts for name in expert.projections)
    needed = {name for name in times if 2 * times[name] >= len(experts)}
    for expert in experts:
        for name in sorted(needed - expert.projections):
            yield Finding(expert.module, f"{expert.index}.{name}", "not stored")


def _expert_count(config: Mapping[str, object]) -> int | None:
    counts = [config.get(key) for key in _EXPERT_COUNTS]
    return next((count for count in counts if isinstance(count, int)), None)


def _missing_experts(experts: list[Expert], count: int) -> Iterator[Finding]:
    stored: dict[str, set[int]] = defaultdict(set)
    for expert in experts:
        stored[expert.module].add(expert.index)
    for module, indices in stored.items():
        for index in sorted(set(range(count)) - indices):
            detail = f"not stored; config.json has {count} experts"
            yield Finding(module, str(index), detail)


def _missing_blocks(
    checkpoint: Checkpoint, modules: set[str], count: int
) -> Iterator[Finding]:
    """Blocks that have a router but no experts, where others have both."""
    for name, tensor in checkpoint.tensors.items():
        match = _ROUTER.fullmatch(name)
        if not modules or match is None or tensor.shape[:1] != (count,):
            continue
        if f"{match['block']}.experts" not in modules:
            detail = f"none is stored; config.json has {count}"
            yield Finding(match["block"], "experts", detail)
