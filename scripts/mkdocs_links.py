"""What pages in docs/ take from the rest of the repository, on the site.

In the repository ``[examples](../examples)`` is a link. The site does not hold those files: with
``repo_url`` set in mkdocs.yml it links to them there, without it the text stays. Pictures
(``![ranks](../benchmarks/…/ranks.svg)``) are copied into the site.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#]+)(#[^)]*)?\)")

log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, *, config: Any) -> Files:
    """The site's files, and the pictures from elsewhere that pages show."""
    for page in files.documentation_pages():
        for is_picture, _, target, _ in LINK.findall(page.content_string):
            path = _in_repository(page, target)
            if path is None or not is_picture or files.get_file_from_path(path):
                continue
            file = _root(config) / path
            if file.is_file():
                files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_kwargs: Any) -> str:
    """The page with links out of docs/ replaced; one that leads nowhere is a warning."""

    def replaced(link: re.Match[str]) -> str:
        is_picture, text, target, anchor = link.groups(default="")
        path = _in_repository(page.file, target)
        if path is None:
            return link[0]
        if not (_root(config) / path).exists():
            log.warning("%s links to %s, which does not exist.", page.file.src_uri, target)
        if is_picture:
            return f"![{text}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri))})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    return LINK.sub(replaced, markdown)


def _in_repository(page: File, target: str) -> str | None:
    """The path of a link's target from the repository's root; None if it is in docs/, on the site."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), target))
    return None if path.startswith("docs/") else path


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent
