"""The method written slowly: loops and dense matrices, one function per equation of the paper.

Nothing here is imported from the package. Tests hold the fast path equal to it.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch


@dataclass
class Module:
    """One adapted linear map: frozen W (out, in), A (rank, in), B (out, rank), c (rank,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    scaling: float
    ema: list[float] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.ema = [0.0] * len(self.c)
        self.live = [True] * len(self.c)

    def component(self, i):
        """cᵢ bᵢ aᵢᵀ as a dense matrix (out, in).    [Eq. 6]"""
        return self.c[i] * torch.outer(self.b[:, i], self.a[i])

    def delta(self):
        """ΔW without scaling: Σᵢ cᵢ bᵢ aᵢᵀ, (out, in).    [Eq. 6]"""
        total = torch.zeros_like(self.weight)
        for i in range(len(self.c)):
            total = total + self.component(i)
        return total

    def __call__(self, x):
        return x @ (self.weight + self.scaling * self.delta()).T + self.bias


def importance(module):
    """Share of each component in the Frobenius norm of its module's update.    [Eq. 7]"""
    whole = math.sqrt(sum(float(v) ** 2 for v in module.delta().detach().flatten()))
    shares = []
    for i in range(len(module.c)):
        norm = math.sqrt(sum(float(v) ** 2 for v in module.component(i).detach().flatten()))
        shares.append(norm / (whole + 1e-8))
    return shares


def smooth(module, shares, beta):
    """Exponential moving average of the importance.    [Eq. 8]"""
    module.ema = [
        beta * old + (1 - beta) * new for old, new in zip(module.ema, shares, strict=True)
    ]


def budget(step, total, target, start, stop):
    """Components that may stay after ``step``.    [Eq. 9, as the official code means it]"""
    if step <= start:
        return total
    if step >= stop:
        return target
    progress = Fraction(step - start, stop - start)
    return total - math.floor((total - target) * progress**3)


def select(modules, keep):
    """Keep the best of all modules; ties: earlier module, lower index."""
    everyone = [
        (-score, m, i) for m, module in enumerate(modules) for i, score in enumerate(module.ema)
    ]
    chosen = {(m, i) for _, m, i in sorted(everyone)[:keep]}
    for m, module in enumerate(modules):
        module.live = [(m, i) in chosen for i in range(len(module.c))]


def zero_dead_gates(modules):
    """A pruned component's gate is set to 0; A and B stay.    [section 3.3]"""
    with torch.no_grad():
        for module in modules:
            for i, alive in enumerate(module.live):
                if not alive:
                    module.c[i] = 0.0


def dem(modules):
    """R: mean over components of Var(aᵢ) + Var(bᵢ), unbiased.    [Eq. 10]"""
    total, count = 0.0, 0
    for module in modules:
        for i in range(len(module.c)):
            for vector in (module.a[i], module.b[:, i]):
                mean = vector.sum() / len(vector)
                total = total + ((vector - mean) ** 2).sum() / (len(vector) - 1)
            count += 1
    return total / count


class Run:
    """Algorithm 1: forward, loss + η·R, backward, optimizer step, score, schedule, prune."""

    def __init__(
        self, modules, *, total_steps, target, lr, beta, eta, interval, window, revival=True
    ):
        self.modules, self.beta, self.eta, self.interval = modules, beta, eta, interval
        self.total = sum(len(m.c) for m in modules)
        self.target, self.revival = target, revival
        self.start, self.stop = (
            math.floor(window[0] * total_steps),
            math.floor(window[1] * total_steps),
        )
        self.step_count, self.frozen = 0, False
        parameters = [p for m in modules for p in (m.a, m.b, m.c)]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)

    def forward(self, x):
        for module in self.modules[:-1]:
            x = torch.tanh(module(x))
        return self.modules[-1](x)

    def step(self, x, y):
        loss = ((self.forward(x) - y) ** 2).mean()
        total = loss if self.frozen else loss + self.eta * dem(self.modules)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.step_count += 1
        if not self.frozen:
            for module in self.modules:
                smooth(module, importance(module), self.beta)
            inside = self.start < self.step_count <= self.stop
            on_grid = (self.step_count - self.start) % self.interval == 0
            if inside and (on_grid or self.step_count == self.stop):
                select(self.modules, self.budget())
                zero_dead_gates(self.modules)
            self.frozen = self.step_count == self.stop
        if self.frozen:
            zero_dead_gates(self.modules)
        return loss.item()

    def budget(self):
        return budget(self.step_count, self.total, self.target, self.start, self.stop)
