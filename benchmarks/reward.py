"""Does allocation by sensitivity stand a noisy reward? Reinforcement learning with a reward by rule.

    python benchmarks/reward.py    (goes on with the results that are there)

A small Llama has learned to copy two digits, with half of them replaced by chance. GRPO's update
(advantages normalised within the completions of a prompt, one step a batch, no KL term) then teaches it
another digit for each: the reward is the share of digits d that become (3 d + 7) mod 10. Every arm has the
same prompts, learning rate and number of steps, and its seed's own base model, so arms are compared
seed by seed.
"""

import copy
import functools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers as hf
from arms import adamw
from measuring import RESULTS, arguments, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora import RankAllocator
from dynlora_lab.bench.statistics import paired

SEEDS, PROCESSES, STEPS, LEARNING_RATE = range(20), 2, 150, 1e-2
DIGITS, END, VOCABULARY, LENGTH = 10, 10, 11, 2
PROMPTS, COMPLETIONS, HELD_OUT = 16, 8, 1024
PRETRAINING, NOISE = 200, 0.5
LAST = 20  # steps whose mean reward is kept beside that of held-out prompts


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Attributes:
        r: rank that the LoRA starts with.
        settings: of the allocator; none for a plain LoRA.
        by_chance: whether components are ranked by random numbers instead of sensitivity.
    """

    r: int
    settings: dict[str, Any] = field(default_factory=dict)
    by_chance: bool = False


ARMS = {
    "LoRA, r 8": Arm(8),
    "LoRA, r 4": Arm(4),
    "dynlora, 8 to 4": Arm(8, {"target_r": 4}),
    "dynlora, 8 to 4, min_r 1": Arm(8, {"target_r": 4, "min_r": 1}),
    "by chance, 8 to 4": Arm(8, {"target_r": 4}, by_chance=True),
    "LoRA, r 1": Arm(1),
    "dynlora, 4 to 1": Arm(4, {"target_r": 1}),
    "dynlora, 4 to 1, min_r 1": Arm(4, {"target_r": 1, "min_r": 1}),
    "by chance, 4 to 1": Arm(4, {"target_r": 1}, by_chance=True),
    "dynlora, 2 to 1": Arm(2, {"target_r": 1}),
    "dynlora, 2 to 1, min_r 1": Arm(2, {"target_r": 1, "min_r": 1}),
    "by chance, 2 to 1": Arm(2, {"target_r": 1}, by_chance=True),
}
COMPARED = [("LoRA, r 1", "LoRA, r 4")] + [
    pair
    for cut in ("8 to 4", "4 to 1", "2 to 1")
    for pair in (
        (f"dynlora, {cut}", f"LoRA, r {cut[-1]}"),
        (f"by chance, {cut}", f"LoRA, r {cut[-1]}"),
        (f"dynlora, {cut}", f"by chance, {cut}"),
        (f"dynlora, {cut}, min_r 1", f"dynlora, {cut}"),
        (f"dynlora, {cut}, min_r 1", f"LoRA, r {cut[-1]}"),
    )
]


def prompts(count: int, draws: torch.Generator) -> Tensor:
    """Digits and the sign that ends them, (count, LENGTH + 1)."""
    digits = torch.randint(0, DIGITS, (count, LENGTH), generator=draws)
    return torch.cat([digits, torch.full((count, 1), END)], dim=1)


def rewards(asked: Tensor, answered: Tensor) -> Tensor:
    """Share of digits d that were answered by (3 d + 7) mod 10, by row."""
    return (answered == (3 * asked[:, :LENGTH] + 7) % DIGITS).float().mean(dim=1)


def base_model(seed: int) -> nn.Module:
    """A Llama that copies digits, half of which are replaced by chance."""
    hf.set_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(PRETRAINING):
        asked = prompts(128, draws)
        is_noise = torch.rand(128, LENGTH, generator=draws) < NOISE
        noise = torch.randint(0, DIGITS, (128, LENGTH), generator=draws)
        answer = torch.where(is_noise, noise, asked[:, :LENGTH])
        logits = model(torch.cat([asked, answer], dim=1)).logits[:, LENGTH:-1]
        F.cross_entropy(logits.flatten(0, 1), answer.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def answers(model: nn.Module, asked: Tensor, draws: torch.Generator) -> Tensor:
    """Completions drawn at temperature 1, (rows, LENGTH)."""
    text = asked
    for _ in range(LENGTH):
        chances = model(text).logits[:, -1].softmax(dim=-1)
        text = torch.cat([text, torch.multinomial(chances, 1, generator=draws)], dim=1)
    return text[:, LENGTH + 1 :]


def reinforced(arm: Arm, base: nn.Module, seed: int) -> dict[str, Any]:
    """One run: rewards on the way and of held-out prompts, and the final ranks."""
    hf.set_seed(seed)
    config = LoraConfig(r=arm.r, lora_alpha=2 * arm.r, target_modules="all-linear")
    model: Any = get_peft_model(copy.deepcopy(base), config)
    optimizer = adamw(model, lr=LEARNING_RATE)
    chance = torch.Generator().manual_seed(1000 + seed)

    def by_chance(modules: Any, _step: int) -> None:
        for module in modules:
            if not module.ema.any():
                module.ema.copy_(torch.rand(module.ema.shape, generator=chance))

    allocator = (
        RankAllocator(
            model, optimizer, total_steps=STEPS, score=by_chance if arm.by_chance else None,
            **arm.settings,
        )
        if arm.settings
        else None
    )  # fmt: skip
    draws = torch.Generator().manual_seed(100 + seed)
    seen = []
    for _ in range(STEPS):
        asked = prompts(PROMPTS, draws).repeat_interleave(COMPLETIONS, dim=0)
        answered = answers(model, asked, draws)
        reward = rewards(asked, answered)
        groups = reward.view(PROMPTS, COMPLETIONS)
        spread = groups.std(dim=1, keepdim=True) + 1e-4
        advantage = ((groups - groups.mean(dim=1, keepdim=True)) / spread).view(-1, 1)
        logits = model(torch.cat([asked, answered], dim=1)).logits[:, LENGTH:-1]
        chosen = logits.log_softmax(dim=-1).gather(2, answered.unsqueeze(2)).squeeze(2)
        (-(advantage * chosen).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(reward.mean().item())
    if allocator is not None:
        allocator.finalize_()
    held_out = prompts(HELD_OUT, torch.Generator().manual_seed(7))
    answered = answers(model, held_out, torch.Generator().manual_seed(8))
    return {
        "held_out": rewards(held_out, answered).mean().item(),
        "last": sum(seen[-LAST:]) / LAST,
        "first": sum(seen[:LAST]) / LAST,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "ranks": {} if allocator is None else allocator.ranks(),
    }


@functools.cache
def known_base(seed: int) -> nn.Module:
    """The base model of a seed, learned once by each process."""
    torch.set_num_threads(1)
    return base_model(seed)


def one_run(name: str, seed: int) -> dict[str, Any]:
    """One arm on one seed's base model."""
    return {"seed": seed, **reinforced(ARMS[name], known_base(seed), seed)}


