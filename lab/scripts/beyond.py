"""Run the recipes beyond the paper with LoRA and dynlora, three seeds each, and write a page of results.

python lab/scripts/beyond.py run digit-questions noisy-prompts   # what is there already is left alone
python lab/scripts/beyond.py run italian --bf16 true --use_cpu true
python lab/scripts/beyond.py page                                # lab/results/beyond-the-paper/README.md
python lab/scripts/beyond.py picture                             # ranks.png beside it (needs matplotlib)
"""

import itertools
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAB = Path(__file__).parent.parent
RESULTS = LAB / "results" / "beyond-the-paper"
METHODS = ("lora", "dynlora")
SEEDS = (1, 2, 3)
SHOWN = 6  # rows that the page shows

METRICS = {
    "digit-questions": (
        "exact_match",
        "exact_match_what",
        "exact_match_which",
        "exact_match_count",
    ),
    "synopses": ("rouge1", "rouge2", "rougeL", "perplexity"),
    "italian": ("chrf", "bleu", "perplexity"),
    "noisy-prompts": ("wer",),
    "modern-english": ("bleu", "chrf", "rule_kept", "perplexity"),
}


def run_all(names: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Each recipe by method and seed; the first run measures the base too, the same for all.

    Args:
        names: of the recipes.
        overrides: of their fields, as ``dynlora train`` takes them.
    """
    from dynlora_lab.tasks.recipe import read_recipe
    from dynlora_lab.tasks.run import run

    for name in names:
        for seed in SEEDS:
            for method in METHODS:
                kept = RESULTS / name / f"{method}-seed{seed}.json"
                if kept.is_file():
                    continue
                is_first = method == METHODS[0] and seed == SEEDS[0]
                with tempfile.TemporaryDirectory() as scratch:
                    changes = {
                        "method": method, "seed": seed, "output": f"{scratch}/run",
                        "eval_on_start": str(is_first).lower(),
                    }  # fmt: skip
                    changed = [p for k, v in changes.items() for p in (f"--{k}", str(v))]
                    path = LAB / "recipes" / "beyond" / f"{name}.yaml"
                    recipe = read_recipe(path, [*overrides, *changed])
                    record = run(recipe).record
                    record["recipe"]["output"] = f"runs/beyond/{name}"
                    record["command"] = " ".join(
                        ["python lab/scripts/beyond.py run", name, *overrides]
                    )
                    record["baselines"] |= copied(recipe)
                    texts = Path(scratch, "run", "written.jsonl").read_text(encoding="utf8")
                _write(kept, json.dumps(record, indent=1, default=str))
                rows = [json.loads(line) for line in texts.splitlines()]
                shown = [json.dumps(r, ensure_ascii=False) for r in rows if r["row"] < 2 * SHOWN]
                _write(kept.with_suffix(".written.jsonl"), "\n".join(shown))
                sys.stdout.write(f"{name} {method} {seed}: {record['metrics']}\n")
                sys.stdout.flush()


def copied(recipe: Any) -> dict[str, float]:
    """What an instruction's source itself scores as its answer; the first eight words as a summary."""
    from dynlora_lab.tasks.causal_lm import SCORES, Options, rule_kept
    from dynlora_lab.tasks.data import read_splits

    options = recipe.options
    if not isinstance(options, Options):
        return {}
    (column,) = re.findall(r"{(\w+)}", options.prompt)
    rows = read_splits(recipe.data).evals[""].select(range(options.generate_rows))
    texts = rows[column][:]
    if options.generate == "rouge":
        texts = [" ".join(text.split()[:8]) for text in texts]
    scores = SCORES[options.generate](texts, rows[options.answer][:])
    return scores | ({"rule_kept": rule_kept(texts, options.rule)} if options.rule else {})


def page() -> str:
    """Tables of all runs that are there, and what they wrote."""
    parts = ["# Beyond the paper", "Written by `python lab/scripts/beyond.py page`."]
    for name, metrics in METRICS.items():
        runs = _runs(name)
        if runs:
            parts += [f"## {name}", _table(runs, metrics), _towers(runs), _answers(name)]
    parts.append(_agreement())
    return "\n\n".join(part for part in parts if part) + "\n"


def _runs(name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        files = sorted((RESULTS / name).glob(f"{method}-seed?.json"))
        if files:
            found[method] = [json.loads(file.read_text(encoding="utf8")) for file in files]
    return found


def _table(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> str:
    """Metrics of the base, what needs no model, and each run, in the order of its seed."""
    first = runs[METHODS[0]][0]
    lines = [
        f"| | {' | '.join(metrics)} | parameters |",
        f"|---|{'---|' * len(metrics)}---|",
    ]
    baselines = first["baselines"]
    if baselines:
        lines.append(_line("without a model", [baselines.get(m) for m in metrics], ""))
    before = first["evaluations"][0]
    lines.append(_line("base", [before.get(f"eval_{m}") for m in metrics], "0"))
    for method, records in runs.items():
        columns = [[record["metrics"][f"eval_{m}"] for record in records] for m in metrics]
        cells = [
            f"**{statistics.mean(values):.1f}** ({', '.join(f'{v:.1f}' for v in values)})"
            for values in columns
        ]
        size = max(record["budget"]["parameters_end"] for record in records)
        lines.append(f"| {method} | {' | '.join(cells)} | {size:,} |")
    return "\n".join(lines)


def _line(name: str, values: Sequence[float | None], size: str) -> str:
    cells = ["" if value is None else f"{value:.1f}" for value in values]
    return f"| {name} | {' | '.join(cells)} | {size} |"


def _towers(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Mean rank of each part of the model after dynlora, for models of several parts."""
    by_part: dict[str, list[int]] = defaultdict(list)
    for record in runs.get("dynlora", []):
        for name, rank in record["ranks"].items():
            by_part[part_of(name)].append(rank)
    if len(by_part) < 2:
        return ""
    head = "| | modules | mean rank | without an adapter |\n|---|---|---|---|"
    lines = [
        f"| {part} | {len(ranks)} | {statistics.mean(ranks):.2f} | {ranks.count(0)} |"
        for part, ranks in by_part.items()
    ]
    return "\n".join(["Ranks of all dynlora runs together, by part of the model:\n", head, *lines])


def part_of(module: str) -> str:
    """Tower of a module by its name.

    >>> part_of("model.vision_tower.layers.0.mlp.fc1"), part_of("model.layers.3.mlp.up_proj")
    ('vision_tower', 'decoder')
    """
    known = re.search(r"vision_tower|multi_modal_projector|language_model|encoder|decoder", module)
    return known.group() if known else "decoder"


def _agreement() -> str:
    """How alike the final ranks of tasks are that share a model: the mean correlation of pairs of runs."""
    found = {name: runs["dynlora"] for name in METRICS if "dynlora" in (runs := _runs(name))}
    lines = []
    for one, other in itertools.combinations_with_replacement(found, 2):
        if one == other:
            pairs = list(itertools.combinations(found[one], 2))
        else:
            pairs = list(itertools.product(found[one], found[other]))
        if not pairs or any(a["ranks"].keys() != b["ranks"].keys() for a, b in pairs):
            continue
        values = [correlation(a["ranks"], b["ranks"]) for a, b in pairs]
        between = f"{one}, two seeds" if one == other else f"{one} and {other}"
        lines.append(
            f"| {between} | {statistics.mean(values):.2f} | {min(values):.2f} to {max(values):.2f} |"
        )
    if not lines:
        return ""
    head = "| ranks of | mean correlation | pairs of runs |\n|---|---|---|"
    return "\n".join(
        ["## How alike the ranks are", "", "Spearman's correlation over modules:", "", head, *lines]
    )


def correlation(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Spearman's rank correlation of two maps of ranks, over the modules that they share.

    >>> correlation({"a": 0, "b": 1, "c": 6}, {"a": 1, "b": 2, "c": 3})
    1.0
    """
    from scipy.stats import spearmanr

    return round(float(spearmanr([one[k] for k in one], [other[k] for k in one]).statistic), 6)


def _answers(name: str) -> str:
    """What base, LoRA and dynlora of the first seed wrote for the first rows, side by side."""
    written = {}
    for method in METHODS:
        file = RESULTS / name / f"{method}-seed{SEEDS[0]}.written.jsonl"
        if not file.is_file():
            return ""
        rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
        last = max(row["evaluation"] for row in rows)
        written[method] = [row for row in rows if row["evaluation"] == last]
        if method == METHODS[0]:
            written["base"] = [row for row in rows if row["evaluation"] == 0]
    lines = ["| asked | expected | base | lora | dynlora |", "|---|---|---|---|---|"]
    for number in range(min(SHOWN, len(written["base"]))):
        rows = [written[m][number] for m in ("base", *METHODS)]
        cells = [rows[0].get("asked", ""), rows[0]["expected"], *(row["written"] for row in rows)]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines)


def _cell(text: str, limit: int = 240) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= limit else flat[:limit] + " …"


def picture() -> None:
    """A map of mean ranks for each task: kinds of modules down, layers across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: runs["dynlora"] for name in METRICS if "dynlora" in (runs := _runs(name))}
    figure, all_axes = pyplot.subplots(
        len(found), 1, figsize=(9, 2.8 * len(found)), layout="constrained", squeeze=False
    )
    for axes, (name, records) in zip(all_axes[:, 0], found.items(), strict=True):
        kinds, columns, values = rank_map(records)
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90)
        axes.set_title(f"{name}: mean rank of {len(records)} runs")
        figure.colorbar(image, ax=axes)
    figure.savefig(RESULTS / "ranks.png", dpi=110)


def rank_map(
    records: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], list[list[float]]]:
    """Mean rank by kind of module (rows) and layer of a tower (columns); NaN where there is none."""
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for record in records:
        for module, rank in record["ranks"].items():
            layer = re.search(r"\.layers?\.(\d+)\.", module)
            column = f"{part_of(module)} {layer.group(1) if layer else ''}".strip()
            inside = module[layer.end() :] if layer else module.rpartition(".")[2]
            cells[inside, column].append(rank)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    values = [
        [statistics.mean(cells[kind, c]) if (kind, c) in cells else float("nan") for c in columns]
        for kind in kinds
    ]
    return kinds, columns, values


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text + "\n", encoding="utf8")
    temporary.replace(path)


if __name__ == "__main__":
    verb, *names = sys.argv[1:]
    if verb == "run":
        fields = next((n for n, name in enumerate(names) if name.startswith("--")), len(names))
        run_all(names[:fields] or list(METRICS), names[fields:])
    elif verb == "page":
        _write(RESULTS / "README.md", page().rstrip())
    elif verb == "picture":
        picture()
    else:
        sys.exit(f"{verb!r} is none of run, page, picture.")
