# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command `vllm reload-check`: what it prints, and its exit status."""

import json
import math
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from vllm.entrypoints.cli import reload_check
from vllm.model_executor.model_loader.reload.sync_report import (
    LayerReport,
    SyncReport,
    publish,
)

CASE = CASES["qwen3_moe-fp8_block"]
COMMAND = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
LAYER = LayerReport("model.norm", 1, 1, 250_000, 0.5, 0.0025, 0.01, 1.5)
SYNC = SyncReport(
    model="Model",
    rank=1,
    result="complete",
    reason="",
    state="serving",
    version=2,
    commit="layer",
    planned=4,
    through_loaders=1,
    bytes=1_000_000,
    seconds=2.0,
    waiting_seconds=0.5,
    checking_seconds=0.25,
    committing_seconds=0.5,
    pause_seconds=0.125,
    peak_staged_bytes=500_000,
    layers=[LAYER],
)
SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


@pytest.fixture
def sound(tmp_path):
    return write_checkpoint(CASE, 1, tmp_path / "sound")


@pytest.fixture
def damaged(tmp_path):
    folder = write_checkpoint(CASE, 2, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_scale_inv" in name:
            tensor.fill_(math.nan)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(capsys):
    """Run the command in this process: its exit status, and what it printed where."""

    def run_command(*arguments):
        parser = ArgumentParser()
        (command,) = reload_check.cmd_init()
        command.subparser_init(parser.add_subparsers())
        with pytest.raises(SystemExit) as end:
            command.cmd(parser.parse_args(["reload-check", *map(str, arguments)]))
        return end.value.code, *capsys.readouterr()

    return run_command


def test_the_real_command(sound, damaged):
    line = [*COMMAND, "reload-check", str(damaged), "--against", str(sound), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    content = json.loads(done.stdout)
    assert (done.returncode, content["sound"]) == (1, False)
    assert content["against"]["checkpoint"] == str(sound)
    assert "it/s" not in done.stderr  # no bar where nobody looks


def test_the_list_of_commands():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert "reload-check" in done.stdout


def test_sound(sound, run):
    status, text, _ = run(sound)
    assert status == 0
    assert text == (
        f"{sound}: 125 tensors, 3,026,400 bytes\n"
        "  56 weights with scales, in blocks of 128 x 128\n"
        "  16 experts, 0 dead\n"
        "sound\n"
    )


def test_at_most_20_lines_on_what_is_wrong(damaged, run):
    status, text, _ = run(damaged)
    lines = text[text.index("not sound: 56 findings") :].splitlines()
    assert (status, len(lines), lines[-1]) == (1, 20, "  and 38 more")
    assert "_scale_inv: 2 of 2 values are invalid, the first: scale is nan" in text


def test_json_has_all(damaged, run):
    status, text, _ = run(damaged, "--json")
    content = json.loads(text)
    assert (status, len(content["invalid"])) == (1, 56)
    finding = next(f for f in content["invalid"] if f["layer"] in SCALE)
    assert finding["parameter"] == "weight_scale_inv"


def test_against(sound, run):
    status, text, _ = run(sound, "--against", sound)
    assert status == 0
    assert f"a sync from {sound} sends 125 tensors, 3,026,400 bytes\n" in text
    assert "  125 unchanged: model.layers." in text
    assert "model.layers.*.mlp.experts.*.down_proj.weight (16)," in text


def test_a_terminal_shows_how_far_it_is(sound, run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, progress = run(sound, "--against", sound)
    assert "0/125" in progress and " tensors/s" in progress


def test_says_once_what_is_missing(sound, damaged, run):
    tensors = load_file(sound / "model.safetensors")
    del tensors[SCALE]
    save_file(tensors, damaged / "model.safetensors")
    status, text, _ = run(damaged, "--against", sound)
    assert (status, text.count(SCALE)) == (1, 1)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_unreadable(options, sound, run):
    file = sound / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, text, errors = run(sound, *options)
    assert status == 2
    assert str(file) in errors
    assert not options or str(file) in json.loads(text)["error"]


def test_no_such_checkpoint(sound, run):
    assert run("/no/such/folder")[0] == 2
    assert run(sound, "--against", "/no/such/folder")[0] == 2


def test_report_of_a_sync(run, tmp_path):
    publish(SYNC, tmp_path / "sync.json")
    status, text, _ = run("--report", tmp_path / "sync.json")
    line, head, row, rest = text.splitlines()
    assert status == 0
    assert line == f"Model, rank 1: {SYNC.summary}"
    columns = "layer tensors planned MB receive, s check, s commit, s at, s"
    assert " ".join(head.split()) == columns
    assert " ".join(row.split()) == "model.norm 2 1 0.25 0.5000 0.0025 0.0100 1.50"
    assert len(head) == len(row)
    assert rest == "3 tensors were for no layer here"


def test_report_of_a_failed_sync(run, tmp_path):
    layer = replace(LAYER, committed_at=None)
    reason = "weight sync is incomplete\n  missing: model.norm weight: never sent"
    failed = replace(SYNC, result="incomplete", reason=reason, layers=[layer])
    publish(failed, tmp_path / "sync.json")
    status, text, _ = run("--report", tmp_path / "sync.json")
    line, missing, _, row, _ = text.splitlines()
    assert status == 1
    assert line.endswith("It failed at weight sync is incomplete")
    assert missing == "  missing: model.norm weight: never sent"
    assert row.split()[-1] == "-"


def test_report_as_json(run, tmp_path):
    publish(SYNC, tmp_path / "sync.json")
    status, text, _ = run("--report", tmp_path / "sync.json", "--json")
    assert (status, json.loads(text)) == (0, asdict(SYNC))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_what_is_no_report(options, sound, run):
    file = sound / "config.json"
    status, text, errors = run("--report", file, *options)
    assert status == 2
    assert f"{file} is no report of a weight sync" in errors
    assert not options or str(file) in json.loads(text)["error"]
    assert run("--report", "/no/such/file")[0] == 2


def test_a_checkpoint_or_a_report(sound, run):
    assert run(sound, "--report", "sync.json")[0] == 2
    assert run()[0] == 2


def test_a_report_is_not_compared(sound, run, tmp_path):
    publish(SYNC, tmp_path / "sync.json")
    status, _, errors = run("--report", tmp_path / "sync.json", "--against", sound)
    assert status == 2 and "got a report" in errors