def compared(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences of held-out reward, seed by seed: mean, 95 % interval, wins and losses."""
    by_seed = {n: {r["seed"]: r["held_out"] for r in arm["runs"]} for n, arm in arms.items()}
    found = []
    for name, peer in COMPARED:
        shared = sorted(by_seed[name].keys() & by_seed[peer].keys())
        if shared:
            gaps = [by_seed[name][seed] - by_seed[peer][seed] for seed in shared]
            found.append({"arm": name, "against": peer, **asdict(paired([gaps]))})
    return found


def known_runs(case: dict[str, Any], device: str) -> dict[str, list[dict[str, Any]]]:
    """Runs that the results hold already, by arm: of the same case, and of arms that are still the same."""
    path = RESULTS / f"reward.{device}.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["result"]["case"] != case:
        return {}
    return {
        name: [{"commit": found["commit"], **run} for run in arm["runs"]]
        for name, arm in found["result"]["arms"].items()
        if name in ARMS and {k: v for k, v in arm.items() if k != "runs"} == asdict(ARMS[name])
    }


def main() -> None:
    """Run every arm on every seed that is not in the results yet, and write the rewards as they come."""
    options = arguments(__doc__ or "")
    case = {
        "steps": STEPS, "learning_rate": LEARNING_RATE, "prompts": PROMPTS,
        "completions": COMPLETIONS, "held_out": HELD_OUT, "seeds": len(SEEDS),
    }  # fmt: skip
    known = known_runs(case, options.device)
    arms: dict[str, Any] = {
        name: {**asdict(arm), "runs": known.get(name, [])} for name, arm in ARMS.items()
    }
    had = {(name, run["seed"]) for name, arm in arms.items() for run in arm["runs"]}
    pools = [ProcessPoolExecutor(1) for _ in range(PROCESSES)]
    asked = {  # a seed's base model is learned in one process only
        pools[seed % PROCESSES].submit(one_run, name, seed): name
        for seed in SEEDS
        for name in ARMS
        if (name, seed) not in had
    }
    for done in as_completed(asked):
        name, run = asked[done], {"commit": options.provenance["commit"], **done.result()}
        print(f"seed {run['seed']}, {name}: {run['held_out']:.3f}", flush=True)
        arms[name]["runs"] = sorted([*arms[name]["runs"], run], key=lambda r: r["seed"])
        write("reward", options, {"case": case, "compared": compared(arms), "arms": arms})
    for pool in pools:
        pool.shutdown()


if __name__ == "__main__":
    main()
