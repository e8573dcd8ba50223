# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the body of an error says when workers refused a request.

{"error": {"message": ..., "type": "Unprocessable Entity", "code": 422,
           "missing": [{"layer": ..., "parameter": ..., "expert": ..., "shard": ...,
                        "detail": ..., "ranks": [0]}],
           "invalid": [], "more": 0}}
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.engine.rpc_refusal import RpcRefusedError

__all__ = ["lists_what_is_wrong"]


def lists_what_is_wrong(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_error_response`, which turns an exception into a body."""

    @wraps(create)
    def listing(message: str | Exception, *args: Any, **kwargs: Any) -> Any:
        response = create(message, *args, **kwargs)
        if isinstance(message, RpcRefusedError):
            # The body takes fields that its model does not know.
            response.error.missing = message.refusal.missing
            response.error.invalid = message.refusal.invalid
            response.error.more = message.refusal.more
        return response

    return listing
