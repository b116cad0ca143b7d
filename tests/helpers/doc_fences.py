"""The code fences of README.md, CONTRIBUTING.md and docs/."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """A fence: where it stands, and what it holds."""

    page: str
    line: int
    language: str
    text: str

    def run(self, names):
        """Run it as printed; ``names`` is what it finds and where it leaves its own.

        The blank lines before it make a traceback name the line of the page.
        """
        code = compile("\n" * self.line + self.text, str(ROOT / self.page), "exec")
        exec(code, names)  # noqa: S102  # our own pages

    def __str__(self):
        return f"{self.page}:{self.line}"


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page, language=None):
    """The fences of a page, in order."""
    text = text_of(page)
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2))
        found.append(Fence(page, line, match[1], match[2]))
    return [f for f in found if language in (None, f.language)]
