"""Write every table of a results folder, from its files."""

from pathlib import Path

from dynlora_lab.bench.page import as_html
from dynlora_lab.bench.summary import summarise
from dynlora_lab.bench.text_tables import as_csv, as_json, as_latex, as_markdown
from dynlora_lab.tasks.whole_file import write_whole

TABLES = {
    "README.md": as_markdown,
    "table.csv": as_csv,
    "summary.json": as_json,
    "table.tex": as_latex,
    "index.html": as_html,
}


def rendered(folder: Path) -> dict[str, str]:
    """File name to content of every table; nothing is written.

    Raises:
        RecipeError: ``folder`` holds no results, or a file in it cannot be read.
    """
    summary = summarise(folder)
    return {name: table(summary) for name, table in TABLES.items()}


def render(folder: Path) -> list[Path]:
    """Write the tables into ``folder`` and give their paths."""
    return [write_whole(folder / name, content) for name, content in rendered(folder).items()]
