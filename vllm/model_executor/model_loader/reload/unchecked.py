# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Roads for weights that lead past the checks of a sync.

Weights in kernel format, and patches of a few elements of each tensor, are written to
the tensors that serve. Nobody knows what they owe, so nothing can be missing. The log
and the status of the model name the road, until a sync brings all weights. A road that
breaks off leaves a mixture, and requests are refused.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from .layerwise import mark_inconsistent, note_unchecked, reload_status

__all__ = ["kernel_format_is_unchecked", "patches_are_unchecked"]


def kernel_format_is_unchecked(reload_weights: Callable) -> Callable:
    """Wrap `reload_weights(..., model, ..., is_checkpoint_format)`."""
    signature = inspect.signature(reload_weights)

    @wraps(reload_weights)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["is_checkpoint_format"]:
            return reload_weights(*args, **kwargs)
        with _unchecked(given["model"], "kernel format"):
            return reload_weights(*args, **kwargs)

    return watched


def patches_are_unchecked(load_chunk: Callable) -> Callable:
    """Wrap `load_chunk(model, ...)`, which loads patches outside of a sync or in one.

    In a sync they go the way of all weights.
    """

    @wraps(load_chunk)
    def watched(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if reload_status(model).state == "updating":
            return load_chunk(model, *args, **kwargs)
        with _unchecked(model, "patches"):
            return load_chunk(model, *args, **kwargs)

    return watched


@contextmanager
def _unchecked(model: torch.nn.Module, road: str) -> Iterator[None]:
    note_unchecked(model, road)
    try:
        yield
    except BaseException as error:
        mark_inconsistent(
            model, f"an update past the checks ({road}) failed: {error!r}"
        )
        raise
