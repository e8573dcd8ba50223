# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the first load wrote, which is what every later sync owes.

A checkpoint seldom fills a parameter by name alone: loaders shard, pad, and skip the
experts of other ranks. So the first load notes how each loader was called and with
which of the checkpoint's tensors, which costs a microsecond, and what was copied where
is derived from those calls when a sync first asks for it, by calling the loaders again
on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import CallNotes, LoaderCall, Sent, TensorSpec, WatchedWeights
from .ledger import Box, Ledger, boxes_of_view
from .view import View

__all__ = ["FirstLoad", "RecordingLoader", "Write", "fills_nothing", "wrote"]

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor)
_PREPARES = (*_FILLS, torch.ops.aten.zero_.default)


@dataclass(frozen=True, slots=True)
class Write:
    """What one copy into a parameter was.

    Attributes:
        source: part of the checkpoint's tensor.
        target: part of the parameter.
        boxes: the same as boxes.

    """

    source: View
    target: View
    boxes: tuple[Box, ...]


@dataclass
class FirstLoad:
    """How the loader of one parameter was called by the first load.

    Attributes:
        bypassed: whether the parameter was written past its loader.
        owed: the regions it wrote, once derived or learnt from a complete sync.
        sources: each tensor that was loaded, by which call and which view of it; no
            view if it was changed on the way.
        writes: what each call copies, where that is all that it does; see `boxes`.
        notes: calls that nobody has asked for yet.

    """

    bypassed: bool = False
    owed: Ledger | None = None
    sources: list[tuple[Sent | None, LoaderCall, View | None]] = field(
        default_factory=list
    )
    writes: dict[LoaderCall, list[Write]] = field(default_factory=dict)
    notes: CallNotes = field(default_factory=CallNotes)
    _calls: dict[LoaderCall, TensorSpec] = field(default_factory=dict)
    _ambiguous: bool = False

    @property
    def calls(self) -> dict[LoaderCall, TensorSpec]:
        """What each distinct call was given to load."""
        self._look_at_notes()
        return self._calls

    @property
    def ambiguous(self) -> bool:
        """Whether calls that look alike were given different shapes."""
        self._look_at_notes()
        return self._ambiguous

    def _look_at_notes(self) -> None:
        if not self.notes:
            return
        notes, self.notes = self.notes, CallNotes()
        for call, spec, sent, view in notes:
            self._note(call, spec)
            self.sources.append((sent, call, view))

    @property
    def called(self) -> bool:
        """Whether the loader was called."""
        return bool(self.notes or self._calls)

    @property
    def seen(self) -> bool:
        """Whether anything was loaded."""
        return self.called or self.ambiguous or self.bypassed

    def note(self, call: LoaderCall, weight: torch.Tensor) -> None:
        """Note a call and what it was given."""
        self._note(call, TensorSpec.of(weight))

    def _note(self, call: LoaderCall, spec: TensorSpec) -> None:
        try:
            self._ambiguous |= self._calls.setdefault(call, spec) != spec
        except TypeError:  # an argument that cannot be told from others by its hash
            self._ambiguous = True

    def take_over(self, later: "FirstLoad") -> None:
        """Add the calls of a later load."""
        self._calls.update(later.calls)
        self._ambiguous |= later.ambiguous

    def expected(self, call: LoaderCall) -> TensorSpec | None:
        """What this call was given by the first load, if it was made then."""
        return None if self.ambiguous else self.calls.get(call)

    def write_like(self, other: "FirstLoad") -> None:
        """Take what calls that are alike, and in the same order, wrote elsewhere."""
        self.owed = other.owed
        pairs = zip(self.calls, other.calls)
        writes = other.writes
        self.writes = {call: writes[like] for call, like in pairs if like in writes}

    def forget_routes(self) -> None:
        """Drop what is of no use once the first sync has its routes."""
        self.sources, self.writes = [], {}

    def boxes(self, loader: Callable, param: torch.Tensor) -> list[Box] | None:
        """Regions of `param` (on meta) that the calls write, or None if unknown.

        Unknown are loaders that look at values, which a meta tensor does not have, and
        those that write by other operators than copies. Sets `writes` on the way.
        """
        if self.ambiguous:
            return None
        origins = {call: (s, v) for s, call, v in self.sources if s and v}
        recorder = _MetaWrites(param)
        writes = {}
        try:
            # A default device, say, is a mode of its own, and costs more than the rest.
            with torch._C.DisableTorchFunction(), recorder:
                for call, spec in self.calls.items():
                    sent, view = origins.get(call, (None, None))
                    spec = sent.spec if sent else spec
                    owner = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                    recorder.begin(owner)
                    weight = view.on(owner) if view else owner
                    call.replay(loader, param, weight)
                    if view and recorder.writes is not None:
                        writes[call] = recorder.writes
        except Exception:
            return None
        if recorder.changed_otherwise and not recorder.boxes:
            return None  # nor is it known that a loader does nothing
        self.writes = writes
        return recorder.boxes


