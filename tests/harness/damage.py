# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Changes to a checkpoint's tensors, in place; and what is then said of it."""

from collections.abc import Callable, Iterable, Sequence

import torch

from vllm.model_executor.model_loader.checkpoint_check import (
    CheckpointReport,
    SyncReport,
)

Tensors = dict[str, torch.Tensor]


def remove(tensors: Tensors, part: str) -> None:
    """Remove each tensor whose name has this part."""
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def replace(
    tensors: Tensors, name: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put what is made of a tensor in its place."""
    tensors[name] = make(tensors[name]).contiguous()


def fuse(tensors: Tensors) -> None:
    """Put the experts of each layer into two tensors, as some releases have them."""
    modules = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for module in modules:
        for leaf in ("weight", "weight_scale_inv"):
            gate, up, down = (
                _stack(tensors, f"{module}.experts", f"{projection}.{leaf}")
                for projection in ("gate_proj", "up_proj", "down_proj")
            )
            suffix = leaf.removeprefix("weight")
            gate_up = torch.cat([gate, up], dim=1)
            tensors[f"{module}.experts.gate_up_proj{suffix}"] = gate_up
            tensors[f"{module}.experts.down_proj{suffix}"] = down


def found(report: CheckpointReport | SyncReport) -> list[str]:
    """A line on each thing that is wrong."""
    return [str(finding) for finding in (*report.missing, *report.invalid)]


def passed_on(items: Sequence, unit: str) -> Iterable:
    """No progress bar."""
    return items


def _stack(tensors: Tensors, module: str, name: str) -> torch.Tensor:
    """Take the tensors of this name out of all experts, [E, ...]."""
    names = [n for n in tensors if n.startswith(module) and n.endswith(f".{name}")]
    names.sort(key=lambda n: int(n.removeprefix(f"{module}.").split(".")[0]))
    return torch.stack([tensors.pop(n) for n in names])
