"""docs/train.md: its tables are complete."""

import re

from doc_fences import text_of
from dynlora_lab.methods import METHODS
from dynlora_lab.tasks.family import FAMILIES

TEXT = text_of("docs/train.md")


def first_cells(heading):
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row)}


def test_the_tables_name_every_task_and_every_method():
    assert first_cells("Tasks") == set(FAMILIES)
    assert first_cells("Methods") == set(METHODS)
