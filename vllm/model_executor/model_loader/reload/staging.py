# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a sync's tensors wait until their layer is complete.

While weights are loaded, a layer shows meta tensors in checkpoint format in place of
the tensors that serve. `StagingMode` watches every operator: one that touches such a
tensor is given memory of the same shape instead, allocated on first touch, and what it
writes is noted in the tensor's ledger. Loaders therefore run unchanged, models that
write past their loaders are staged all the same, and nothing is kept of a caller's
tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import meta as meta_tensors
from .calls import LoaderCall, TensorSpec
from .checks import check_castable
from .errors import Finding, WeightSyncError
from .fingerprint import Fingerprint, fingerprints
from .huge_pages import prefer_huge_pages
from .ledger import Box, Ledger, boxes_of_view
from .placement import ExpertPlacement
from .recording import FirstLoad, fills_nothing, wrote
from .regions import describe, shard_box
from .routing import RouteRecorder, tensors_in
from .types import LayerReloadingInfo

__all__ = ["StagedLayer", "StagedLoader", "StagedTensor", "StagingMode", "close"]


@dataclass(eq=False)
class StagedTensor:
    """One tensor of a layer in checkpoint format, and what a sync owes of it.

    Attributes:
        layer: qualified name of the layer it belongs to.
        name: its name there.
        meta: the tensor that loaders are shown.
        device: where its memory is allocated.
        first_load: how the first load called its loader.
        ledger: what is still to be written.
        initial: value it has before anything is loaded, if that matters.
        tied: whether it is a parameter of several layers.
        optional: whether it may come although it is not owed.
        memory: its memory, once touched.
        since: when it got its memory, as `time.perf_counter` has it.
        until: when it lost it.
        closed: whether its layer was committed.
        sealed: what had been staged when it was closed.
        planned: whether this sync brought any of it past the model.
        used: whether more than views were made of it, or its loader made one.

    """

    layer: str
    name: str
    meta: torch.Tensor
    device: torch.device
    first_load: FirstLoad
    ledger: Ledger
    initial: torch.Tensor | None = None
    tied: bool = False
    optional: bool = False
    memory: torch.Tensor | None = None
    since: float | None = None
    until: float | None = None
    closed: bool = False
    sealed: Fingerprint | None = None
    planned: bool = False
    used: bool = False

    def materialize(self, uninitialized: bool = False) -> torch.Tensor:
        """Its memory; allocated, and set to the create-time value, on first use.

        Args:
            uninitialized: whether any value does, as all of it is about to be written.

        """
        if self.memory is None:
            self.since, self.until = perf_counter(), None
            self.memory = memory = self._allocate()
            prefer_huge_pages(memory)
            if uninitialized:
                return memory
            if self.initial is not None:
                memory.copy_(self.initial, non_blocking=True)
            elif not self.ledger.covers(self.meta):
                memory.zero_()
        return self.memory

    def _allocate(self) -> torch.Tensor:
        try:
            return meta_tensors.memory_of(self.meta, self.device)
        except RuntimeError as error:  # which is what torch's allocators raise
            reason, _, _ = str(error).partition("\n")
            raise MemoryError(f"no memory to stage {self.path}: {reason}") from error

    def processable(self) -> torch.Tensor:
        """A tensor on the memory that processing may write to or give other memory."""
        memory = self.materialize()
        data = memory.data.clone() if self.tied else memory.data
        return meta_tensors.like(data, self.meta)

    @cached_property
    def calls(self) -> FirstLoad:
        """How this sync called the loader."""
        return FirstLoad()

    @property
    def key(self) -> tuple[str, str]:
        """Names of its layer and of itself."""
        return self.layer, self.name

    @property
    def path(self) -> str:
        """Its qualified name."""
        return f"{self.layer}.{self.name}".removeprefix(".")

    @property
    def written(self) -> bool:
        """Whether this sync wrote any of it."""
        return self.ledger.touched

    def learn(self) -> None:
        """Take what this sync wrote, or left out, for what the next one owes."""
        if self.written:
            self.first_load.take_over(self.calls)
            boxes = sorted(set(self.ledger.written), key=lambda box: box.start)
            self.first_load.owed = Ledger(boxes)
        elif not self.ledger.complete:
            self.first_load.owed = self.ledger.fresh()

    def check_repeated(self, view: torch.Tensor, source: object) -> None:
        """Refuse a write after closing, unless it repeats what was staged."""
        if self.sealed is None:
            raise self.refuse("came after its layer was committed")
        self.sealed.check(self, view, source)

    @property
    def awaited(self) -> bool:
        """Whether it may still come, although nothing is missing.

        Some tensors are not owed. Others are written more than once by a load, such as
        the input scale that gate and up share, and the last one counts.
        """
        if self.ledger.overlapping:
            return len(self.calls.calls) < len(self.first_load.calls)
        return self.optional and not self.written and self.ledger.empty

    def missing(self) -> list[Finding]:
        return [
            describe(self.layer, self.name, self.meta, box, "never sent")
            for box in self.ledger.missing()
        ]

    def refuse(self, detail: str, box: Box | None = None) -> WeightSyncError:
        """The error for a tensor that must not be staged here."""
        finding = describe(self.layer, self.name, self.meta, box, detail)
        return WeightSyncError("weight sync refused a tensor", invalid=[finding])


