"""What does a training step cost, before and after the freeze, next to PEFT's LoRA and to the floor?

    python benchmarks/step_cost.py [--device cuda]

The floor is the frozen model's forward pass and the gradient of its activations: no adapter can be
cheaper.
"""

import argparse
import statistics

from arms import FLOOR, LORA_TARGET, PEERS, step_arms
from cases import STEP_CASES, StepCase
from measuring import arguments, interleaved, ratio, spread, write


def compare(question: str, options: argparse.Namespace, chosen: list[StepCase]) -> None:
    """Measure all arms of these cases and write them."""
    cases = []
    for case in chosen:
        arms = step_arms(case, options.device)
        times = interleaved(arms, rounds=options.rounds, device=options.device)
        rows = {
            arm: {
                "seconds": statistics.median(times[arm]),
                "peer": (peer := PEERS.get(arm, LORA_TARGET)),
                "to_peer": ratio(times, arm, peer),
                "to_peer_spread": spread(times, arm, peer),
                "to_lora": ratio(times, arm, LORA_TARGET),
                "to_floor": ratio(times, arm, FLOOR),
            }
            for arm in arms
        }
        cases.append({"case": case.name, "arms": rows, "times": times})
        print(case.name, {arm: round(row["to_peer"], 3) for arm, row in rows.items()})  # type: ignore[call-overload]
    write(question, options, {"cases": cases})


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    compare("step_cost", options, STEP_CASES[options.device])
