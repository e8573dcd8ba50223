# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reproducible values: each depends on its name and the seed, never on the order."""

import hashlib

import torch


def _generator(name: str, seed: int, device: str = "cpu") -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def normal(
    name: str, shape: tuple[int, ...], seed: int, device: str = "cpu"
) -> torch.Tensor:
    """Standard normal values, float32, of the given shape."""
    generator = _generator(name, seed, device)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def uniform(name: str, seed: int) -> torch.Tensor:
    """One value in [0, 1), 0-d float32."""
    return torch.rand((), generator=_generator(name, seed), dtype=torch.float32)