def close(
    tensors: Iterable[StagedTensor], serving: Mapping[int, torch.Tensor] | None = None
) -> None:
    """Take no more writes; what comes again must equal what was staged.

    Args:
        tensors: of one device.
        serving: by the identity of a tensor's memory, what will hold its values until
            the end of the sync, if anything does.

    """
    tensors = [tensor for tensor in tensors if not tensor.closed]
    unkept: list[StagedTensor] = []
    for tensor in (t for t in tensors if t.written):
        live = (serving or {}).get(id(tensor.memory))
        if live is not None and live.stride() == tensor.meta.stride():
            tensor.sealed = Fingerprint.kept_in(live)
        else:
            unkept.append(tensor)
    sealed = fingerprints([(t.materialize(), t.ledger) for t in unkept])
    for tensor, seal in zip(unkept, sealed):
        tensor.sealed = seal
    for tensor in tensors:
        tensor.closed = True


class StagedLoader:
    """The weight loader that a staged tensor shows: the original, under staging.

    Args:
        original: the loader that the tensor was created with.
        tensor: the staged tensor.
        run: what is called in its place; calls `load`.
        placement: where experts are, if they have moved since then.

    """

    def __init__(
        self,
        original: Callable,
        tensor: StagedTensor,
        run: Callable[..., Any],
        placement: ExpertPlacement | None = None,
    ):
        # Who wraps this loader copies its attributes, and asks for none of them.
        vars(self).update(getattr(original, "__dict__", {}))
        self.original = original
        self.tensor = tensor
        self._run = run
        self._placement = placement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original, such as its name, for those who ask."""
        if name == "original":  # asked by `copy`, of an object without attributes
            raise AttributeError(name)
        return getattr(self.original, name)

    @property
    def __wrapped__(self) -> Callable:
        """By which `inspect.signature` finds the arguments."""
        return self.original

    def load(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the original loader after a look at what it is given.

        Raises:
            WeightSyncError: the first load was given another shape by this call, or a
                type that cannot stand for what came.

        """
        call, weight = LoaderCall.split(args, kwargs)
        first = self.tensor.first_load
        if weight is None:
            return self.original(*args, **kwargs)
        self._check(call, first.expected(call), weight)
        self.tensor.calls.note(call, weight)
        if self._placement is not None:
            return self._placement.load(self.original, args, kwargs)
        result = self.original(*args, **kwargs)
        # A view is enough to write to it without any operator, as NumPy does.
        self.tensor.used |= self.tensor.memory is not None
        if not (first.calls or first.ambiguous):
            self._check_filled(call, weight)
        return result

    def _shard_box(self, call: LoaderCall) -> Box | None:
        """The expert's shard that a call is about, where it says so."""
        named, meta = call.named, self.tensor.meta
        expert, shard_id = named.get("expert_id"), named.get("shard_id")
        if not isinstance(expert, int) or not isinstance(shard_id, str):
            return None
        is_local = meta.dim() > 0 and expert < meta.shape[0]
        return shard_box(meta, expert, shard_id) if is_local else None

    def __eq__(self, other: object) -> bool:
        """Equal to the original, by which models tell the default loader."""
        return other is self or other == self.original

    def __hash__(self) -> int:
        return hash(self.original)

    def _check(
        self, call: LoaderCall, expected: TensorSpec | None, weight: torch.Tensor
    ) -> None:
        if expected is None:
            return
        scalars = weight.numel() == 1 == prod(expected.shape)
        if tuple(weight.shape) != expected.shape and not scalars:
            came = TensorSpec.of(weight)
            raise self.tensor.refuse(
                f"expected {expected}, as first loaded, got {came}; send the tensor "
                "in the checkpoint's layout",
                self._shard_box(call),
            )

    def _check_filled(self, call: LoaderCall, weight: torch.Tensor) -> None:
        """Check a shape that no first load tells: loaders copy the part that fits.

        A call for gate or up fills half of its expert, in whichever dimension, or all
        of it where nothing is fused.
        """
        shard = self._shard_box(call)
        if shard is None:
            return
        expert = Box.whole(self.tensor.meta.shape).at(shard.start[0])
        left = self.tensor.ledger.missing_within(expert)
        halves = (0, expert.numel // 2) if shard != expert else (0,)
        if left not in halves:
            raise self.tensor.refuse(
                f"got {TensorSpec.of(weight)}, which does not fill it; send the tensor "
                "in the checkpoint's layout",
                shard,
            )


@dataclass(eq=False)
class StagedLayer:
    """The staged tensors of one module.

    Attributes:
        name: its qualified name.
        layer: the module.
        info: what is known of it.
        params: staged parameters by name.
        buffers: staged buffers by name; buffers that alias parameters are not staged.
        owner_of: the staged tensors that no earlier layer shares.

    """

    name: str
    layer: torch.nn.Module
    info: LayerReloadingInfo
    params: dict[str, StagedTensor]
    buffers: dict[str, StagedTensor]
    owner_of: list[StagedTensor]
    committed: bool = False
    _hidden: dict[str, Any] | None = None

    @property
    def tensors(self) -> Iterator[StagedTensor]:
        return chain(self.params.values(), self.buffers.values())

    @property
    def received(self) -> bool:
        """Whether this sync brought anything that belongs to the layer.

        What was used and not seen to be written may have been written all the same, by
        an operator of which nobody knows how much it writes; or others were made of it,
        which is worse.
        """
        return any(t.written or t.used for t in self.owner_of)

    @property
    def changed(self) -> bool:
        """Whether this sync wrote any of its tensors, tied ones included."""
        return any(tensor.written for tensor in self.tensors)

    @property
    def shares_changed_matrix(self) -> bool:
        """Whether this sync wrote a matrix that it shares with an earlier layer.

        It may serve what it has packed of that one. A vector it reads as it is, such as
        experts the correction bias of their router.
        """
        return any(t.tied and t.written and t.meta.dim() > 1 for t in self.tensors)

    @property
    def complete(self) -> bool:
        return all(tensor.ledger.complete for tensor in self.tensors)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of memory to stage all of it in."""
        return sum([tensor.meta.nbytes for tensor in self.tensors])

    @property
    def device_bytes(self) -> int:
        memories = [t.memory for t in self.tensors if t.memory is not None]
        return sum(m.nbytes for m in memories if m.device.type != "cpu")

    def missing(self) -> list[Finding]:
        return [finding for t in self.tensors for finding in t.missing()]

    @property
    def ready(self) -> bool:
        """Whether the layer can be committed before the sync is finished."""
        changed = False
        for tensor in self.tensors:
            if tensor.awaited or not tensor.ledger.complete:
                return False
            changed |= tensor.written
        return changed

    def show(self) -> None:
        """Show the staged tensors to loaders, in place of those that serve."""
        if self._hidden is not None:
            return
        state = vars(self.layer)
        params = {name: tensor.meta for name, tensor in self.params.items()}
        staged = {name: tensor.meta for name, tensor in self.buffers.items()}
        buffers = state["_buffers"]
        self._hidden = {"_parameters": state["_parameters"], "_buffers": buffers}
        # Plain attributes that processing put where a tensor was created hide it.
        for name in state.keys() & (params.keys() | staged.keys()):
            self._hidden[name] = state.pop(name)
        live = {n: b for n, b in buffers.items() if n not in params} if buffers else {}
        state["_parameters"], state["_buffers"] = params, live | staged

    @property
    def is_shown(self) -> bool:
        return self._hidden is not None

    def hide(self) -> None:
        """Undo `show`."""
        if self._hidden is not None:
            self.layer.__dict__.update(self._hidden)
            self._hidden = None


class StagingMode(TorchDispatchMode):
    """Redirects operators on staged tensors to their memory, and notes the writes.

    Attributes:
        touches: how many staged tensors operators were given, again and again.

    """

    def __init__(
        self, tensors: Iterable[StagedTensor], recorder: RouteRecorder | None = None
    ):
        super().__init__()
        self._recorder = recorder
        tensors = list(tensors)
        self._by_meta = {t.meta.untyped_storage()._cdata: t for t in tensors}
        self._by_memory: dict[int, StagedTensor] = {}
        for tensor in tensors:
            if tensor.memory is not None:
                self._by_memory[tensor.memory.untyped_storage()._cdata] = tensor
        self.touches = 0
        self._touched: set[StagedTensor] = set()
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let operators through, for work that is not loading."""
        was_paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = was_paused

    def touch(self, tensor: StagedTensor) -> None:
        """Note that a staged tensor was written."""
        self._touched.add(tensor)

    def take_touched(self) -> set[StagedTensor]:
        """The tensors written since this was last asked."""
        touched, self._touched = self._touched, set()
        return touched

    def forget(self, tensor: StagedTensor) -> None:
        """Drop the memory of a tensor."""
        if tensor.memory is not None:
            if self._by_memory:
                self._by_memory.pop(tensor.memory.untyped_storage()._cdata, None)
            tensor.memory, tensor.until = None, perf_counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        args = tuple(self._redirect(value) for value in args)
        if kwargs:
            kwargs = {name: self._redirect(value) for name, value in kwargs.items()}
        if wrote(func, args) and (tensor := self._staged_of(args[0])) is not None:
            return self._write(tensor, func, args, kwargs)
        result = func(*args, **kwargs)
        if getattr(func, "is_view", False) or fills_nothing(func, args):
            return result
        values = (*args, *kwargs.values())
        self._note_use(values)
        if self._recorder is not None:
            self._recorder.seen(values, result, self._by_memory)
        return result

    def _redirect(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._memory_of(value) if value.is_meta else value
        if isinstance(value, list):
            return [self._redirect(item) for item in value]
        if isinstance(value, torch.device) and value.type == "meta":
            # A loader that moves its weight to the parameter's device.
            return next(iter(self._by_meta.values())).device
        return value

    def _memory_of(self, view: torch.Tensor) -> torch.Tensor:
        tensor = self._by_meta.get(view.untyped_storage()._cdata)
        self.touches += tensor is not None
        if tensor is None or tensor.closed:
            return view
        memory = tensor.materialize()
        self._by_memory[memory.untyped_storage()._cdata] = tensor
        offset = view.storage_offset() - tensor.meta.storage_offset()
        return memory.data.as_strided(view.shape, view.stride(), offset)

    def _note_use(self, values: Any) -> None:
        for value in tensors_in(values):
            if (tensor := self._staged_of(value)) is not None:
                tensor.used = True

    def _staged_of(self, view: torch.Tensor) -> StagedTensor | None:
        storage = view.untyped_storage()._cdata
        return (self._by_meta if view.is_meta else self._by_memory).get(storage)

    def _write(
        self,
        tensor: StagedTensor,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        view, source = args[:2]
        self._note_use(source)
        if isinstance(source, torch.Tensor):
            check_castable(tensor, source)
        if tensor.closed:
            if self._recorder is not None:
                self._recorder.refuse()
            tensor.check_repeated(view, source)
            return view
        if tensor.planned and self._recorder is not None and self._recorder.is_idle:
            raise tensor.refuse(
                "the model, which was not given it, makes it of others; "
                "set VLLM_RELOAD_PLAN=0"
            )
        result = func(*args, **kwargs)
        boxes = tuple(boxes_of_view(view, tensor.meta))
        if self._recorder is not None:
            self._recorder.copied(tensor, view, source, boxes, self._by_memory)
        tensor.ledger.write(*boxes)
        self.touch(tensor)
        return result
