# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A completion that tells which weights serve: tokens and their log-probabilities."""

import requests

from tests.harness.server import Server

__all__ = ["PROMPT", "REQUEST", "Answer", "answer_of", "ask", "choice_of"]

Answer = tuple[list[int], list[float]]

# Longer than a block of the KV cache, so that its prefix is cached.
PROMPT = [3, 1, 4, 1, 5] * 30
REQUEST = {
    "model": "tiny",
    "prompt": PROMPT,
    "max_tokens": 4,
    "temperature": 0,
    "logprobs": 1,
    "ignore_eos": True,
    "return_token_ids": True,
}


def ask(server: Server) -> Answer:
    """Return what a server answers to `REQUEST`."""
    return answer_of(server.post("v1/completions", REQUEST))


def answer_of(response: requests.Response) -> Answer:
    """Return tokens and their log-probabilities."""
    choice = choice_of(response)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def choice_of(response: requests.Response) -> dict:
    """Return the choice of a completion, which must have succeeded."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice
