# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the first load wrote, derived once for layers that are alike."""

from __future__ import annotations

import torch

from .first_load import original_loader
from .ledger import Ledger
from .likeness import Likeness, same_layout
from .recording import FirstLoad

__all__ = ["Derivation"]


class _Loaded:
    """A tensor, and how the first load brought it."""

    def __init__(self, layer: str, meta: torch.Tensor, first: FirstLoad):
        self.layer = layer
        self.first = first
        self.loader = original_loader(meta)
        self._meta = meta
        # Its loader too, which is another one later.
        self._attributes = dict(vars(meta))

    def is_like(self, other: _Loaded, alike: Likeness) -> bool:
        """Whether the same loader was called alike, so that it wrote the same."""
        return (
            same_layout(self._meta, other._meta)
            and _same_loads(self.first, other.first, alike)
            and alike(self._attributes, other._attributes)
        )


def _same_loads(one: FirstLoad, other: FirstLoad, alike: Likeness) -> bool:
    counts = [(len(first.calls), len(first.sources)) for first in (one, other)]
    if counts[0] != counts[1] or counts[0][0] < counts[0][1]:
        return False  # also where a call was made twice: of which source was it?
    same_calls = (
        spec == other_spec
        and call.names == other_call.names
        and _same_values(call.values, other_call.values, alike)
        for (call, spec), (other_call, other_spec) in zip(
            one.calls.items(), other.calls.items()
        )
    )
    same_sources = (
        view == other_view and (sent and sent.spec) == (other_sent and other_sent.spec)
        for (sent, _, view), (other_sent, _, other_view) in zip(
            one.sources, other.sources
        )
    )
    return all(same_calls) and all(same_sources)


def _same_values(one: tuple, other: tuple, alike: Likeness) -> bool:
    """Whether arguments are the same but for a name: most are, and need no look."""
    same = (a == b or alike(a, b) for a, b in zip(one, other))
    return len(one) == len(other) and all(same)


class Derivation:
    """Derives what first loads wrote."""

    def __init__(self) -> None:
        self._derived: dict[tuple[str, torch.Size], _Loaded] = {}
        self._likeness: dict[tuple[str, str], Likeness] = {}

    def derive(
        self, layer: str, name: str, meta: torch.Tensor, first: FirstLoad
    ) -> None:
        """Set what is owed of a tensor, and the writes of its calls, where unknown.

        Args:
            layer: qualified name of the layer.
            name: the tensor's name there.
            meta: the tensor in checkpoint format, on the meta device.
            first: how the first load called its loader.

        """
        if first.owed is not None or not first.called or first.ambiguous:
            return
        here = _Loaded(layer, meta, first)
        like = self._derived.get((name, meta.shape))
        if like is not None and self._is_like(here, like):
            first.write_like(like.first)
        elif (boxes := first.boxes(here.loader, meta)) is not None:
            first.owed = Ledger(boxes)
            self._derived[name, meta.shape] = here

    def _is_like(self, one: _Loaded, other: _Loaded) -> bool:
        names = one.layer, other.layer
        alike = self._likeness.setdefault(names, Likeness(*names))
        return one.is_like(other, alike)
