# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A sync from disk reads by plan, layer by layer, or says what it cannot read."""

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import regex as re
import torch
from safetensors.torch import save_file

from tests.checkpoints import CASES, Case, write_shards
from tests.harness.memory import allocated
from tests.harness.models import Built
from tests.harness.snapshot import assert_same, snapshot
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    read_ahead,
    reload_status,
)
from vllm.model_executor.model_loader.reload.calls import TensorSpec
from vllm.model_executor.model_loader.reload.checkpoint_files import CheckpointFile
from vllm.model_executor.model_loader.reload.layer_order import in_order_of_layers
from vllm.model_executor.model_loader.reload.route import Copy, Route
from vllm.model_executor.model_loader.reload.view import View

inplace = pytest.importorskip("vllm.model_executor.model_loader.reload.inplace")
CASE = CASES["qwen3_moe-fp8_block"]
SHARDS = 5
LOGGER = "vllm.model_executor.model_loader.reload.checkpoint_loader"


def sync(built: Built, folder: Path) -> None:
    """Reload as a worker does, which closes a sync that failed."""
    model, vllm_config = built
    try:
        with built.worker_context():
            inplace.reload_weights(vllm_config, model, None, str(folder), True)
    except Exception as error:
        abort_layerwise_reload(model, str(error))
        raise


@pytest.fixture
def shards(tmp_path) -> Callable[[Case, int], Path]:
    """Give the folder of a case's checkpoint, its tensors dealt out to files."""

    def shards(case: Case, seed: int) -> Path:
        return write_shards(case, seed, tmp_path / f"shards-{seed}", SHARDS)

    return shards


