# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Links between pages, of which some go upstream, to other places, and some stay."""

import re
from collections.abc import Mapping
from posixpath import dirname, join, normpath, relpath

_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<page>[^):#]+\.md)(?P<heading>#[^)]*)?\)")


def relink(text: str, path: str, moved: Mapping[str, str]) -> str:
    """Return a page as it reads upstream.

    Its links lead to where pages are there. Of a link to a page that stays in the fork
    only the words are left.

    Args:
        text: The page.
        path: Where it is in the checkout.
        moved: Path in the checkout -> path upstream, of each page that goes there.
    """

    def place(link: re.Match[str]) -> str:
        target = moved.get(normpath(join(dirname(path), link["page"])))
        if target is None:
            return link["text"]
        page = relpath(target, dirname(moved[path]))
        return f"[{link['text']}]({page}{link['heading'] or ''})"

    return _LINK.sub(place, text)
