# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A route with checksums that a trainer can compare: `GET /weight_checksums`.

    {"checksums": {"model.norm.weight": "00c0ffee00c0ffee", ...}, "differ": []}

`/weight_checker` is about the tensors that kernels read, which each rank and each
backend has in a form of its own. These are about the tensors that were sent.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

__all__ = ["add_checksum_route", "agreed"]


def add_checksum_route(router: APIRouter) -> None:
    """Add the route to the others that are about weights."""

    @router.get("/weight_checksums")
    async def weight_checksums(raw_request: Request) -> JSONResponse:
        """Tell the checksums of the tensors that serve, as they were sent."""
        client = raw_request.app.state.engine_client
        return JSONResponse(agreed(await client.collective_rpc("sent_checksums")))


def agreed(ranks: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """What ranks were sent: what they agree on, and names that they do not agree on.

    From disk, a rank reads no tensor that it has no use for.
    """
    found: dict[str, str] = {}
    differ = set()
    for checksums in ranks:
        both = found.keys() & checksums.keys()
        differ |= {name for name in both if found[name] != checksums[name]}
        found.update(checksums)
    same = {name: value for name, value in found.items() if name not in differ}
    return {"checksums": same, "differ": sorted(differ)}
