"""Would one function for q, k and v, which read the same input, save time?

    python benchmarks/shared_input.py [--device cuda]

A trial of something that was not built: three modules of RoBERTa-base's attention, forward and backward, as
three fused functions, as three with one dropout mask, and as one function with one product for all A.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import arguments, interleaved, ratio, write
from torch import Tensor

from dynlora.adapter.fused import GatedLinear, as_factor, keep_mask, masked

WIDTH, RANK, SCALE = 768, 12, 2.0
CASES = [(tokens, dropout) for tokens in (512, 2048) for dropout in (0.0, 0.1)]
FLOOR, SEPARATE, ONE_MASK, ONE_FUNCTION = (
    "floor: no adapter", "three functions", "three functions, one mask", "one function",
)  # fmt: skip


class SharedInput(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + zᵢ (s · cᵢ ⊙ Bᵢ)ᵀ with z = (x ⊙ mask) [A₁; A₂; A₃]ᵀ in one product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, c: Tensor, mask: Any, scale: float, *rest: Any
    ) -> Any:
        """Return every y (tokens, out); ``rest`` is the frozen W, then B, of every module."""
        weights, bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        z = masked(x, mask) @ a.T
        parts = z.split(RANK, dim=1)
        ctx.save_for_backward(x, a, c, z, mask, *rest)
        ctx.scale = scale
        return tuple(
            F.linear(x, w).addmm_(part, (b * (gate * scale)).T)
            for w, b, gate, part in zip(weights, bs, c, parts, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of x, A, c and every B."""
        x, a, c, z, mask, *rest = ctx.saved_tensors
        weights, bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        dz, dc, dbs = torch.empty_like(z), torch.empty_like(c), []
        for i, (dy, part) in enumerate(zip(grads, z.split(RANK, dim=1), strict=True)):
            gain = c[i] * ctx.scale
            g = (part.T @ dy).T
            dbs.append(g * gain)
            dc[i] = (g * bs[i]).sum(0) * ctx.scale
            dz[:, i * RANK : (i + 1) * RANK] = dy @ (bs[i] * gain)
        da = dz.T @ masked(x, mask)
        dx = dz @ a
        if mask is not None:
            dx.mul_(as_factor(mask, dx))
        for dy, weight in zip(grads, weights, strict=True):
            dx.addmm_(dy, weight)
        return dx, da, dc, None, None, *[None] * len(weights), *dbs


def arms(tokens: int, dropout: float, device: str) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    weights = torch.randn(3, WIDTH, WIDTH, device=device).div_(WIDTH**0.5).unbind()
    a, b = torch.randn(3, RANK, WIDTH, device=device), torch.randn(3, WIDTH, RANK, device=device)
    a, b, c = (t.requires_grad_() for t in (a, b, torch.ones(3, RANK, device=device)))
    grads = list(torch.randn(3, tokens, WIDTH, device=device).unbind())

    def drawn() -> tuple[Tensor | None, float]:
        return keep_mask(x, dropout) if dropout else (None, 1.0)

    def separate(*, shared: bool) -> list[Tensor]:
        mask, kept = drawn()
        outputs = []
        for i, weight in enumerate(weights):
            if i and not shared:
                mask, kept = drawn()
            outputs.append(GatedLinear.apply(x, weight, None, a[i], b[i], c[i], SCALE / kept, mask))
        return outputs

    def together() -> list[Tensor]:
        mask, kept = drawn()
        return SharedInput.apply(x, a.flatten(0, 1), c, mask, SCALE / kept, *weights, *b.unbind())

    def timed(forward: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            x.grad = a.grad = b.grad = c.grad = None
            torch.autograd.backward(forward(), grads)

        return work

    if not dropout:  # with it, each draws another mask
        torch.testing.assert_close(list(together()), separate(shared=True), rtol=1e-4, atol=1e-4)
    found = {
        FLOOR: timed(lambda: [F.linear(x, weight) for weight in weights]),
        SEPARATE: timed(lambda: separate(shared=False)),
        ONE_FUNCTION: timed(together),
    }
    return found | ({ONE_MASK: timed(lambda: separate(shared=True))} if dropout else {})


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__ or "")
    cases = []
    for tokens, dropout in CASES:
        work = arms(tokens, dropout, options.device)
        times = interleaved(work, rounds=3 * options.rounds, device=options.device)
        found = {
            name: {"seconds": statistics.median(times[name]), "to_floor": ratio(times, name, FLOOR)}
            for name in work
        }
        cases.append({"case": f"{tokens} tokens, dropout {dropout}", "arms": found})
        print(cases[-1])
    write("shared_input", options, {"cases": cases})


if __name__ == "__main__":
    main()
