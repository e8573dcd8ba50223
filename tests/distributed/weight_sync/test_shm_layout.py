# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer may say of its bucket, and what it is told when it may not."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm.distributed.weight_transfer.shm_layout import (
    DTYPES,
    MAX_TENSORS,
    Placement,
    placements,
)

BUCKET_BYTES = 64


def place(bucket_bytes: int = BUCKET_BYTES, **changed: Any) -> list[Placement]:
    """Place a bfloat16 matrix [2, 3] at byte 0 and a float32 scalar at byte 12."""
    lists: dict[str, Any] = {
        "names": ["weight", "scale"],
        "dtype_names": ["bfloat16", "float32"],
        "shapes": [[2, 3], []],
        "offsets": [0, 12],
    }
    return placements(**{**lists, **changed}, bucket_bytes=bucket_bytes)


def test_tensors_are_views_of_the_bucket():
    weight = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    bucket = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
    bucket[:12] = weight.view(-1).view(torch.uint8)
    bucket[12:16] = torch.tensor([0.5]).view(torch.uint8)
    views = [each.view(bucket) for each in place()]
    assert torch.equal(views[0], weight)
    assert torch.equal(views[1], torch.tensor(0.5))
    assert views[0].untyped_storage().data_ptr() == bucket.data_ptr()


def test_tensors_may_fill_the_bucket():
    assert [(each.start, each.stop) for each in place(16)] == [(0, 12), (12, 16)]


def test_tensors_lie_in_any_order():
    assert [each.start for each in place(offsets=[4, 0])] == [4, 0]


def test_nothing_is_a_chunk_too():
    assert place(names=[], dtype_names=[], shapes=[], offsets=[]) == []


REFUSED = {
    "no list": (dict(names="weight"), "'names'"),
    "other lengths": (dict(offsets=[0]), "'offsets': 1"),
    "name of another type": (dict(names=["weight", 3]), "tensor 1, 3: expected name"),
    "empty name": (dict(names=["", "scale"]), "tensor 0"),
    "long name": (dict(names=["n" * 2000, "scale"]), "1 to 1024 characters"),
    "unknown dtype": (dict(dtype_names=["bool", "float32"]), "got 'bool'"),
    "dtype of another type": (dict(dtype_names=[["x"], "float32"]), "got ['x']"),
    "no attribute of torch": (dict(dtype_names=["load", "float32"]), "got 'load'"),
    "shape of another type": (dict(shapes=[6, []]), "shape"),
    "negative size": (dict(shapes=[[-2, -3], []]), "got [-2, -3]"),
    "fractional size": (dict(shapes=[[2.0, 3], []]), "got [2.0, 3]"),
    "true as a size": (dict(shapes=[[True, 3], []]), "got [True, 3]"),
    "many dimensions": (dict(shapes=[[1] * 9, []]), "up to 8 sizes"),
    "huge size": (dict(shapes=[[1 << 62, 1 << 62], []]), "bucket of 64 bytes"),
    "beyond the end": (dict(offsets=[0, 64]), "got 'bytes 64 to 68'"),
    "over the end": (dict(offsets=[54, 0]), "got 'bytes 54 to 66'"),
    "negative offset": (dict(offsets=[0, -4]), "got -4"),
    "unaligned": (dict(offsets=[0, 14]), "a multiple of 4, got 14"),
    "fractional offset": (dict(offsets=[0, 12.0]), "got 12.0"),
    "overlap": (dict(offsets=[0, 8]), "'weight' (bytes 0 to 12) and 'scale' (bytes 8"),
    "the same place": (dict(offsets=[0, 0]), "overlap"),
}


@pytest.mark.parametrize("changed, says", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(changed, says):
    with pytest.raises(ValueError) as raised:
        place(**changed)
    assert str(raised.value).startswith("update_info: ")
    assert says in str(raised.value)
    assert len(str(raised.value)) < 500


def test_too_many_tensors():
    count = MAX_TENSORS + 1
    lists = (["weight"] * count, ["uint8"] * count, [[0]] * count, [0] * count)
    with pytest.raises(ValueError, match=f"got {count}"):
        placements(*lists, BUCKET_BYTES)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
SIZES = st.integers(-2, 9)


def _lists(entries: list[tuple]) -> list[list]:
    return [[entry[key] for entry in entries] for key in range(4)]


@given(
    st.lists(
        st.tuples(
            st.text(max_size=3) | ANYTHING,
            st.sampled_from([*DTYPES, "bool", ""]) | ANYTHING,
            st.lists(SIZES, max_size=3) | ANYTHING,
            st.integers(-8, BUCKET_BYTES + 8) | ANYTHING,
        ),
        max_size=4,
    )
)
def test_whatever_is_placed_lies_in_the_bucket_and_apart(entries):
    try:
        placed = placements(*_lists(entries), BUCKET_BYTES)
    except ValueError:
        return
    bucket = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
    for each in placed:
        assert each.view(bucket).shape == each.shape
    filled = sorted(
        (each.start, each.stop) for each in placed if each.stop > each.start
    )
    assert all(one[1] <= other[0] for one, other in pairwise(filled))
