"""docs/upstream-peft.md: the script of the report on LoRA-GA prints what the page says."""

import pytest

from doc_fences import fences

PAGE = "docs/upstream-peft.md"


@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
def test_the_script_prints_what_the_page_says(capsys):
    (script,), (printed,) = fences(PAGE, "python"), fences(PAGE, "")
    script.run({})
    assert capsys.readouterr().out == printed.text
