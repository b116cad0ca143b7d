"""What pages in docs/ take from the rest of the repository, on the site.

In the repository ``[examples](../examples)`` is a link. The site does not hold those files: with
``repo_url`` set in mkdocs.yml it links to them there, without it the text stays. Pictures
(``![ranks](../benchmarks/…/ranks.svg)``) are copied into the site.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")

log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, *, config: Any) -> Files:
    """The site's files, and the pictures from elsewhere that pages show."""
    for page in files.documentation_pages():
        for is_picture, _, path, _ in LINK.findall(page.content_string):
            file = _root(config) / path
            if is_picture and file.is_file() and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_kwargs: Any) -> str:
    """The page with links out of docs/ replaced; one that leads nowhere is a warning."""

    def replaced(link: re.Match[str]) -> str:
        is_picture, text, path, anchor = link.groups(default="")
        if not (_root(config) / path).exists():
            log.warning("%s links to ../%s, which does not exist.", page.file.src_uri, path)
        if is_picture:
            return f"![{text}]({path})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    return LINK.sub(replaced, markdown)


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent
