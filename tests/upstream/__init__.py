# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Upstream's own tests, on the base and on the fork: `python -m tests.upstream`.

What passes on the base must pass on the fork, unless `docs/upstream-tests.md` lists it
as an expected loss. See there for what is run and how.
"""
