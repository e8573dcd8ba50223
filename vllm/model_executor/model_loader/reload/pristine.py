# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer as it was before its weights were processed.

`process_weights_after_loading` may run once on a layer: it replaces parameters, builds
kernels and leaves flags that make a second run skip or fail. So a sync never processes
the layer that serves. It processes a shadow: a layer of the same class with the state
that the layer had when it was created, around the staged tensors.

Copied with the layer are the helpers that processing changes, which are the objects
that have a `process_weights_after_loading` of their own: quant methods, schemes,
kernels, attention implementations. Where these or the layer refer to a child of it, the
shadow refers to the child's shadow, if there is one. Everything else is shared with the
live layer.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import ref

import torch

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from .bitwise import same_bytes

__all__ = ["PristineLayer", "Shadow", "ShadowPart", "copy_if_small"]

# What most attributes are, and no helper is.
_PLAIN = frozenset({bool, int, str, type(None), OrderedDict})
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# Larger tensors, a KV cache or a rotary table, are not results of processing.
_MAX_COPIED_BYTES = 1 << 20


@dataclass(frozen=True)
class _Ref:
    """Stands for a tensor, a helper, a child or the layer itself in frozen state."""

    key: int


@dataclass(frozen=True)
class _State:
    """Attributes of an object when the layer was created.

    Attributes:
        shared: those that a shadow shares, most of them.
        frozen: those that it has its own copy of.

    """

    shared: dict[str, Any]
    frozen: dict[str, Any]


@dataclass
class _Helper:
    """A helper object and its state when the layer was created.

    The object is not kept alive: it reaches, through its kernel's scales and their
    loaders, the layer itself.
    """

    live: ref[Any]
    kind: type
    state: _State


class Marks:
    """Values as they were, to tell later which of them processing touched.

    Args:
        values: by name.
        shared: of these it matters only whether they are still the same objects.

    """

    def __init__(
        self, values: Mapping[str, Any], shared: Mapping[str, Any] | None = None
    ):
        self._shared = shared or {}
        self._marks = {name: _mark(value) for name, value in values.items()}

    def touched(self, values: Mapping[str, Any]) -> list[str]:
        """Names that are new, were assigned, or whose value was written in place."""
        shared = self._shared
        return [
            name
            for name, value in values.items()
            if shared.get(name, shared) is not value and self._is_touched(name, value)
        ]

    def _is_touched(self, name: str, value: Any) -> bool:
        if name not in self._marks:
            return True
        before, state = self._marks[name]
        return value is not before or not _same_state(state, _mark(value)[1])


@dataclass
class ShadowPart:
    """A live object, its shadow, and the shadow's attributes before processing."""

    live: Any
    shadow: Any
    before: Marks


@dataclass
class Shadow:
    """A layer to process in place of the one that serves."""

    layer: torch.nn.Module
    buffers: Marks
    parts: list[ShadowPart] = field(default_factory=list)


