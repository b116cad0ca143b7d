"""A file is replaced whole, or the older one stays."""

import stat
from pathlib import Path

import pytest

from dynlora_lab.tasks.whole_file import write_json, write_whole


def test_a_file_is_replaced_and_readable_by_everybody(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf8")
    assert write_whole(path, "é") == path
    assert path.read_text(encoding="utf8") == "é"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": Path()})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert path.read_text(encoding="utf8") == '{\n "a": 1\n}\n'
