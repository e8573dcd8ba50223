# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An order of tensors that completes one layer after the other.

What is staged at a time is then one layer, however a checkpoint is cut into files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .route import Route

__all__ = ["in_order_of_layers"]


def in_order_of_layers(
    names: Iterable[str], routes: Mapping[str, Route]
) -> Iterator[str]:
    """Bring together the names whose tensors go to one layer.

    Example: with gate and up of experts 0 and 1 in the order gate 0, norm, gate 1, all
    gates come first, and then the norm.

    Args:
        names: names in a checkpoint, in the order in which they are best read.
        routes: where they go, as far as is known. A name without a route goes where
            the names next to it in the checkpoint's tree do.

    Returns:
        The names, layers in the order of their first ones, and the names of each as
        they were.

    """
    layers = {
        module: copy.tensor[0]
        for name, route in routes.items()
        for copy in route.copies[:1]
        for module in (name, *_modules(name))
    }
    by_layer: dict[str, list[str]] = {}
    for name in names:
        known = (layers[m] for m in (name, *_modules(name)) if m in layers)
        by_layer.setdefault(next(known, name), []).append(name)
    for together in by_layer.values():
        yield from together


def _modules(name: str) -> Iterator[str]:
    """The modules that a name is in, from the innermost on."""
    while name := name.rpartition(".")[0]:
        yield name
