"""The tables of one GPU check, from the JSON files of its folder."""

import json
from pathlib import Path
from typing import Any

from tables import table

TIMED = {
    "steps": "Steps",
    "gain": "Modules of rank 0",
    "compiled": "Compiled steps",
    "quantised": "4-bit base",
}
NOT_SHOWN = {"losses", "ranks", "seconds", "options", "found", "put_into"}


def gpu_tables(folder: Path) -> str:
    """All sections that the folder holds, and where they come from."""
    records = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    parts = []
    for section, title in TIMED.items():
        for name, case in records.get(section, {"cases": {}})["cases"].items():
            if case.get("arms"):
                parts.append(f"**{title}: {name}**\n\n{_timed(case['arms'])}")
            parts += [f"*{title}: {name}: {arm} failed.*" for arm in case.get("failed", {})]
    for name, case in records.get("allocator", {"cases": {}})["cases"].items():
        if "hooks" in case:
            parts.append(f"**The allocator: {name}**\n\n{_allocator(case)}")
    if "promises" in records:
        parts.append(f"**Promises**\n\n{_promises(records['promises']['cases'])}")
    parts += [
        f"*Not run: {section}: {name}: {case.get('left_out', 'it failed')}.*"
        for section, record in records.items()
        for name, case in record["cases"].items()
        if {"left_out", "error"} & case.keys()
    ]
    parts.append(_source(next(iter(records.values()))))
    return "\n\n".join(parts)


def _timed(arms: dict[str, Any]) -> str:
    rows = [
        (
            arm,
            f"{row['ms']:.1f} ms",
            f"{row['host_ms']:.1f} ms",
            "{:.3f} ({:.3f} to {:.3f})".format(row["ratio"], *row["spread"]) if "ratio" in row else "",
            row["peer"],
            "" if row["step_peak_bytes"] is None else f"{row['step_peak_bytes'] / 2**30:.2f} GiB",
        )
        for arm, row in arms.items()
    ]  # fmt: skip
    return table(("arm", "device", "host", "ratio (range)", "to", "peak of a step"), rows)


def _allocator(case: dict[str, Any]) -> str:
    usual = (case["without"]["host_syncs"] or {"count": 0})["count"]
    rows = [
        (
            name,
            str(hooks["kernels"]),
            f"{hooks['kernel_ms']:.3f} ms, {case['share'][name]['of_device_time']:.2%}",
            f"{hooks['host_ms']:.2f} ms, {case['share'][name]['of_host_time']:.2%}",
            str((case[name]["host_syncs"] or {"count": 0})["count"] - usual),
        )
        for name, hooks in case["hooks"].items()
    ]
    return table(
        ("state", "kernels", "device time, share", "host time, share", "waits for the device"), rows
    )


def _promises(cases: dict[str, Any]) -> str:
    rows = [
        (name, "; ".join(f"{k}: {v}" for k, v in case.items() if k not in NOT_SHOWN))
        for name, case in cases.items()
        if not {"error", "left_out"} & case.keys()
    ]
    return table(("question", "answer"), rows)


def _source(record: dict[str, Any]) -> str:
    versions, machine = record["versions"], record["machine"]
    return (
        f"*`{record['command']}` at {(record['commit'] or 'an unknown commit')[:10]}, {record['date']}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}; "
        f"{machine['device']}, {machine['cores']} cores.*"
    )
