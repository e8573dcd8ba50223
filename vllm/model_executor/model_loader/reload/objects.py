# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Looking into objects of any class."""

from enum import Enum
from typing import Any

import torch

__all__ = ["PLAIN", "fields"]

# What has no parts, or is looked at as a whole.
PLAIN: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    Enum,
    type,
)
PLAIN += (torch.dtype, torch.device, torch.Size, torch.memory_format)


def fields(value: Any) -> dict[str, Any] | None:
    """Attributes of an object, or None if it does not show them."""
    slots = [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ())]
    if not slots and not hasattr(value, "__dict__"):
        return None
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **held}
