# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The demo: the released vLLM and this fork get the same weight syncs, good and bad.

    python -m demo              # measures everything and prints one table

`defects` syncs into a model in its process, `serving` into a live engine. Each runs on
whichever vLLM it finds and prints what it measured; `__main__` runs them on both sides.
"""
