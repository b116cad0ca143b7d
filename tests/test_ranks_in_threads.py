"""Two ranks in threads of one process: DDP, FSDP1 and FSDP2 train what one rank trains.

As processes, started by torchrun and accelerate, they are in test_distributed.py.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

import worker_processes
from dynlora import DynLoraCallback, RankAllocator, export_lora, finalize_
from dynlora.adapter.sharding import (
    add_gradient_,
    full_gradient,
    full_shape,
    gradient_of,
    scale_all_,
    whole,
)
from dynlora.distributed import DdpFinder, agreed, any_process, is_first_process
from dynlora.history import read_history
from group_of_threads import RANKS, on_all_ranks, returned
from small_net import adamw, adapted, attached, data, small_net, train
from test_distributed import RTOL, single_process

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:.*has both parameters with requires_grad=True and False"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*NO_SHARD.*"),
    pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated"),
]
CPU = torch.device("cpu")
RUN = {"target_r": 1, "dem_weight": 0.2}


def models(**fields):
    """A model a rank, all alike; made before the ranks begin, for they share one random state."""
    return [adapted(**{**RUN, **fields}) for _ in range(RANKS)]


def fsdp1_whole(model):
    """FSDP1 that keeps all of a parameter on every rank."""
    return worker_processes.fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)


@pytest.fixture(autouse=True)
def _one_more_wrapper(monkeypatch):
    monkeypatch.setitem(worker_processes.WRAPPERS, "fsdp1-whole", fsdp1_whole)


MODES = [
    ("ddp", "share", 3),
    ("fsdp2", "share", 12),
    ("fsdp2", "sensitivity", 12),
    ("fsdp1", "sensitivity", 12),
    ("fsdp1-layers", "share", 12),
    ("fsdp1-layers", "sensitivity", 12),
    ("fsdp1-whole", "sensitivity", 12),
]


@pytest.mark.parametrize(("mode", "importance", "stored"), MODES)
def test_both_ranks_end_where_one_alone_ends(tmp_path, mode, importance, stored):
    made = models(importance=importance)

    def work(rank):
        allocator, wrapped, losses = worker_processes.trained(mode, made[rank])
        export_lora(wrapped, tmp_path / str(rank))
        logits = wrapped(data()[0]).detach()
        return losses, allocator.ranks(), sum(m.num_components for m in allocator.layers), logits

    one, two = returned(on_all_ranks(work))
    expected, alone = single_process(importance)
    assert one[0] == two[0]
    torch.testing.assert_close(one[0], expected, rtol=RTOL, atol=0)
    assert one[1] == two[1] == alone.ranks()
    assert one[2] == two[2] == stored  # DDP shrinks, the others keep shapes and mask
    assert [(tmp_path / name).exists() for name in "01"] == [True, False]
    loaded = PeftModel.from_pretrained(small_net(), tmp_path / "0")
    torch.testing.assert_close(loaded(data()[0]), one[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp1-layers"])
def test_a_gradient_that_is_bad_on_one_rank_stops_both(mode):
    made = models()
    found = on_all_ranks(lambda rank: worker_processes.trained(mode, made[rank], spoil=7))
    for error in found:
        assert isinstance(error, FloatingPointError)
        assert str(error).startswith("NaN or infinite gradient at step 8 in ")


def test_fsdp1_without_the_original_parameters_is_refused():
    made = models()
    found = on_all_ranks(lambda rank: worker_processes.trained("fsdp1-flat", made[rank]))
    for error in found:
        assert isinstance(error, ValueError)
        assert "use_orig_params=False) replaces the adapter's parameters" in str(error)
        assert "Pass use_orig_params=True" in str(error)
    one_alone = attached(**RUN)[:2]
    train(*one_alone, 1)  # as if the others, whose gates are views of flat tensors, were not there
    assert [m.training for m in made] == [True] * RANKS


def test_a_sharded_adapter_is_not_finalized_but_exported():
    made = models()
    found = on_all_ranks(lambda rank: finalize_(worker_processes.fsdp2(made[rank])))
    for error in found:
        assert isinstance(error, ValueError)
        assert "adapter='default' is sharded over several processes" in str(error)
        assert "Call export_lora(model, folder) on every process" in str(error)


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1-layers", "fsdp1-whole"])
def test_parts_of_parameters_and_gradients_become_whole_on_every_rank(mode):
    made = models()
    plain = adapted(**RUN)
    ((plain(data()[0]) - data()[1]) ** 2).mean().backward()
    expected = {n: p for n, p in plain.named_parameters() if "lora_" in n and p.requires_grad}

    def work(rank):
        wrapped = worker_processes.WRAPPERS[mode](made[rank])
        allocator = RankAllocator(wrapped, adamw(wrapped, foreach=False), total_steps=30)
        ((wrapped(data()[0]) - data()[1]) ** 2).mean().backward()
        shown = {}
        for gated in allocator.layers:
            for kind, parameter in zip(("A.default.weight", "B.default.weight", "A.default.c"),
                                       gated.parameters, strict=True):  # fmt: skip
                name = f"base_model.model.{gated.name}.lora_{kind}"
                before = whole(parameter).detach().clone()
                part = gradient_of(parameter)
                full = full_gradient(parameter)
                scale_all_([parameter], [torch.full_like(parameter.detach(), 0.5)])
                held = 0 if part is None else part.numel()
                shown[name] = before, full, whole(parameter).detach(), held
        return shown

    one, two = returned(on_all_ranks(work))
    for name, parameter in expected.items():
        for before, full, after, _ in (one[name], two[name]):
            torch.testing.assert_close(before, parameter.detach(), rtol=0, atol=0)
            torch.testing.assert_close(full, parameter.grad, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(after, parameter.detach() / 2, rtol=0, atol=0)
        copies = 2 if mode == "fsdp1-whole" else 1
        assert one[name][3] + two[name][3] == copies * parameter.numel()


def test_a_gradient_is_added_to_the_part_that_a_rank_holds_present_or_not():
    made = models()

    def work(rank):
        wrapped = worker_processes.fsdp1_layers(made[rank])
        allocator = RankAllocator(wrapped, adamw(wrapped, foreach=False), total_steps=30)
        parameters = [p for gated in allocator.layers for p in gated.parameters]
        for parameter in parameters:
            for _ in range(2):
                add_gradient_(parameter, torch.full(full_shape(parameter), 1.5))
        return [full_gradient(p) for p in parameters], [p.grad for p in parameters]

    one, two = returned(on_all_ranks(work))
    for full in (*one[0], *two[0]):
        assert torch.equal(full, torch.full_like(full, 3.0))
    assert None in (*one[1], *two[1])  # a rank without a part of a parameter is given none


# -- agreeing --------------------------------------------------------------------------------------


def test_the_first_ranks_choice_is_everybodys():
    choices = [torch.tensor([True, False, True]), torch.tensor([False, True, True])]
    found = returned(on_all_ranks(lambda rank: agreed(choices[rank]).tolist()))
    assert found == [[True, False, True]] * RANKS


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False)])
def test_a_flag_of_one_rank_is_heard_by_all(flags):
    found = returned(on_all_ranks(lambda rank: any_process(flags[rank], CPU)))
    assert found == [any(flags)] * RANKS


def test_the_first_rank_alone_writes():
    assert returned(on_all_ranks(lambda _rank: is_first_process())) == [True, False]


def test_the_wrapper_of_a_model_that_one_was_given_from_the_inside_is_caught_at_work():
    made, turn = models(), threading.Lock()

    def work(rank):
        finder = DdpFinder(made[rank])
        ddp = DistributedDataParallel(made[rank], broadcast_buffers=False)
        assert finder.ddp is None
        with turn:  # the wrapper that is at work is known by the class, for all threads
            ddp(data()[0])
        assert finder.ddp is ddp
        with turn:
            made[rank](data()[0])
        assert finder.ddp is ddp  # once found is found
        finder.forget()
        return len(made[rank]._forward_pre_hooks), DdpFinder(ddp).ddp is ddp

    assert returned(on_all_ranks(work)) == [(0, True)] * RANKS


# -- Trainer ---------------------------------------------------------------------------------------


def test_a_sharded_run_of_trainer_stays_gated_and_says_how_to_export_it(tmp_path):
    made = models()

    def work(rank):
        model = worker_processes.fsdp2(made[rank])
        optimizer, callback = adamw(model, foreach=False), DynLoraCallback()
        handler = CallbackHandler([callback], model, None, optimizer, None)
        arguments = SimpleNamespace(output_dir=str(tmp_path / str(rank)), fp16=False)
        state = TrainerState(max_steps=30, is_world_process_zero=rank == 0)
        control = TrainerControl()
        handler.on_train_begin(arguments, state, control)
        for step in range(1, 31):
            train(model, optimizer, 1)
            state.global_step = step
            handler.on_step_end(arguments, state, control)
        handler.on_train_end(arguments, state, control)
        return callback.ranks, callback.allocator.ranks(), dist.get_rank()

    with pytest.warns(UserWarning, match="is sharded .* and stays gated. Call export_lora"):
        one, two = returned(on_all_ranks(work))
    assert one[0] == two[0] == one[1]
    assert sum(one[0].values()) == 3
    assert not (tmp_path / "1").exists()
    events = read_history(tmp_path / "0")
    assert events[-1]["event"] == "end"
    assert events[-1]["ranks"] == one[0]
