"""A hook of mkdocs: links to files that the site does not hold become plain text."""

import re
from posixpath import normpath
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, files: Any, **unused: Any) -> str:
    """Return a page's text, with each link that leads out of the site replaced by its words."""
    folder = page.file.src_uri.rpartition("/")[0]

    def kept_or_plain(match: re.Match[str]) -> str:
        target = files.get_file_from_path(normpath(f"{folder}/{match[2]}" if folder else match[2]))
        return match[0] if target and target.inclusion.is_included() else match[1]

    return _LINK.sub(kept_or_plain, markdown)
