"""Every private name that ``dynlora._private`` touches is where it is expected."""

import pytest
import torch
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch.nn.modules import conv
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Trainer


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._dynamo, "OptimizedModule"),
        (DistributedDataParallel, "_get_active_ddp_module"),
        (DistributedDataParallel, "_build_params_for_reducer"),
        (DistributedDataParallel, "_build_debug_param_to_name_mapping"),
        (DistributedDataParallel, "_ddp_init_helper"),
        (BaseTunerLayer, "_active_adapter"),
        (conv, "_ConvNd"),
        (tuners_utils, "_get_in_out_features"),
        (PeftType, "_value2member_map_"),
        (PeftType, "_member_names_"),
        (PeftType, "_member_map_"),
        (Trainer, "_prepare_inputs"),
    ],
)
def test_a_private_name_is_still_there(owner, name):
    assert hasattr(owner, name)


def test_torch_wraps_the_step_of_every_optimizer_class():
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # the first instance wraps its class
    step = torch.optim.SGD.step
    assert step.__wrapped__ is not step
    assert step.__code__.co_name == "wrapper"
    assert step.__module__ is not None
    assert step.__globals__["__name__"] == Optimizer.__module__


def test_a_compiled_module_holds_the_original_one():
    linear = torch.nn.Linear(2, 2)
    assert torch.compile(linear, backend="eager")._orig_mod is linear
