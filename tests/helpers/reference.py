"""The method written slowly: loops and dense matrices, one function per equation of the paper.

Nothing here is imported from the package. Tests hold the fast path equal to it, with gates and without.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch


@dataclass
class Module:
    """One adapted linear map: frozen W (out, in), A (rank, in), B (out, rank), c (rank,).

    A stock LoRA has no c: its components are bᵢ aᵢᵀ.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor | None
    scaling: float
    ema: list[float] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.ema = [0.0] * self.rank
        self.live = [True] * self.rank

    @property
    def rank(self):
        return len(self.a)

    @property
    def parameters(self):
        return [p for p in (self.a, self.b, self.c) if p is not None]

    @property
    def switch(self):
        """What is 0 where a component is pruned, with the component first."""
        return self.b.T if self.c is None else self.c

    def component(self, i):
        """cᵢ bᵢ aᵢᵀ as a dense matrix (out, in).    [Eq. 6]"""
        outer = torch.outer(self.b[:, i], self.a[i])
        return outer if self.c is None else self.c[i] * outer

    def delta(self):
        """ΔW without scaling: Σᵢ cᵢ bᵢ aᵢᵀ, (out, in).    [Eq. 6]"""
        total = torch.zeros_like(self.weight)
        for i in range(self.rank):
            total = total + self.component(i)
        return total

    def __call__(self, x):
        self.whole = self.weight + self.scaling * self.delta()
        if self.whole.requires_grad:
            self.whole.retain_grad()
        return x @ self.whole.T + self.bias


def norm(matrix):
    return math.sqrt(sum(float(v) ** 2 for v in matrix.detach().flatten()))


def importance(module, kind="share"):
    """What the components of one module are ranked by.

    share: of each component in the Frobenius norm of its module's update.    [Eq. 7]
    norm: of its own part of the update.
    sensitivity: abs(⟨∂L/∂W, s cᵢ bᵢ aᵢᵀ⟩), by how much the loss would change without it.
    """
    if kind == "share":
        whole = norm(module.delta())
        return [norm(module.component(i)) / (whole + 1e-8) for i in range(module.rank)]
    if kind == "norm":
        return [module.scaling * norm(module.component(i)) for i in range(module.rank)]
    parts = [module.scaling * module.component(i).detach() for i in range(module.rank)]
    return [abs(float((module.whole.grad * part).sum())) for part in parts]


def smooth(module, shares, beta):
    """Exponential moving average of the importance.    [Eq. 8]"""
    module.ema = [
        beta * old + (1 - beta) * new for old, new in zip(module.ema, shares, strict=True)
    ]


def budget(step, total, target, start, stop):
    """What may stay after ``step``.    [Eq. 9, as the official code means it]"""
    if step <= start:
        return total
    if step >= stop:
        return target
    progress = Fraction(step - start, stop - start)
    return total - math.floor((total - target) * progress**3)


def select(modules, costs, left, *, revival):
    """Keep the best of all modules by score per cost; ties: earlier module, lower index."""
    everyone = sorted(
        (-module.ema[i] / cost, m, i)
        for m, (module, cost) in enumerate(zip(modules, costs, strict=True))
        for i in range(module.rank)
        if revival or module.live[i]
    )
    chosen = set()
    for _, m, i in everyone:
        if costs[m] <= left:
            chosen.add((m, i))
            left -= costs[m]
    for m, module in enumerate(modules):
        module.live = [(m, i) in chosen for i in range(module.rank)]


def zero_dead(modules):
    """A pruned component's gate is set to 0, A and B stay; without gates its b.    [section 3.3]"""
    with torch.no_grad():
        for module in modules:
            for i, alive in enumerate(module.live):
                if not alive:
                    module.switch[i] = 0.0


def dem(modules):
    """R: mean over components of Var(aᵢ) + Var(bᵢ), unbiased.    [Eq. 10]"""
    total, count = 0.0, 0
    for module in modules:
        for i in range(module.rank):
            for vector in (module.a[i], module.b[:, i]):
                mean = vector.sum() / len(vector)
                total = total + ((vector - mean) ** 2).sum() / (len(vector) - 1)
            count += 1
    return total / count


class Run:
    """Algorithm 1: forward, loss + η·R, backward, optimizer step, score, schedule, prune."""

    def __init__(
        self, modules, *, total_steps, costs, target, lr, beta, eta, interval, window, kind, revival
    ):
        self.modules, self.beta, self.eta, self.interval = modules, beta, eta, interval
        self.costs, self.target, self.kind, self.revival = costs, target, kind, revival
        self.total = sum(c * m.rank for c, m in zip(costs, modules, strict=True))
        self.start, self.stop = (math.floor(share * total_steps) for share in window)
        self.step_count, self.frozen = 0, False
        parameters = [p for m in modules for p in m.parameters]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)

    def forward(self, x):
        for module in self.modules[:-1]:
            x = torch.tanh(module(x))
        return self.modules[-1](x)

    def score(self, *, is_before):
        """Sensitivity is of the weights before the step and their gradient; norms are of those after."""
        if self.frozen or is_before != (self.kind == "sensitivity"):
            return
        for module in self.modules:
            smooth(module, importance(module, self.kind), self.beta)

    def step(self, x, y):
        loss = ((self.forward(x) - y) ** 2).mean()
        total = loss if self.frozen else loss + self.eta * dem(self.modules)
        self.optimizer.zero_grad()
        total.backward()
        self.score(is_before=True)
        self.optimizer.step()
        self.step_count += 1
        self.score(is_before=False)
        if not self.frozen:
            inside = self.start < self.step_count <= self.stop
            on_grid = (self.step_count - self.start) % self.interval == 0
            if inside and (on_grid or self.step_count == self.stop):
                select(self.modules, self.costs, self.budget(), revival=self.revival)
                zero_dead(self.modules)
            self.frozen = self.step_count == self.stop
        if self.frozen or not self.revival:
            zero_dead(self.modules)
        return loss.item()

    def budget(self):
        return budget(self.step_count, self.total, self.target, self.start, self.stop)
