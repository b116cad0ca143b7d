"""What does a training step cost, before and after the freeze, next to PEFT's LoRA and to the floor?

    python benchmarks/step_cost.py [--device cuda]

The floor is the frozen model's forward pass and the gradient of its activations: no adapter can be
cheaper.
"""

import statistics

from arms import FLOOR, LORA_TARGET, PEERS, step_arms
from cases import STEP_CASES
from measuring import arguments, interleaved, ratio, spread, write


def main() -> None:
    """Measure all cases of the device and write them."""
    options = arguments(__doc__ or "")
    cases = []
    for case in STEP_CASES[options.device]:
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
    write("step_cost", options, {"cases": cases})


if __name__ == "__main__":
    main()
