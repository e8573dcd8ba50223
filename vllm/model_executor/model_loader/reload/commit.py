# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Moving the results of processing into the storage that serves.

CUDA graphs, kernels and closures hold addresses, so no tensor that serves is replaced:
the live layer and its processed shadow are walked in pairs, and values are copied from
one to the other. A `Commit` is prepared first, which changes nothing and refuses by
name what cannot be paired; applying it cannot fail halfway for such a reason.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType, MethodType
from typing import Any

import torch

from .copying import copy_together, copy_values
from .errors import Finding, WeightSyncError
from .objects import PLAIN, fields
from .pristine import Shadow, ShadowPart

__all__ = [
    "Assignment",
    "Commit",
    "Place",
    "apply_commits",
    "pair_tensors",
    "place_of",
    "prepare_commit",
]

Place = tuple[int, torch.Size, tuple[int, ...]]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def place_of(tensor: torch.Tensor) -> Place:
    """What two tensors share if they are one; a view of a part is another tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@dataclass(frozen=True)
class Assignment:
    """A value that a commit exchanges, adds or removes.

    Attributes:
        apply: does so.
        revert: undoes it; without effect before.

    """

    apply: Callable[[], Any]
    revert: Callable[[], Any]


@dataclass
class Commit:
    """Copies and assignments that put a processed layer into service.

    Attributes:
        layer: its qualified name.
        copies: tensors that serve, and those whose values they take.
        assignments: what else changes, after the copies.
        as_staged: whether all it copies is staged memory, so that no copy reads what
            another has written.

    """

    layer: str
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    as_staged: bool = False

    @cached_property
    def targets(self) -> list[Place]:
        """Where its copies go, once all of them are known."""
        return [place_of(live) for live, _ in self.copies]


@torch.no_grad()
def apply_commits(commits: Sequence[Commit]) -> None:
    """Put processed layers into service."""
    copy_together(pair for c in commits if c.as_staged for pair in c.copies)
    for commit in commits:
        if not commit.as_staged:
            for live, new in commit.copies:
                copy_values(live.data, new.data)
        for assignment in commit.assignments:
            assignment.apply()


def prepare_commit(layer: str, shadow: Shadow, keep: set[str]) -> Commit:
    """Pair a processed shadow with the layer that serves.

    Args:
        layer: qualified name of the layer.
        shadow: the processed shadow.
        keep: names of buffers that processing did not change and the sync did not
            write; they keep the values that serve.

    Raises:
        WeightSyncError: something the processing made has no counterpart to copy to.

    """
    pairing = _Pairing(Commit(layer))
    for part in shadow.parts:
        pairing.same[id(part.live), id(part.shadow)] = part.live
    for part in shadow.parts:
        pairing.pair_part(part, keep if part.shadow is shadow.layer else set())
    return pairing.commit


def pair_tensors(
    layer: str, live: torch.nn.Module, new: Mapping[str, torch.Tensor]
) -> Commit:
    """Pair tensors that were not processed with those that serve, by name.

    Args:
        layer: qualified name of the layer.
        live: the layer that serves.
        new: parameters and buffers for it.

    Raises:
        WeightSyncError: one of them has no counterpart to copy to.

    """
    pairing = _Pairing(Commit(layer))
    pairing.pair_tensors(live, new, set())
    return pairing.commit


@dataclass(frozen=True)
class _Slot:
    """Where an object holds a value: an attribute, or an entry of a dictionary.

    Attributes:
        fill: puts a value there.
        empty: takes away what is there, if anything is.

    """

    fill: Callable[[Any], Any]
    empty: Callable[[], Any]


class _Pairing:
    def __init__(self, commit: Commit):
        self.commit = commit
        self.same: dict[tuple[int, int], Any] = {}

    def pair_part(self, part: ShadowPart, keep: set[str]) -> None:
        """Pair the registered tensors, and the attributes that processing changed."""
        live, new = vars(part.live), vars(part.shadow)
        if isinstance(part.live, torch.nn.Module):
            self.pair_tensors(part.live, new["_parameters"], set())
            self.pair_tensors(part.live, new["_buffers"], keep)
        for name in part.before.touched(new):
            if name not in _REGISTRIES:
                slot = _attribute(part.live, name)
                self._pair_item(live, name, new[name], slot, name)

    def pair_tensors(
        self, live: torch.nn.Module, new: Mapping[str, Any], keep: set[str]
    ) -> None:
        for name, tensor in new.items():
            if name in keep or tensor is None:
                continue
            serving = getattr(live, name, None)
            if not isinstance(serving, torch.Tensor):
                raise self._refuse(name, "processing made a tensor that does not serve")
            if serving is not tensor:
                self._copy(serving, tensor, name)

    def pair(self, live: Any, new: Any, path: str) -> Any:
        """What the owner of `live` should hold once `new` serves; plans the copies."""
        if live is new:
            return live
        key = (id(live), id(new))
        if key in self.same:
            return self.same[key]
        if isinstance(new, torch.Tensor) and isinstance(live, torch.Tensor):
            self._copy(live, new, path)
            return live
        if isinstance(new, PLAIN) or _owns_resource(new):
            return new
        if type(live) is not type(new):
            if live is None or _is_function(new):
                return new
            kinds = (
                f"{type(live).__name__} serves, processing made {type(new).__name__}"
            )
            raise self._refuse(path, kinds)
        self.same[key] = live
        return self._pair_containers(live, new, path)

    def _pair_containers(self, live: Any, new: Any, path: str) -> Any:
        if isinstance(new, dict):
            for name, value in new.items():
                slot = _entry(live, name)
                self._pair_item(live, name, value, slot, f"{path}[{name!r}]")
            for name in live.keys() - new.keys():
                slot = _entry(live, name)
                self._assign(slot.empty, partial(slot.fill, live[name]))
            return live
        if isinstance(new, list | tuple | set | frozenset):
            return self._pair_sequence(live, new, path)
        if isinstance(new, MethodType):
            owner = self.pair(live.__self__, new.__self__, f"{path}.__self__")
            return MethodType(new.__func__, owner)
        if isinstance(new, partial):
            return self._pair_partial(live, new, path)
        if isinstance(new, FunctionType):
            return self._pair_function(live, new, path)
        return self._pair_object(live, new, path)

    def _pair_sequence(self, live: Any, new: Any, path: str) -> Any:
        if isinstance(new, set | frozenset) or len(live) != len(new):
            if _holds_tensors(new):
                raise self._refuse(path, f"{len(live)} entries serve, now {len(new)}")
            return new
        pairs = enumerate(zip(live, new))
        paired = [self.pair(a, b, f"{path}[{i}]") for i, (a, b) in pairs]
        if all(a is b for a, b in zip(live, paired)):
            return live
        make = getattr(type(new), "_make", type(new))  # a named tuple's constructor
        return make(paired)

    def _pair_partial(self, live: partial, new: partial, path: str) -> partial:
        if (
            len(live.args) != len(new.args)
            or live.keywords.keys() != new.keywords.keys()
        ):
            raise self._refuse(path, "other arguments serve")
        func = self.pair(live.func, new.func, f"{path}.func")
        args = [self.pair(a, b, f"{path}()") for a, b in zip(live.args, new.args)]
        held = live.keywords
        keywords = {k: self.pair(held[k], v, path) for k, v in new.keywords.items()}
        return partial(func, *args, **keywords)

    def _pair_function(self, live: FunctionType, new: FunctionType, path: str) -> Any:
        if live.__code__ is not new.__code__:
            return new
        cells = zip(live.__closure__ or (), new.__closure__ or ())
        for name, (old, cell) in zip(live.__code__.co_freevars, cells):
            held = {name: old.cell_contents}
            slot = _attribute(old, "cell_contents")
            self._pair_item(held, name, cell.cell_contents, slot, f"{path}.{name}")
        defaults = self.pair(live.__defaults__ or (), new.__defaults__ or (), path)
        fill = _attribute(live, "__defaults__").fill
        self._assign(partial(fill, defaults or None), partial(fill, live.__defaults__))
        if live.__kwdefaults__ and new.__kwdefaults__:
            self.pair(live.__kwdefaults__, new.__kwdefaults__, path)
        return live

    def _pair_object(self, live: Any, new: Any, path: str) -> Any:
        parts = fields(new)
        if parts is None:
            if callable(new):
                return new
            raise self._refuse(path, f"cannot look into a {type(new).__qualname__}")
        held = fields(live) or {}
        for name, value in parts.items():
            slot = _attribute(live, name, object.__setattr__)
            self._pair_item(held, name, value, slot, f"{path}.{name}")
        return live

    def _pair_item(
        self,
        owner: Mapping[str, Any],
        name: str,
        value: Any,
        slot: _Slot,
        path: str,
    ) -> None:
        held = owner.get(name)
        paired = self.pair(held, value, path)
        if paired is not held or name not in owner:
            revert = partial(slot.fill, held) if name in owner else slot.empty
            self._assign(partial(slot.fill, paired), revert)

    def _assign(self, apply: Callable[[], Any], revert: Callable[[], Any]) -> None:
        self.commit.assignments.append(Assignment(apply, revert))

    def _copy(self, live: torch.Tensor, new: torch.Tensor, path: str) -> None:
        forms = zip(("shape", "dtype", "device"), _form(live), _form(new))
        for what, serving, came in forms:
            if serving != came:
                raise self._refuse(path, f"{what} {serving} serves, now {came}")
        same = live.data_ptr() == new.data_ptr() and live.stride() == new.stride()
        if live.numel() and not same:
            self.commit.copies.append((live, new))

    def _refuse(self, path: str, detail: str) -> WeightSyncError:
        finding = Finding(self.commit.layer, path, detail)
        summary = "weight sync cannot put a processed layer into service"
        return WeightSyncError(summary, invalid=[finding])


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _attribute(
    owner: Any, name: str, assign: Callable[[Any, str, Any], None] = setattr
) -> _Slot:
    return _Slot(partial(assign, owner, name), partial(_discard, owner, name))


def _entry(owner: dict, key: Any) -> _Slot:
    return _Slot(partial(owner.__setitem__, key), partial(owner.pop, key, None))


def _discard(owner: Any, name: str) -> None:
    """Delete an attribute of the object's own; frozen classes allow that so only."""
    with suppress(AttributeError):
        object.__delattr__(owner, name)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _owns_resource(value: Any) -> bool:
    """Objects that free something when they die are exchanged, never copied into."""
    return hasattr(type(value), "__del__")


def _holds_tensors(values: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)
