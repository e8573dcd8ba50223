# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What cannot be read says so; what lies in several files is one checkpoint."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.damage import found
from vllm.model_executor.model_loader.checkpoint_check import (
    UnreadableCheckpoint,
    open_checkpoint,
)

CASE = "qwen3_moe-fp8_block"
SCALE = "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv"
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(CASES[CASE], 1, tmp_path)


def shard(folder):
    """Split the checkpoint in two files with an index, weights from their scales."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    files = {name: f"part-{'scale' in name:d}.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: t for name, t in tensors.items() if files[name] == file}
        save_file(part, folder / file)
    return index(folder, files)


def index(folder, files):
    text = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)
    return files


def test_shards(folder, check):
    shard(folder)
    report = check(folder)
    assert (found(report), report.pairs) == ([], 56)


def test_names_the_file(folder, check):
    shard(folder)
    tensors = load_file(folder / "part-1.safetensors")
    tensors[SCALE].fill_(-1)
    save_file(tensors, folder / "part-1.safetensors")
    (line,) = found(check(folder))
    assert line.startswith(SCALE) and line.endswith("(part-1.safetensors)")


def test_listed_but_not_stored(folder, check):
    index(folder, {**shard(folder), "lm_head.bias": "part-0.safetensors"})
    assert found(check(folder)) == [
        "lm_head.bias: not stored; the index has it in part-0.safetensors"
    ]


def test_missing_shard(folder):
    shard(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"1 files .*: part-1.safetensors"):
        open_checkpoint(str(folder))


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(keep, folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UnreadableCheckpoint, match=FILE):
        open_checkpoint(str(folder))
    (folder / FILE).write_bytes(content)


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_config_that_is_none(text, folder):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(UnreadableCheckpoint, match="config.json"):
        open_checkpoint(str(folder))


def test_no_tensors(folder):
    (folder / FILE).unlink()
    with pytest.raises(
        UnreadableCheckpoint, match="expected .*safetensors, found none"
    ):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_no_folder(source):
    with pytest.raises(UnreadableCheckpoint, match="neither a folder nor a model"):
        open_checkpoint(source)


def test_a_model_on_disk(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    model = cache / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert len(open_checkpoint("some/model").tensors) == 125


def test_a_file_that_becomes_shorter(folder):
    checkpoint = open_checkpoint(str(folder))
    (folder / FILE).write_bytes(b"")
    with pytest.raises(UnreadableCheckpoint, match=f"{FILE}: ends within model."):
        checkpoint.tensors[SCALE].read()


def test_reads_what_was_stored(folder):
    stored = open_checkpoint(str(folder)).tensors
    for name, tensor in load_file(folder / FILE).items():
        values = stored[name].read()
        assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape)
        assert values.float().equal(tensor.float())