@pytest.fixture
def said(caplog, monkeypatch) -> Callable[[], str]:
    """Give a function that returns what the loader has logged."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: "\n".join(r.message for r in caplog.records if r.name == LOGGER)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe-fp8_block",
        "qwen3_moe-bf16",
        "qwen3_moe-bf16-padded_experts",
        "qwen3_moe-fp8_tensor_static",
        "qwen3_moe-compressed_tensor_static",
        "deepseek_v3-fp8_block",
        "gpt_oss-bf16",
        "llama-bf16-padded_vocab",
    ],
)
@pytest.mark.parametrize("policy", ["layer", "model"])
def test_a_synced_model_equals_a_cold_load(
    name, policy, make_model, cold_load, shards, checkpoint, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    built = make_model(CASES[name], seed=1)
    sync(built, shards(CASES[name], 2))
    assert_same(snapshot(built.model), cold_load(CASES[name], 2))
    sync(built, checkpoint(CASES[name], 1))
    assert_same(snapshot(built.model), cold_load(CASES[name], 1))
    assert reload_status(built.model).version == 2


def test_tensors_go_by_plan(make_model, shards, said):
    built = make_model(CASE, seed=1)
    sync(built, shards(CASE, 2))
    count = len(list(CASE.tensors(2)))
    assert f"Reading {count} of {count} tensors from {SHARDS} files" in said()


def test_without_a_plan_the_base_reads(
    make_model, cold_load, shards, said, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", "0")
    built = make_model(CASE, seed=1)
    folder = shards(CASE, 2)
    sync(built, folder)
    assert said() == f"Reading all tensors of {folder}, as stored."
    assert_same(snapshot(built.model), cold_load(CASE, 2))


def test_of_a_name_in_two_files_the_same_one_counts(make_model, cold_load, tmp_path):
    for number, seed in ((9, 1), (10, 2)):
        save_file(dict(CASE.tensors(seed)), tmp_path / f"model-{number}.safetensors")
    built = make_model(CASE, seed=1)
    sync(built, tmp_path)
    assert_same(snapshot(built.model), cold_load(CASE, 2))


@pytest.mark.parametrize("kind", ["first", "later"])
def test_in_any_order_of_files_a_sync_needs_one_layer(
    kind, no_packing, make_model, shards, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    large = replace(
        CASE,
        sizes=replace(CASE.sizes, layers=3, experts=16, hidden=512, intermediate=512),
    )
    built = make_model(large, seed=1)
    folder = shards(large, 2)
    if kind == "later":
        sync(built, folder)
    with allocated() as count:
        sync(built, folder)
    layers = [
        sum(param.nbytes for param in layer.parameters(recurse=False))
        for layer in built.model.modules()
    ]
    assert count.peak <= 1.1 * max(layers)
    assert count.left <= 0.05 * max(layers)


def test_files_are_let_go(make_model, shards):
    built = make_model(CASE, seed=1)
    folder = shards(CASE, 2)
    sync(built, folder)
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder) not in mapped
    opened = {os.path.realpath(f) for f in Path("/proc/self/fd").iterdir()}
    assert not any(path.startswith(str(folder)) for path in opened)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(0, 0))


def replace_file(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.rename(path)


FAULTS = {
    cut_short: "was changed while",
    overwrite: "was changed while",
    replace_file: "was changed while",
    Path.unlink: "was removed while",
}


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_a_file_that_is_cut_short_is_refused(
    policy, make_model, cold_load, checkpoint, shards, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    built = make_model(CASE, seed=1)
    before = snapshot(built.model)
    path = sorted(shards(CASE, 2).glob("*.safetensors"))[1]
    with CheckpointFile(str(path)) as file:
        last = file.tensors[-1].name
    cut_short(path)
    with pytest.raises(WeightSyncError, match=f"{path} was cut short: {last} ends at"):
        sync(built, path.parent)
    assert reload_status(built.model).state == "serving"
    assert_same(snapshot(built.model), before)
    sync(built, checkpoint(CASE, 2))
    assert_same(snapshot(built.model), cold_load(CASE, 2))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_changes_while_it_is_read_is_refused(
    fault, make_model, cold_load, checkpoint, shards, monkeypatch
):
    built = make_model(CASE, seed=1)
    path = sorted(shards(CASE, 2).glob("*.safetensors"))[1]
    map_tensor, left = CheckpointFile.map, iter(range(3))

    def change_after_some(file, stored):
        if next(left, None) == 2:
            fault(path)
        return map_tensor(file, stored)

    monkeypatch.setattr(CheckpointFile, "map", change_after_some)
    with pytest.raises(WeightSyncError, match=f"{path} {FAULTS[fault]}") as refused:
        sync(built, path.parent)
    assert any(name in str(refused.value) for name, _ in CASE.tensors(2))
    sync(built, checkpoint(CASE, 2))
    assert_same(snapshot(built.model), cold_load(CASE, 2))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"{]"])
def test_what_is_no_safetensors_file_is_named(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightSyncError, match=f"{path} is no whole safetensors file"):
        CheckpointFile(str(path))


def test_a_file_that_the_index_names_and_is_not_there_is_named(make_model, shards):
    built = make_model(CASE, seed=1)
    before = snapshot(built.model)
    path = next(shards(CASE, 2).glob("*.safetensors"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        sync(built, path.parent)
    assert_same(snapshot(built.model), before)
    assert reload_status(built.model).state == "serving"


def test_a_file_has_the_places_and_values_of_its_tensors(shards):
    expected = dict(CASE.tensors(2))
    for path in shards(CASE, 2).glob("*.safetensors"):
        content = path.read_bytes()
        with CheckpointFile(str(path)) as file:
            for stored in file.tensors:
                tensor = expected.pop(stored.name)
                assert torch.equal(as_bytes(file.map(stored)), as_bytes(tensor))
                found = content[stored.start : stored.start + stored.nbytes]
                assert found == as_bytes(tensor).numpy().tobytes()
    assert not expected


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def route(layer: str) -> Route:
    view = View.whole((4, 4))
    spec = TensorSpec((4, 4), torch.float32)
    copy = Copy.of((layer, "weight"), view, view, (), spec, torch.float32)
    return Route(spec, (copy,))


def test_layers_are_brought_together():
    routes = {
        f"layers.{layer}.experts.{expert}.{part}.weight": route(f"layers.{layer}.moe")
        for layer in (0, 1)
        for expert in (0, 1)
        for part in ("gate", "up")
    }
    scales = [name.replace("weight", "scale") for name in routes]
    names = [*routes, *scales, "layers.0.norm.weight", "head.weight"]
    random.Random(0).shuffle(names)
    ordered = list(in_order_of_layers(names, routes))
    assert sorted(ordered) == sorted(names)
    experts = [name.split(".")[1] for name in ordered if ".experts." in name]
    assert experts in (["0"] * 8 + ["1"] * 8, ["1"] * 8 + ["0"] * 8)


def test_a_file_that_is_emptied_while_it_is_read_ahead_is_refused(
    make_model, shards, monkeypatch
):
    """Whoever copied from its pages would end the process."""
    built = make_model(CASE, seed=1)
    before = snapshot(built.model)
    path = sorted(shards(CASE, 2).glob("*.safetensors"))[0]
    monkeypatch.setattr(CheckpointFile, "read_ahead", lambda *_: os.truncate(path, 0))
    with pytest.raises(WeightSyncError, match=f"cannot read bytes .* of {path}"):
        sync(built, path.parent)
    assert reload_status(built.model).state == "serving"
    assert_same(snapshot(built.model), before)
    assert not threads()


def threads() -> list[str]:
    """Threads that read ahead."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("read-ahead")]


