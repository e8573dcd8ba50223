# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the tensors of a safetensors file lie, which its library does not tell.

The format: 8 bytes with the length of the header, little-endian; the header, which is
JSON; and the tensors' bytes, whose offsets count from the header's end.
"""

import json
import os
from collections.abc import Iterator
from typing import IO, NamedTuple

__all__ = ["HeaderEntry", "read_header"]


class HeaderEntry(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        name: its name.
        dtype: as the format calls it, e.g. "F8_E4M3".
        shape: its shape.
        start: its first byte in the file.
        nbytes: how many bytes it has.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: IO[bytes]) -> Iterator[HeaderEntry]:
    """Read the header of a file that is open at its start.

    Whether it describes the file is for the library to say, which checks it.

    Raises:
        ValueError: it is longer than the file, or no JSON.

    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        raise ValueError(f"its header is {length} bytes long and the file {size}")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), 8 + length + begin
        yield HeaderEntry(name, entry["dtype"], shape, start, end - begin)
