"""What a run wrote when it measured: kept beside the scores, so that a person can read it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynlora_lab.tasks.whole_file import write_whole

FILE = "written.jsonl"


@dataclass(frozen=True, kw_only=True)
class Written:
    """Texts of the evaluations of a run; a family notes them, the run writes them down.

    Attributes:
        evaluations: texts of each evaluation of a set in their order: (name of the set, what was asked
            or None, what was written, what was expected), the last three a text a row.
    """

    evaluations: list[tuple[str, Sequence[str] | None, Sequence[str], Sequence[str]]] = field(
        default_factory=list
    )

    def note(
        self,
        name: str,
        *,
        written: Sequence[str],
        expected: Sequence[str],
        asked: Sequence[str] | None = None,
    ) -> None:
        """Keep the texts of one evaluation of the set ``name``."""
        self.evaluations.append((name, asked, list(written), list(expected)))

    def write(self, folder: Path) -> None:
        """Write ``written.jsonl`` whole, one line an answer; nothing if no text was noted.

        ``evaluation`` counts the evaluations of a set from 0; the last one is of the finished model.
        """
        if not self.evaluations:
            return
        counts: dict[str, int] = {}
        lines: list[str] = []
        for name, asked, written, expected in self.evaluations:
            number = counts.setdefault(name, 0)
            counts[name] += 1
            for row, (answer, gold) in enumerate(zip(written, expected, strict=True)):
                line = {"evaluation": number, "set": name, "row": row, "written": answer}
                line |= {"expected": gold} | ({"asked": asked[row]} if asked else {})
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_whole(folder / FILE, "".join(lines))
