"""vLLM itself on our adapters: both forms answer as PEFT does, and not as the base.

``VLLM_PYTHON`` names the Python of an environment with vLLM, which asks for another transformers than ours.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from peft import PeftModel

from greedy_llama import FORMS, NEW_TOKENS, answers, random_llama, write_forms

PYTHON = os.environ.get("VLLM_PYTHON")
WORKER = Path(__file__).parent.parent / "helpers" / "worker_vllm.py"
VOCABULARY = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


def test_both_forms_answer_as_peft_does_and_not_as_the_base(tmp_path):
    prompts = write_forms(tmp_path, VOCABULARY)
    base = random_llama(VOCABULARY)
    told = answers(base, prompts)
    expected = answers(PeftModel.from_pretrained(base, tmp_path / "trained"), prompts)
    words = [
        PYTHON,
        "-W",
        "ignore",
        WORKER,
        tmp_path / "base",
        json.dumps(prompts),
        str(NEW_TOKENS),
    ]
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": "",
    }
    ran = subprocess.run(
        [*words, *(tmp_path / form for form in FORMS)], check=True, capture_output=True, text=True,
        env=os.environ | settings | {"VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    assert json.loads(ran.stdout.splitlines()[-1]) == [told, expected, expected]
    assert all(one != other for one, other in zip(told, expected, strict=True))
