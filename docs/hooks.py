"""What the site adds to MkDocs: pages that lie outside this folder, and links to them as a code host has them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File

PAGES: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "emojiland/README.md": "emojiland.md",
    "src/mixofshow/bases/emojiland/icons/LICENSES.md": "licences.md",
}
"""Files of the repository, and what they are called on the site."""
ORIGINS: Final = {page: file for file, page in PAGES.items()}
LINK: Final = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside."""
    root = Path(config.config_file_path).parent
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    return LINK.sub(lambda link: f"]({link_on_site(link[1], page.file.src_uri)}", markdown)


def link_on_site(link: str, page: str) -> str:
    """A link of a page as the site has it: all pages lie beside each other, as those in docs/ do.

    A link to anything else of the repository is left as it is, so that a strict build names it.
    """
    here = ORIGINS.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    return PAGES.get(target, target.removeprefix("docs/"))
