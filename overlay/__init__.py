# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The builder: a released vLLM + the files under `vllm/` + declared edits = the fork.

`python -m overlay --help` lists what it can make: a wheel, a working environment
that follows the checkout, a fork laid into an unpacked base, or patches for upstream.
"""
