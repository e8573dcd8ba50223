# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What ranks say of the tensors that they were sent becomes one answer."""

from vllm.entrypoints.serve.checksum_route import agreed


def test_ranks_that_agree():
    ranks = [{"a": "1", "b": "2"}, {"a": "1", "c": "3"}]
    answer = agreed(ranks)
    assert answer == {"checksums": {"a": "1", "b": "2", "c": "3"}, "differ": []}


def test_ranks_that_were_sent_different_tensors():
    ranks = [{"a": "1", "b": "2"}, {"a": "9", "b": "2"}, {"a": "1", "b": "2"}]
    assert agreed(ranks) == {"checksums": {"b": "2"}, "differ": ["a"]}
