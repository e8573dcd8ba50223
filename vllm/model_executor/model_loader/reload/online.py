# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processing a layer while the model is first loaded (online quantisation)."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch

from vllm.config import ModelConfig
from vllm.logger import init_logger

from .first_load import original_loader, owed_by, set_loader
from .meta import SKIP_LOAD_TENSORS, to_meta_tensor
from .processing import is_attention, process_attention, process_quantized
from .recording import FirstLoad, RecordingLoader
from .staging import StagedLoader, StagedTensor, StagingMode
from .types import LayerReloadingInfo
from .utils import get_layer_tensors

__all__ = ["OnlineLoad"]

logger = init_logger(__name__)


class OnlineLoad:
    """One layer that is processed when its last weight has been loaded.

    Nothing serves yet, so the layer's own tensors are filled: those on the meta device
    are given memory when they are first written. Loaders may be called as soon as the
    layer has weights, and a layer may register more of them later.

    Args:
        layer: the layer; only a weak reference is kept.
        info: what is known of it.
        on_load: told the layer and a loader's arguments before each load.

    """

    def __init__(
        self,
        layer: torch.nn.Module,
        info: LayerReloadingInfo,
        on_load: Callable[[torch.nn.Module, Iterable[object]], None],
    ):
        self._layer = ref(layer)
        self._info = info
        self._on_load = on_load
        self._device = torch.get_default_device()
        self._tensors: dict[str, StagedTensor] = {}

    @property
    def device_bytes(self) -> int:
        """Accelerator memory that the layer's weights hold before processing."""
        memories = [t.memory for t in self._tensors.values() if t.memory is not None]
        return sum(m.nbytes for m in memories if m.device.type != "cpu")

    def open(self) -> None:
        """Watch the layer's weight loaders."""
        self._info.staged = self
        self._watch_new_tensors()

    def finish(self, model_config: ModelConfig | None) -> None:
        """Process the layer with what was loaded; the rest of it is padding, zero."""
        layer = self._layer()
        if layer is None or self._info.staged is not self:
            return
        received = any(tensor.written for tensor in self._tensors.values())
        if received or not is_attention(layer):
            self._process()
        if is_attention(layer) and model_config is not None:
            process_attention(layer, model_config)
        self._info.reset()

    def _watch_new_tensors(self) -> None:
        layer = self._layer()
        assert layer is not None
        for name, tensor in get_layer_tensors(layer).items():
            loader = _below_recording(tensor)
            if name not in SKIP_LOAD_TENSORS and not isinstance(loader, StagedLoader):
                self._watch(name, tensor)

    def _watch(self, name: str, tensor: torch.Tensor) -> None:
        meta = tensor if tensor.is_meta else to_meta_tensor(tensor)
        kind = type(self._layer()).__name__
        first = FirstLoad()
        ledger = owed_by(name, meta, first, is_parameter=True, known=False)
        staged = StagedTensor(kind, name, meta, self._device, first, ledger)
        staged.memory = None if tensor.is_meta else tensor
        self._tensors[name] = staged
        loader = StagedLoader(original_loader(tensor), staged, self._run)
        recording = RecordingLoader.of(getattr(tensor, "weight_loader", None))
        if recording is not None:
            recording.original = loader
        else:
            set_loader(tensor, loader)

    def _run(self, loader: StagedLoader, args: tuple, kwargs: dict[str, Any]) -> Any:
        layer = self._layer()
        if layer is None or self._info.staged is not self:
            logger.warning_once("A weight came after its layer was processed: ignored.")
            return None
        self._watch_new_tensors()
        self._on_load(layer, (*args, *kwargs.values()))
        with StagingMode(self._tensors.values()):
            result = loader.load(args, kwargs)
        complete = all(t.ledger.complete for t in self._tensors.values())
        if complete and not is_attention(layer):
            self._process()
        return result

    def _process(self) -> None:
        layer = self._layer()
        assert layer is not None
        self._hand_over(layer)
        process_quantized(layer)
        self._info.reset()

    def _hand_over(self, layer: torch.nn.Module) -> None:
        """Give the layer what was loaded, and hold none of it."""
        for name, tensor in self._tensors.items():
            memory = tensor.materialize()
            for box in tensor.ledger.missing():
                memory.data[box.slices()] = 0
            if layer._parameters.get(name) is tensor.meta:
                memory = tensor.processable()
                setattr(layer, name, memory)
            _restore_loader(memory)
            # It and its loader hold each other until the garbage collector comes by.
            tensor.memory = None


def _below_recording(tensor: torch.Tensor) -> Callable | None:
    loader = getattr(tensor, "weight_loader", None)
    recording = RecordingLoader.of(loader)
    return loader if recording is None else recording.original


def _restore_loader(tensor: torch.Tensor) -> None:
    """Take the watching loader out, but leave one that records a first load."""
    loader = getattr(tensor, "weight_loader", None)
    recording = RecordingLoader.of(loader)
    if recording is not None:
        recording.original = original_loader(tensor)
    elif isinstance(loader, StagedLoader):
        set_loader(tensor, loader.original)
