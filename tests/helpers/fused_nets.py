"""The small net with a LoRA, fused and as PEFT computes it, and how both are compared."""

import torch
from peft import LoraConfig, get_peft_model

from dynlora.fused import fuse_
from small_net import small_net

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def adapted(dtype=torch.float32, **fields):
    """The small net with a LoRA whose A and B are random; the last of its layers fell to rank 0."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "1", "2"], **fields}
    net = small_net().to(dtype)
    torch.manual_seed(3)
    model = get_peft_model(net, LoraConfig(init_lora_weights=False, **fields)).train()
    if "2" in fields["target_modules"]:
        model.get_base_model().layers[2].delete_adapter("default")
    return model


def pair(**fields):
    """The same adapted net, fused and as PEFT computes it."""
    fused, plain = adapted(**fields), adapted(**fields)
    assert fuse_(fused) == 2
    return fused, plain


def first(model):
    return model.get_base_model().layers[0]


def num_fused(output):
    """Fused functions in the graph behind ``output``."""
    seen, queue, count = set(), [output.grad_fn], 0
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.name() == "LoraLinearBackward"
        queue += [parent for parent, _ in node.next_functions]
    return count


def gradients(model, output):
    model.zero_grad()
    output.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(fused, plain, x, *, count):
    """Outputs, gradients of x and of all parameters agree; ``count`` layers took the fused path."""
    runs = []
    for model in (fused, plain):
        own = x.clone().requires_grad_()
        output = model(own)
        runs.append((output, gradients(model, output), own.grad))
    (actual, *ours), (expected, *theirs) = runs
    assert (num_fused(actual), num_fused(expected)) == (count, 0)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(ours, theirs, **EXACT)
