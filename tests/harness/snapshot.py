# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Everything that a model serves with, as one flat mapping, and its comparison.

What forward reads hides in many places: parameters and buffers, attributes of modules,
of quantisation methods, of kernels and of quantisation configs, closures over packed
weights, floats kept beside a tensor. `snapshot` walks all of them.
"""

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

Snapshot = dict[str, torch.Tensor]

# Attributes that hold no part of what a model serves with.
SKIPPED_ATTRIBUTES = {
    "weight_loader": "serves loading; forward never reads it",
    "load_weights": "an open sync, which knows all layers as they were created",
    "handler_tensor": "address of weights packed by oneDNN; `_probe` reads them",
    "kv_cache": "a placeholder until an engine binds its cache",
    "_do_torchao_reload": "a note of upstream's reload; forward never reads it",
    "_original_do_torchao_reload": "a note of upstream's reload, as above",
}
# Modules whose objects describe a run and hold no weights, though they refer to layers.
SKIPPED_PACKAGES = ("vllm.config", "vllm.distributed")

MAX_REPORTED = 10

# What vLLM's layers call K, the most specific first.
_WIDTHS = ("embedding_dim", "input_size_per_partition", "input_size")


def snapshot(model: torch.nn.Module) -> Snapshot:
    """Copy every tensor and number that the model serves with.

    Args:
        model: A model after loading or after a reload.

    Returns:
        Copies by path, such as `model.layers.0.mlp.experts.w13_weight`; a tensor with
        several names is under each. Numbers are 0-d float64 or int64. Weights that
        oneDNN packed are at `<module>.cpu_linear(identity)`, [K, N], read back through
        the kernel.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    walk = _Walk(seen={id(module) for module in modules.values()})
    for path, module in modules.items():
        walk.attributes(path, module)
        packed = _probe(module)
        if packed is not None:
            walk.found[f"{path}.cpu_linear(identity)"] = packed
    return walk.found


@dataclass
class _Walk:
    """A walk through objects; each is visited once, each tensor as often as named."""

    seen: set[int]
    found: Snapshot = field(default_factory=dict)

    def visit(self, path: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self.found[path] = value.detach().clone()
            self.attributes(path, value)
        elif isinstance(value, float):
            self.found[path] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, int):
            self.found[path] = torch.tensor(value, dtype=torch.int64)
        elif _may_hold_tensors(value) and id(value) not in self.seen:
            self.seen.add(id(value))
            self.attributes(path, value)

    def attributes(self, path: str, owner: object) -> None:
        for name, value in _children(owner):
            if name not in SKIPPED_ATTRIBUTES:
                self.visit(f"{path}.{name}" if path else name, value)


def _may_hold_tensors(value: object) -> bool:
    if isinstance(value, _CONTAINERS | _CALLABLES | torch.nn.Module):
        return True
    package = type(value).__module__
    return package.startswith(("vllm.", "tests.")) and not (
        package.startswith(SKIPPED_PACKAGES) or isinstance(value, type)
    )


_CONTAINERS = Mapping | list | tuple | set | frozenset
_CALLABLES = types.FunctionType | types.MethodType | functools.partial


def _children(owner: object) -> Iterator[tuple[str, object]]:
    """Name everything that `owner` refers to."""
    if isinstance(owner, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in list(owner.items()))
    elif isinstance(owner, list | tuple | set | frozenset):
        yield from ((f"[{index}]", value) for index, value in enumerate(owner))
    elif isinstance(owner, functools.partial):
        yield from (("func", owner.func), ("args", owner.args))
        yield "keywords", owner.keywords
    elif isinstance(owner, types.MethodType):
        yield from (("__self__", owner.__self__), ("__func__", owner.__func__))
    elif isinstance(owner, types.FunctionType):
        yield from _captured(owner)
    else:
        yield from _attributes(owner)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What a function carries: closed-over variables and default arguments."""
    yield from inspect.getclosurevars(function).nonlocals.items()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            yield parameter.name, parameter.default


def _attributes(owner: object) -> Iterator[tuple[str, object]]:
    """Instance attributes; a module's parameters and buffers count as its own."""
    fields = dict(getattr(owner, "__dict__", {}))
    if isinstance(owner, torch.nn.Module):
        fields |= fields.pop("_parameters") | fields.pop("_buffers")
        del fields["_modules"]
    for slot in getattr(type(owner), "__slots__", ()):
        if hasattr(owner, slot):
            fields[slot] = getattr(owner, slot)
    yield from sorted(fields.items())


def _probe(module: torch.nn.Module) -> torch.Tensor | None:
    """Read the weights back out of a CPU kernel, [K, N]; None where there is none.

    The product with the identity is exact: each sum has one term that is not zero.
    """
    cpu_linear = getattr(module, "cpu_linear", None)
    # The function of torch reads the parameter.
    if cpu_linear is None or cpu_linear is torch.nn.functional.linear:
        return None
    width = next(getattr(module, name) for name in _WIDTHS if hasattr(module, name))
    identity = torch.eye(width, dtype=torch.bfloat16)
    return cpu_linear(identity, module.weight, None)


def assert_same(actual: Snapshot, expected: Snapshot) -> None:
    """Compare two snapshots bit by bit.

    Raises:
        AssertionError: They differ; says how many, where first, and both values.
    """
    problems = list(differences(actual, expected))
    if problems:
        shown = problems[:MAX_REPORTED]
        more = len(problems) - len(shown)
        lines = [f"{len(problems)} of {len(expected)} entries differ:", *shown]
        raise AssertionError("\n  ".join(lines + [f"and {more} more"] * (more > 0)))


def differences(actual: Snapshot, expected: Snapshot) -> Iterator[str]:
    """Describe, one a line, each entry in which two snapshots differ."""
    for path in sorted(actual.keys() | expected.keys()):
        if path not in actual:
            yield f"{path}: missing, expected {_kind(expected[path])}"
        elif path not in expected:
            yield f"{path}: unexpected {_kind(actual[path])}"
        else:
            yield from _difference(path, actual[path], expected[path])


def _difference(
    path: str, actual: torch.Tensor, expected: torch.Tensor
) -> Iterable[str]:
    if _kind(actual) != _kind(expected):
        return [f"{path}: got {_kind(actual)}, expected {_kind(expected)}"]
    if actual.is_meta:
        return []
    unequal = (_bytes(actual) != _bytes(expected)).any(dim=-1)
    count = int(unequal.sum())
    if count == 0:
        return []
    first = int(unequal.nonzero()[0])
    index = tuple(
        int(i) for i in torch.unravel_index(torch.tensor(first), actual.shape)
    )
    values = f"got {actual[index].item()}, expected {expected[index].item()}"
    return [f"{path}: {count} of {actual.numel()} differ, first at {index}: {values}"]


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element, uint8 [elements, bytes of one]."""
    flat = tensor.reshape(-1).contiguous()
    # A single element may have any stride, and torch then refuses the view.
    flat = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
    return flat.reshape(-1, tensor.element_size())