class RecordingLoader:
    """Notes the calls of a weight loader on the way to it.

        param.weight_loader = RecordingLoader(...).loader()

    Attributes:
        original: the loader that is called.
        weights: tell what is being loaded.

    """

    def __init__(
        self,
        original: Callable,
        first_load: FirstLoad,
        version: int,
        weights: WatchedWeights | None = None,
    ):
        self.original = original
        self.weights = weights or WatchedWeights()
        self._first_load = first_load
        self._version = version

    @staticmethod
    def of(loader: Any) -> "RecordingLoader | None":
        """What notes the calls of this loader, if anything does."""
        if isinstance(loader, partial) and loader.func is RecordingLoader._load:
            return loader.args[0]
        return None

    def loader(self) -> Callable:
        """A loader that looks like the original.

        An object with a `__call__` would do, but takes twice as long to be called.
        """
        return update_wrapper(partial(RecordingLoader._load, self), self.original)

    def _load(self, /, *args: Any, **kwargs: Any) -> Any:
        self._first_load.notes.add(args, kwargs, self.weights)
        return self.original(*args, **kwargs)

    def close(self, version: int) -> None:
        """Note a parameter of another version that no call accounts for."""
        first_load = self._first_load
        first_load.bypassed = version != self._version and not first_load.seen


def wrote(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator call fills its first argument with loaded values.

    Filling many elements with one value is preparation, not loading; one element is
    how some loaders store a scalar.
    """
    if func is torch.ops.aten.copy_.default:
        return True
    return func in _FILLS and args[0].numel() == 1


def fills_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator call fills an empty tensor, such as padding that is none."""
    return func in _FILLS and not args[0].numel()


class _MetaWrites(TorchDispatchMode):
    """Collects what loaders copy to a meta tensor under this mode.

    Attributes:
        boxes: regions that were written.
        writes: what was copied there since `begin`; None if more was done than copied.

    """

    def __init__(self, param: torch.Tensor):
        super().__init__()
        self.boxes: list[Box] = []
        self.writes: list[Write] | None = []
        self._param = param
        self._storage = param.untyped_storage()._cdata
        self._owner = param
        self._is_changed = False

    @property
    def changed_otherwise(self) -> bool:
        """Whether something else changed it, such as `index_put_` or another memory."""
        return self._is_changed or self._storage != self._param.untyped_storage()._cdata

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode; to be sure of that takes longer."""
        return False

    def begin(self, owner: torch.Tensor) -> None:
        """A loader is about to be given a view of a tensor."""
        self.writes = []
        self._owner = owner

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.is_view:
            return func(*args, **kwargs) if kwargs else func(*args)
        if wrote(func, args) and args[0].untyped_storage()._cdata == self._storage:
            self._note(args[0], args[1])
            return args[0]
        if self._concerns(args) and not fills_nothing(func, args):
            self.writes = None
            self._is_changed |= func._schema.is_mutable and func not in _PREPARES
        return func(*args, **(kwargs or {}))

    def _note(self, view: torch.Tensor, source: Any) -> None:
        boxes = tuple(boxes_of_view(view, self._param))
        self.boxes += boxes
        if not self._is_sent(source) or source.dtype != self._owner.dtype:
            self.writes = None
        elif self.writes is not None:
            part = View.of(source.expand(view.shape), self._owner)
            self.writes.append(Write(part, View.of(view, self._param), boxes))

    def _is_sent(self, value: Any) -> bool:
        storage = self._owner.untyped_storage()._cdata
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and value.untyped_storage()._cdata == storage

    def _concerns(self, args: tuple[Any, ...]) -> bool:
        """Whether an operator is given the parameter or what is loaded into it."""
        storages = {self._storage, self._owner.untyped_storage()._cdata}
        flat = (v for arg in args for v in (arg if isinstance(arg, list) else [arg]))
        tensors = (value for value in flat if isinstance(value, torch.Tensor))
        return any(tensor.untyped_storage()._cdata in storages for tensor in tensors)
