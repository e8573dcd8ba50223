# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Links of pages that go upstream."""

import pytest

from overlay.links import relink

MOVED = {
    "docs/live-server.md": "docs/training/weight_transfer/shm.md",
    "docs/metrics.md": "docs/training/weight_transfer/metrics.md",
    "docs/scale-check.md": "docs/training/scale_check.md",
}


@pytest.mark.parametrize(
    ("page", "upstream"),
    [
        ("See [bad scales](scale-check.md).", "See [bad scales](../scale_check.md)."),
        ("[a](live-server.md#what-it-is)", "[a](shm.md#what-it-is)"),
        ("It is [named](errors.md#ipc) (400).", "It is named (400)."),
        ("[Grafana](https://grafana.com/a.md)", "[Grafana](https://grafana.com/a.md)"),
        ("[below](#below)", "[below](#below)"),
    ],
    ids=["elsewhere", "a heading", "a page that stays", "an address", "this page"],
)
def test_a_link_leads_to_where_the_page_is(page, upstream):
    assert relink(page, "docs/metrics.md", MOVED) == upstream
