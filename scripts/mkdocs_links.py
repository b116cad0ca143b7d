"""Links that lead from docs/ to other files of the repository, on the site.

In the repository ``[examples](../examples)`` is a link. The site does not hold those files: with
``repo_url`` set in mkdocs.yml it links to them there, without it the text stays.
"""

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")

log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_kwargs: Any) -> str:
    """The page with links out of docs/ replaced; one that leads nowhere is a warning."""
    root = Path(config.config_file_path).parent

    def replaced(link: re.Match[str]) -> str:
        text, path, anchor = link.groups(default="")
        if not (root / path).exists():
            log.warning("%s links to ../%s, which does not exist.", page.file.src_uri, path)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    return LINK.sub(replaced, markdown)
