"""What does a training step cost over a base in 4 bit, fused and as PEFT computes it?

    python benchmarks/step_cost_4bit.py [--device cuda]

The arms are those of step_cost.py. The base's product is bitsandbytes' own in all of them.
"""

from importlib.metadata import version

from cases import FOUR_BIT_CASES
from measuring import arguments
from step_cost import compare

if __name__ == "__main__":
    options = arguments(__doc__ or "")
    options.provenance["versions"]["bitsandbytes"] = version("bitsandbytes")
    compare("step_cost_4bit", options, FOUR_BIT_CASES[options.device])
