# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether objects of two layers differ in nothing but their layers' names.

Code that runs over such objects does the same to both layers.
"""

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch

from .bitwise import same_bytes
from .objects import PLAIN, fields

__all__ = ["Likeness", "same_layout"]

# Tensors of integers say what goes where, an expert map say; large ones are weights.
_MAX_COMPARED_BYTES = 1 << 16


class Likeness:
    """Compares what belongs to one layer with what belongs to another.

        alike = Likeness("model.layers.0.mlp", "model.layers.1.mlp")
        alike("layers.0.mlp.weight", "layers.1.mlp.weight")     # True
        alike(layer_0.weight_loader, layer_1.weight_loader)     # all that it can reach

    Values of weights are not compared, everything else is. What does not show its parts
    is alike only if it is equal, and what cannot be compared is not alike.

    Args:
        one: qualified name of the one layer.
        other: qualified name of the other.

    """

    def __init__(self, one: str, other: str):
        self._differences = set(_differences(one, other))
        self._strings: dict[tuple[str, str], bool] = {}
        # Assumed of pairs while they are compared, and true if no difference is found.
        self._pairs: dict[tuple[int, int], tuple[Any, Any]] = {}

    def __call__(self, one: Any, other: Any) -> bool:
        if isinstance(one, str) and isinstance(other, str):
            return self._same_string(one, other)
        known = self._pairs.copy()
        try:
            same = bool(self._same(one, other))
        except Exception:  # as of arrays, which are neither equal nor not
            same = False
        if not same:
            self._pairs = known
        return same

    def _same(self, one: Any, other: Any) -> bool:
        if one is other:
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, str):
            return self._same_string(one, other)
        if isinstance(one, PLAIN):
            return one == other
        key = (id(one), id(other))
        if key in self._pairs:
            return True
        self._pairs[key] = one, other
        return self._same_parts(one, other)

    def _same_string(self, one: str, other: str) -> bool:
        if one == other:
            return True
        if (one, other) not in self._strings:
            same_count = one.count(".") == other.count(".")
            known = self._differences.issuperset(_differences(one, other))
            self._strings[one, other] = same_count and known
        return self._strings[one, other]

    def _same_parts(self, one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            same = same_layout(one, other) and _same_values(one, other)
            return same and self._same(vars(one), vars(other))
        if isinstance(one, dict):
            return self._same(list(one.items()), list(other.items()))
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(self._same, one, other))
        if isinstance(one, MethodType):
            same_code = one.__func__ is other.__func__
            return same_code and self._same(one.__self__, other.__self__)
        if isinstance(one, partial):
            return self._same(
                (one.func, one.args, one.keywords),
                (other.func, other.args, other.keywords),
            )
        if isinstance(one, FunctionType):
            same_code = one.__code__ is other.__code__
            return same_code and self._same(_held(one), _held(other))
        parts = fields(one)
        return one == other if parts is None else self._same(parts, fields(other))


def _differences(one: str, other: str) -> Iterator[tuple[str, str, str]]:
    """Words of dotted names that differ, with the word before: an expert's number is
    not its layer's.
    """
    before = ""
    for word, other_word in zip(one.split("."), other.split(".")):
        if word != other_word:
            yield before, word, other_word
        before = word


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ in nothing but their values."""
    layouts = [(type(t), t.shape, t.stride(), t.dtype, t.device) for t in (one, other)]
    return layouts[0] == layouts[1]


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_weight = one.is_floating_point() or one.nbytes > _MAX_COMPARED_BYTES
    return is_weight or same_bytes(one, other)


def _held(function: FunctionType) -> list[Any]:
    """Values that a function carries with it."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [cells, function.__defaults__, function.__kwdefaults__, vars(function)]
