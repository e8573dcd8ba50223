# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which segments of shared memory an engine opens as a trainer's bucket."""

import os
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from examples.rl import shm_trainer
from tests.harness.packed import bucket_of_a_trainer
from vllm.distributed.weight_transfer.shm_bucket import PREFIX, Bucket


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    """A trainer's segment of 4 KiB."""
    with bucket_of_a_trainer(4096) as segment:
        yield segment


def test_both_sides_see_the_same_bytes(segment):
    memory = Bucket(segment.name).memory()
    segment.buf[4095] = 7
    assert memory.shape == (4096,)
    assert memory[4095] == 7


def test_a_bucket_outlives_its_trainer():
    made = SharedMemory(f"{PREFIX}{uuid4().hex}", create=True, size=4096)
    assert made.buf is not None
    made.buf[0] = 7
    bucket = Bucket(made.name)
    made.close()
    made.unlink()
    assert bucket.memory()[0] == 7


def test_a_segment_is_not_read_in_the_place_of_a_later_one():
    made = SharedMemory(f"{PREFIX}{uuid4().hex}", create=True, size=4096)
    bucket = Bucket(made.name)
    made.unlink()
    later = SharedMemory(made.name, create=True, size=4096)
    try:
        with pytest.raises(ValueError, match="another one .*init_weight_transfer"):
            bucket.memory()
    finally:
        made.close()
        later.close()
        later.unlink()


def test_a_segment_of_something_else_is_not_opened():
    other = SharedMemory(create=True, size=4096)
    try:
        with pytest.raises(ValueError, match=f"'{PREFIX}'.*got '{other.name}'"):
            Bucket(other.name)
    finally:
        other.close()
        other.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "",
        PREFIX,
        f"/{PREFIX}a",
        f"{PREFIX}../etc/passwd",
        f"{PREFIX}a/b",
        f"{PREFIX}a\n",
        f"{PREFIX}a\0",
        f"{PREFIX}{'a' * 129}",
        f"{PREFIX}ä",
        None,
        7,
        [PREFIX],
    ],
)
def test_what_is_no_name_of_a_bucket_is_refused(name):
    with pytest.raises(ValueError, match="expected a segment whose name is"):
        Bucket(name)


def test_a_segment_that_is_not_there():
    with pytest.raises(ValueError, match="cannot be opened: No such file"):
        Bucket(f"{PREFIX}{uuid4().hex}")


def test_a_link_to_something_else_is_not_followed(tmp_path):
    target = tmp_path / "secret"
    target.write_bytes(bytes(4096))
    link = Path("/dev/shm") / f"{PREFIX}{uuid4().hex}"
    link.symlink_to(target)
    try:
        with pytest.raises(ValueError, match="cannot be opened"):
            Bucket(link.name)
    finally:
        link.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_segment_of_another_user_is_refused(segment):
    os.chown(f"/dev/shm/{segment.name}", 65534, 65534)
    with pytest.raises(ValueError, match="not of this engine's user"):
        Bucket(segment.name)


def test_an_empty_segment_is_refused(segment):
    os.truncate(f"/dev/shm/{segment.name}", 0)
    with pytest.raises(ValueError, match="is empty"):
        Bucket(segment.name)


def test_a_segment_that_was_cut_down_is_not_read(segment):
    bucket = Bucket(segment.name)
    os.truncate(f"/dev/shm/{segment.name}", 1024)
    with pytest.raises(ValueError, match="had 4096 bytes .* has 1024 now"):
        bucket.memory()


def test_a_trainer_that_is_refused_frees_its_bucket(monkeypatch):
    name = uuid4()
    monkeypatch.setattr(shm_trainer, "uuid4", lambda: name)
    monkeypatch.setattr(shm_trainer.Trainer, "post", refuse)
    with pytest.raises(PermissionError):
        shm_trainer.Trainer("", bucket_bytes=4096)
    assert not Path("/dev/shm", f"{PREFIX}{name.hex}").exists()


def refuse(trainer: shm_trainer.Trainer, route: str, **body: Any) -> None:
    assert Path("/dev/shm", trainer.segment).exists()
    raise PermissionError
