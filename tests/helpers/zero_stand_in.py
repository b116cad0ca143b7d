"""DeepSpeed's ZeRO in one process: the functions that dynlora calls, doing what their pages say.

The real one, in two processes, is in allocator/test_distributed.py (``make test-zero``).
"""

import contextlib
from types import SimpleNamespace

import torch
from torch import nn

from small_net import adamw, adapted, allocated, data


class ZeROOptimizer:
    """The base class by which DeepSpeed's optimizers are known."""


class Zero(ZeROOptimizer):
    """Owns fp32 copies of the parameters and their gradients; in stage 3 the model keeps none."""

    def __init__(self, model, *, stage, scale=1.0):
        self.loss_scale, self.overflow = scale, False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [nn.Parameter(p.detach().clone()) for p in self.parameters]
        self.gradients = [None] * len(self.parameters)
        self.inner = adamw(SimpleNamespace(parameters=lambda: self.copies))
        for place, parameter in enumerate(self.parameters):
            parameter.zero, parameter.place = self, place
            if stage == 3:
                parameter.ds_id, parameter.ds_shape = place, parameter.shape
                parameter.part = parameter.detach().clone()
                parameter.data = torch.empty(0)
            else:
                parameter._hp_mapping = place

    def backward(self, loss):
        (self.loss_scale * loss).backward()
        for place, parameter in enumerate(self.parameters):
            self.gradients[place], parameter.grad = parameter.grad, None

    def step(self):
        self.overflow = any(not g.isfinite().all() for g in self.gradients if g is not None)
        if self.overflow:
            return
        for copy, gradient in zip(self.copies, self.gradients, strict=True):
            copy.grad = None if gradient is None else gradient / self.loss_scale
        self.inner.step()
        with GatheredParameters(self.parameters, modifier_rank=0):
            for parameter, copy in zip(self.parameters, self.copies, strict=True):
                parameter.data.copy_(copy.detach())


class DeepSpeedEngine(nn.Module):
    """Around the model, as ``deepspeed.initialize`` gives it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@contextlib.contextmanager
def GatheredParameters(parameters, modifier_rank=None):
    """Whole parameters for a while; what was written to them is kept with ``modifier_rank`` only."""
    spread = [p for p in parameters if hasattr(p, "ds_id")]
    for parameter in spread:
        parameter.data = parameter.part.clone()
    yield
    for parameter in spread:
        if modifier_rank is not None:
            parameter.part = parameter.data.clone()
        parameter.data = torch.empty(0)


def safe_get_full_fp32_param(parameter):
    return parameter.zero.copies[parameter.place].detach().clone()


def safe_set_full_fp32_param(parameter, value):
    parameter.zero.copies[parameter.place].data.copy_(value)


def safe_get_full_grad(parameter):
    return parameter.zero.gradients[parameter.place]


def safe_set_full_grad(parameter, value):
    parameter.zero.gradients[parameter.place] = value.clone()


DEEPSPEED = SimpleNamespace(
    DeepSpeedEngine=DeepSpeedEngine,
    runtime=SimpleNamespace(base_optimizer=SimpleNamespace(ZeROOptimizer=ZeROOptimizer)),
    zero=SimpleNamespace(GatheredParameters=GatheredParameters),
    utils=SimpleNamespace(
        safe_get_full_fp32_param=safe_get_full_fp32_param,
        safe_set_full_fp32_param=safe_set_full_fp32_param,
        safe_get_full_grad=safe_get_full_grad,
        safe_set_full_grad=safe_set_full_grad,
    ),
)


def attached(stage, *, scale=1.0, total_steps=30, **fields):
    """Engine, optimizer and allocator of the small net, ready to train."""
    model = adapted(**fields)
    optimizer, engine = Zero(model, stage=stage, scale=scale), DeepSpeedEngine(model)
    return engine, optimizer, allocated(engine, optimizer, total_steps=total_steps, **fields)


def train(engine, optimizer, steps, *, spoil=None):
    """As ``small_net.train``; the loss of step ``spoil`` is NaN."""
    x, y = data()
    losses = []
    for step in range(steps):
        with GatheredParameters(optimizer.parameters):
            loss = ((engine(x) - y) ** 2).mean()
            optimizer.backward(loss * float("nan") if step == spoil else loss)
        optimizer.step()
        losses.append(loss.item())
    return losses