@pytest.fixture
def small_steps(monkeypatch) -> int:
    """Read ahead a little at a time; gives how many bytes."""
    monkeypatch.setattr(read_ahead, "_BYTES_AHEAD", 2 << 20)
    monkeypatch.setattr(read_ahead, "_BATCH_BYTES", 1 << 18)
    return 2 << 20


@pytest.fixture
def large_file(tmp_path) -> Iterator[CheckpointFile]:
    """Give a file of 64 tensors of 512 KiB."""
    path = tmp_path / "large.safetensors"
    values = {f"{i:02}": torch.full((1 << 19,), i) for i in range(64)}
    save_file({name: value.byte() for name, value in values.items()}, path)
    with CheckpointFile(str(path)) as file:
        yield file


def wanted(file: CheckpointFile) -> list[read_ahead.Wanted]:
    return [read_ahead.Wanted(t, ((0, t.nbytes),)) for t in file.tensors]


def test_a_tensor_is_there_before_it_is_used_and_little_else(
    large_file, small_steps, monkeypatch
):
    events: list[tuple[str, int]] = []
    for step in "read_ahead", "fault_in", "release":
        monkeypatch.setattr(CheckpointFile, step, noting(events, step))
    for i, stored in enumerate(read_ahead.read_ahead(wanted(large_file))):
        assert stored is large_file.tensors[i]
        done = {step: sum(n for s, n in events if s == step) for step, _ in events}
        assert done["fault_in"] >= stored.nbytes * (i + 1)
        is_there = done["read_ahead"] - done.get("release", 0)
        assert is_there <= small_steps + stored.nbytes
    steps = dict.fromkeys(step for step, _ in events)
    size = sum(t.nbytes for t in large_file.tensors)
    assert {s: sum(n for at, n in events if at == s) for s in steps} == {
        "read_ahead": size,
        "fault_in": size,
        "release": size,
    }


def noting(events: list[tuple[str, int]], step: str) -> Callable[..., None]:
    """Note how many bytes a step takes, once it is done."""
    original = getattr(CheckpointFile, step)

    def note(file: CheckpointFile, start: int, stop: int) -> None:
        original(file, start, stop)
        events.append((step, stop - start))

    return note


def test_what_was_used_leaves_the_memory_of_the_process(large_file, small_steps):
    most = 0
    for i, stored in enumerate(read_ahead.read_ahead(wanted(large_file))):
        assert large_file.map(stored).eq(i).all()
        most = max(most, resident(large_file))
    # With a page that is looked at the system maps some that lie beside it.
    assert small_steps < most <= sum(t.nbytes for t in large_file.tensors) / 4


def resident(file: CheckpointFile) -> int:
    """Bytes of a file that are in memory and counted as this process's."""
    maps = Path("/proc/self/smaps").read_text().split(file.path)[1:]
    sizes = [re.search(r"^Rss: +(\d+) kB", each, re.MULTILINE) for each in maps]
    return sum(int(size[1]) << 10 for size in sizes if size)


def test_threads_end_with_whoever_reads(large_file, small_steps):
    reading = read_ahead.read_ahead(wanted(large_file))
    next(reading)
    assert threads()
    reading.close()
    assert not threads()


def test_bytes_that_are_gone_are_an_error_of_their_file(large_file):
    last = large_file.tensors[-1]
    large_file.fault_in(last.start, last.start + last.nbytes)
    os.truncate(large_file.path, large_file.tensors[0].start)
    with pytest.raises(WeightSyncError, match=f"cannot read .* of {large_file.path}"):
        large_file.fault_in(last.start, last.start + last.nbytes)


@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (2, 0), (5, 7)])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.bool]
)
def test_a_tensor_of_any_shape_and_type_is_mapped(shape, dtype, tmp_path):
    path = tmp_path / "odd.safetensors"
    expected = torch.randint(0, 2, shape).to(dtype)
    odd = torch.ones(3, dtype=torch.uint8)  # the next one is nowhere aligned
    save_file({"a": odd, "b": expected}, path)
    with CheckpointFile(str(path)) as file:
        found = {stored.name: file.map(stored) for stored in file.tensors}
    assert found["b"].shape == expected.shape and found["b"].dtype == dtype
    assert torch.equal(as_bytes(found["b"]), as_bytes(expected))
    assert torch.equal(found["a"], odd)
