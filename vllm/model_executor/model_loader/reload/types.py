# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is known of each layer between loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from weakref import ref

import torch

from .recording import FirstLoad

if TYPE_CHECKING:
    from .commit import Place
    from .model_reload import ModelReload
    from .pristine import PristineLayer

__all__ = ["BufferAlias", "LayerReloadingInfo", "LayerTensors", "OpenLayer"]

# parameters and buffers by name
LayerTensors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class OpenLayer(Protocol):
    """Whatever a layer is being loaded through."""

    @property
    def device_bytes(self) -> int:
        """Accelerator memory that its staging holds."""


@dataclass(frozen=True)
class BufferAlias:
    """A buffer, of this layer or a parent, that was created as a view of a parameter.

    Processing may give the parameter other memory; the buffer then keeps the values as
    they were loaded.
    """

    parameter: str
    layer: ref[torch.nn.Module]
    buffer: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class LayerReloadingInfo:
    """Everything a sync needs to know of one layer; kept for the layer's life.

    Attributes:
        restore_metadata: parameters and buffers as created, on the meta device.
        restore_device: device on which to stage them.
        default_dtype: type of what processing makes without naming one.
        created: create-time values of the small tensors among them, on the CPU.
        recording: whether a first load is being watched.
        first_load: by tensor name, how the first load called its loader.
        aliases: buffers that were created as views of the layer's parameters.
        pristine: the layer and its quant method as they were before processing.
        as_staged: where its tensors serve, if processing makes nothing of them; empty
            if it does, None if that is not known.
        staged: the layer's open staging, while it is being loaded.
        kernel_tensors: the tensors that serve, while others stand in their place.
        kernel_non_persistent_buffers: names of those buffers that are not persistent.
        loaded_by: the function that loads the model whose root this module is.
        model: state of syncs into the model whose root this module is.

    """

    restore_metadata: LayerTensors
    restore_device: torch.device
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    created: dict[str, torch.Tensor] = field(default_factory=dict)
    recording: bool = False
    first_load: dict[str, FirstLoad] = field(default_factory=dict)
    aliases: list[BufferAlias] = field(default_factory=list)
    pristine: PristineLayer | None = None
    as_staged: frozenset[Place] | None = None
    staged: OpenLayer | None = None
    kernel_tensors: LayerTensors | None = None
    kernel_non_persistent_buffers: set[str] = field(default_factory=set)
    loaded_by: object = None
    model: ModelReload | None = None

    @property
    def loaded_weights(self) -> tuple[()]:
        """Arguments kept for a later replay: none, loads are staged at once."""
        return ()

    def can_load(self) -> bool:
        """Whether the layer is open for loading."""
        return self.staged is not None

    def reset(self) -> None:
        """Close the layer; what was staged and not committed is dropped."""
        self.staged = None
        self.kernel_tensors = None
        self.kernel_non_persistent_buffers = set()
