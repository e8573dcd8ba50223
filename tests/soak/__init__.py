# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Long runs against a running server: `make soak`, see docs/soak.md."""
