"""The example of docs/shrink.md: train a LoRA, shrink it on 200 held-out texts, score it on 800 others.

dynlora assets fetch all-MiniLM-L6-v2 wordnet-glosses
python lab/scripts/shrink_example.py         # lab/results/shrink-example/README.md, some three minutes
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)
from typer.testing import CliRunner

from dynlora.cli.main import app
from dynlora_lab.tasks.offline import offline_data, offline_model
from dynlora_lab.tasks.provenance import machine, source_commit, versions

PAGE = Path(__file__).parents[1] / "results" / "shrink-example" / "README.md"
STEPS, BATCH, CLASSES = 150, 32, 26
TOLERANCES = (0.003, 0.01, 0.02)


def main() -> None:
    """Train, shrink at each tolerance, score, and write the page."""
    base, glosses = offline_model("all-MiniLM-L6-v2"), offline_data("wordnet-glosses")
    train, val = (glosses[part].to_pandas() for part in ("train", "validation"))
    numbers = {name: i for i, name in enumerate(sorted(train.label.unique()))}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in (train, val):
            part["label"] = part.label.map(numbers)
        val[:200][["text", "label"]].to_csv(folder / "val.csv", index=False)
        tokenizer = train_lora(base, train, folder / "lora")
        printed, scored = [], {"whole": right(base, folder / "lora", tokenizer, val[200:])}
        for tolerance in TOLERANCES:
            out = folder / f"small-{tolerance}"
            arguments = ["shrink", str(folder / "lora"), "--model", base, "--data"]
            arguments += [str(folder / "val.csv"), "--tolerance", str(tolerance), "--out", str(out)]
            done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
            if done.exit_code:
                raise SystemExit(done.output)
            printed.append(f"## --tolerance {tolerance}\n\n```\n{shortened(done.output)}\n```\n")
            scored[f"--tolerance {tolerance}"] = right(base, out, tokenizer, val[200:])
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(printed, scored), encoding="utf-8")


def train_lora(base: str, rows: Any, folder: Path) -> Any:
    """150 steps of AdamW at 2·10⁻³, falling linearly; the adapter with its head is in ``folder``."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=CLASSES)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    drawn = rows.sample(STEPS * BATCH, random_state=0)
    model.train()
    for step in range(STEPS):
        part = drawn[step * BATCH : (step + 1) * BATCH]
        inputs = encoded(tokenizer, part)
        loss = model(**inputs, labels=torch.tensor(part.label.to_numpy())).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def encoded(tokenizer: Any, part: Any) -> Any:
    """Inputs of a model, of at most 64 tokens."""
    return tokenizer(
        list(part.text), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )


@torch.no_grad()
def right(base: str, folder: Path, tokenizer: Any, rows: Any) -> Tensor:
    """1 for each text whose class is found, else 0."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=CLASSES)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    found = [
        model(**encoded(tokenizer, rows[i : i + BATCH])).logits.argmax(1)
        for i in range(0, len(rows), BATCH)
    ]
    return (torch.cat(found) == torch.tensor(rows.label.to_numpy())).double()


def shortened(output: str) -> str:
    """The part from the table of losses to the sentence of what was saved."""
    start, end = output.index(" order "), output.index("Wrote ")
    return "\n".join(line.rstrip() for line in output[start:end].rstrip().splitlines())


def page(printed: list[str], scored: dict[str, Tensor]) -> str:
    """What was printed, and the accuracy on the other texts, with the standard error of the difference."""
    whole = scored["whole"]
    lines = ["| adapter | accuracy | minus whole |", "|---|---|---|"]
    for name, hits in scored.items():
        gap = 100 * (hits - whole)
        error = float(gap.std()) / len(gap) ** 0.5
        text = "" if hits is whole else f"{float(gap.mean()):+.1f} ± {error:.1f}"
        lines.append(f"| {name} | {100 * float(hits.mean()):.1f} | {text} |")
    known = ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    return (
        "# The example of docs/shrink.md\n\n"
        "Written by `python lab/scripts/shrink_example.py`; edit nothing here. "
        f"LoRA r 16, all-MiniLM-L6-v2, WordNet's glosses, {STEPS} steps of {BATCH}, seed 0; 200 texts to "
        f"shrink on, {len(whole)} others to score on, ± the standard error.\n\n"
        + "\n".join(lines)
        + "\n\n"
        + "\n".join(printed)
        + f"\n{known}; commit {source_commit()}; {machine()}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