class PristineLayer:
    """State of a layer and of its helpers when it was created.

    Args:
        layer: the layer; no reference to it is kept.
        tensors: create-time tensors by name; where the state refers to one of them, a
            shadow will refer to the staged tensor of that name.

    """

    def __init__(self, layer: torch.nn.Module, tensors: dict[str, torch.Tensor]):
        self._layer_key = id(layer)
        self._tensor_names = {id(tensor): name for name, tensor in tensors.items()}
        self._child_names = {
            id(child): name
            for name, child in layer._modules.items()
            if child is not None and not _is_helper(child)
        }
        self._helpers: dict[int, _Helper] = {}
        own = {k: v for k, v in layer.__dict__.items() if k not in _REGISTRIES}
        self._state = self._freeze_all(own)
        children = layer._modules.items()
        self._modules = {n: self._freeze(m) for n, m in children if _is_helper(m)}

    def _freeze_all(self, attributes: Mapping[str, Any]) -> _State:
        state = _State({}, {})
        for name, value in attributes.items():
            frozen = self._freeze(value)
            is_shared = frozen is value and not isinstance(value, torch.Tensor)
            (state.shared if is_shared else state.frozen)[name] = frozen
        return state

    def _freeze(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        key = id(value)
        if key == self._layer_key:
            return _Ref(key)
        if key in self._tensor_names or key in self._child_names:
            return _Ref(key)
        if isinstance(value, MethodType) and id(value.__self__) == self._layer_key:
            return MethodType(value.__func__, _Ref(self._layer_key))
        if type(value) in (dict, list, tuple, set):
            return _map(value, self._freeze)
        if not _is_helper(value):
            return value
        if key not in self._helpers:
            state = _State({}, {})
            helper = self._helpers[key] = _Helper(ref(value), type(value), state)
            helper.state = self._freeze_all(vars(value))
        return _Ref(key)

    def shadow(
        self,
        live: torch.nn.Module,
        params: Mapping[str, torch.Tensor | None],
        buffers: Mapping[str, torch.Tensor | None],
        children: dict[str, torch.nn.Module],
    ) -> Shadow:
        """A shadow of `live` around these tensors and children."""
        shadow = Shadow(object.__new__(type(live)), Marks(buffers))
        known: dict[int, Any] = {self._layer_key: shadow.layer}
        for key, name in self._tensor_names.items():
            known[key] = params.get(name, buffers.get(name))
        for key, name in self._child_names.items():
            known[key] = children.get(name, live._modules.get(name))
        thaw = _Thaw(self._helpers, known, shadow.parts)
        own = {name: thaw(value) for name, value in self._state.frozen.items()}
        helpers = {name: thaw(value) for name, value in self._modules.items()}
        own |= dict(
            _parameters=dict(params),
            _buffers=dict(buffers),
            _modules={**live._modules, **children, **helpers},
        )
        shadow.layer.__dict__.update(self._state.shared | own)
        before = Marks(own, self._state.shared)
        shadow.parts.append(ShadowPart(live, shadow.layer, before))
        return shadow


class _Thaw:
    """Turns frozen state to that of a shadow.

    No closures: two that call each other keep what they hold, a layer's memory, until
    the garbage collector comes by.

    Args:
        helpers: helper objects by key.
        known: what stands for a key in the shadow.
        parts: where copies of helpers are noted.

    """

    def __init__(
        self,
        helpers: Mapping[int, _Helper],
        known: dict[int, Any],
        parts: list[ShadowPart],
    ):
        self._helpers = helpers
        self._known = known
        self._parts = parts

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _Ref):
            is_helper = value.key in self._helpers
            return self._revive(value.key) if is_helper else self._known[value.key]
        if isinstance(value, MethodType) and isinstance(value.__self__, _Ref):
            return MethodType(value.__func__, self._known[value.__self__.key])
        if type(value) in (dict, list, tuple, set):
            return _map(value, self)
        return copy_if_small(value)

    def _revive(self, key: int) -> Any:
        if key not in self._known:
            helper = self._helpers[key]
            copy: Any = object.__new__(helper.kind)
            self._known[key] = copy
            shared = helper.state.shared
            own = {name: self(value) for name, value in helper.state.frozen.items()}
            vars(copy).update(shared | own)
            serving = helper.live()
            if serving is not None:
                self._parts.append(ShadowPart(serving, copy, Marks(own, shared)))
        return self._known[key]


def _is_helper(value: Any) -> bool:
    if not callable(getattr(value, "process_weights_after_loading", None)):
        return False
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    is_layer = isinstance(value, torch.nn.Module)
    return not is_layer or isinstance(value, QuantizeMethodBase)


def copy_if_small(value: Any) -> Any:
    """A copy for processing to write to, unless it is no tensor, or a large table."""
    small = isinstance(value, torch.Tensor) and value.nbytes <= _MAX_COPIED_BYTES
    return value.clone() if small and not value.is_meta else value


def _mark(value: Any) -> tuple[Any, Any]:
    """A value, and what tells whether it was written in place."""
    if type(value) in _PLAIN:
        return value, None
    if isinstance(value, torch.Tensor):
        return value, (value._version, copy_if_small(value))
    if type(value) is dict:
        return value, [_mark(item) for pair in value.items() for item in pair]
    if type(value) in (list, tuple, set):
        return value, [_mark(item) for item in value]
    return value, None


def _same_state(before: Any, after: Any) -> bool:
    if isinstance(before, list):
        same_length = len(before) == len(after)
        return same_length and all(
            a[0] is b[0] and _same_state(a[1], b[1]) for a, b in zip(before, after)
        )
    if isinstance(before, tuple):
        return before[0] == after[0] and (
            before[1] is after[1] or same_bytes(before[1], after[1])
        )
    return True


def _map(container: Any, function: Callable[[Any], Any]) -> Any:
    if type(container) is dict:
        return {key: function(value) for key, value in container.items()}
    return type(container)(function(value) for value in container)
