# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Products of a mixture of experts, for tests and benchmarks.

M - tokens
T - experts each token is routed to
E - experts
N, K - output and input features
n, k - blocks of N and of K that share a scale
"""

from dataclasses import dataclass

import torch

from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import Routing

__all__ = ["MODELS", "Experts", "Problem", "problem", "route", "weights"]

FP8 = torch.float8_e4m3fn
Scaling = tuple[int, int] | str


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a model.

    Attributes:
        count: E.
        top_k: T.
        hidden: features of a token.
        intermediate: features of an expert between its two products.

    """

    count: int
    top_k: int
    hidden: int
    intermediate: int

    def product(self, is_second: bool) -> tuple[int, int]:
        """(N, K) of the first or the second product of a layer."""
        if is_second:
            return self.hidden, self.intermediate
        return 2 * self.intermediate, self.hidden


MODELS = {
    "Qwen3-30B-A3B": Experts(128, 8, 2048, 768),
    "Qwen3-235B-A22B": Experts(128, 8, 4096, 1536),
    "DeepSeek-V3": Experts(256, 8, 7168, 2048),
    "Mixtral-8x7B": Experts(8, 2, 4096, 14336),
}


@dataclass
class Problem:
    """Inputs of a product.

    Attributes:
        a: [M, K] FP8; [M * T, K] in the second product of a layer.
        b: [E, N, K] FP8.
        a_scale: [rows of a, ceil(K / k)], or [rows of a, 1], or [1].
        b_scale: [E, ceil(N / n), ceil(K / k)], or [E, N, 1], or [E].
        experts: [M, T], expert of each slot.
        weights: [M, T], routing weights.
        block_shape: (n, k), or None.

    """

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    block_shape: tuple[int, int] | None

    @property
    def top_k(self) -> int:
        """Slots that share a row of `a`."""
        return self.experts.numel() // self.a.shape[0]

    def expected(self) -> torch.Tensor:
        """[M * T, N] in float64, without routing weights."""
        a, b = self.a.double(), self.b.double()
        if self.block_shape is None:
            a = a * self.a_scale.double().reshape(-1, 1)
            b = b * self.b_scale.double().reshape(b.shape[0], -1, 1)
        else:
            n, k = self.block_shape
            a = a * _spread(self.a_scale, 1, k, a.shape[1])
            b = b * _spread(_spread(self.b_scale, 1, n, b.shape[1]), 2, k, b.shape[2])
        out = a.new_empty(self.experts.numel(), b.shape[1])
        owners = self.experts.flatten()
        for expert in owners.unique().tolist():
            slots = (owners == expert).nonzero().flatten()
            out[slots] = a[slots // self.top_k] @ b[expert].T
        return out


def _spread(scale: torch.Tensor, dim: int, block: int, size: int) -> torch.Tensor:
    return scale.double().repeat_interleave(block, dim).narrow(dim, 0, size)


def weights(
    experts: int, n: int, k: int, scaling: Scaling, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `b` and `b_scale`; `scaling` is a block shape, "channel" or "tensor"."""
    shapes: dict[Scaling, tuple[int, ...]]
    shapes = {"channel": (experts, n, 1), "tensor": (experts,)}
    if isinstance(scaling, tuple):
        shapes[scaling] = (experts, -(-n // scaling[0]), -(-k // scaling[1]))
    b = torch.empty(experts, n, k, dtype=FP8, device=random.device)
    for expert in b:
        expert.copy_((_draw(random, n, k) - 0.5) * 8)
    return b, _draw(random, *shapes[scaling]) + 0.1


def problem(
    m: int,
    n: int,
    k: int,
    scaling: Scaling,
    seed: int = 0,
    *,
    device: torch.device,
    experts: int = 4,
    top_k: int = 2,
    is_second: bool = False,
    b_and_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Problem:
    """Draw a problem, with these weights if they are there already."""
    random = torch.Generator(device).manual_seed(seed)
    b, b_scale = b_and_scale or weights(experts, n, k, scaling, random)
    rows = m * top_k if is_second else m
    shapes: dict[Scaling, tuple[int, ...]]
    shapes = {"channel": (rows, 1), "tensor": (1,)}
    if isinstance(scaling, tuple):
        shapes[scaling] = (rows, -(-k // scaling[1]))
    return Problem(
        a=((_draw(random, rows, k) - 0.5) * 8).to(FP8),
        b=b,
        a_scale=_draw(random, *shapes[scaling]) + 0.1,
        b_scale=b_scale,
        experts=_draw(random, m, experts).topk(top_k, 1).indices,
        weights=_draw(random, m, top_k),
        block_shape=scaling if isinstance(scaling, tuple) else None,
    )


def _draw(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=random, device=random.device)


def route(p: Problem, block_m: int, mapping: torch.Tensor | None = None) -> Routing:
    """Sort slots by expert and pad each expert's to whole blocks.

    Args:
        p: the problem.
        block_m: slots in a block.
        mapping: [E], local expert of each expert, -1 if it is elsewhere.

    """
    owners, experts = p.experts.flatten(), p.b.shape[0]
    total = owners.numel()
    counts = torch.bincount(owners, minlength=experts)
    blocks = (counts + block_m - 1) // block_m
    order = owners.argsort(stable=True)
    rank = torch.arange(total, device=owners.device) - _before(counts)[owners[order]]
    most = total + experts * (block_m - 1)  # what a worst case takes
    slots = torch.full((most,), total, dtype=torch.int32, device=owners.device)
    slots[_before(blocks)[owners[order]] * block_m + rank] = order.int()
    local = torch.arange(experts, device=owners.device) if mapping is None else mapping
    owner_of = torch.full((-(-most // block_m),), -1, device=owners.device).int()
    used = local.to(owners.device).int().repeat_interleave(blocks)
    owner_of[: used.numel()] = used
    padded = (blocks.sum() * block_m).int().reshape(1)
    return Routing(slots, owner_of, padded, p.top_k, block_m)


def _before(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0) - counts
