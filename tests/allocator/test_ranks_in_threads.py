"""Two ranks in threads of one process: DDP and FSDP2 train what one rank trains.

As processes, started by torchrun and accelerate, they are in test_distributed.py.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

import worker_processes
from dynlora import DynLoraCallback, NotFiniteError, export_lora, finalize_, warm_start_
from dynlora.allocator.processes import (
    DdpFinder,
    any_process,
    broadcast_choice,
    is_first_process,
)
from dynlora.history import read_history
from dynlora.lora.sharding import (
    add_gradient_,
    full_gradient,
    full_shape,
    full_tensor,
    gradient_of,
    scale_all_,
)
from group_of_threads import RANKS, on_all_ranks, returned
from small_net import adamw, adapted, data, small_net, train
from test_distributed import RTOL, single_process

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:.*has both parameters with requires_grad=True and False"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning"),
]
CPU = torch.device("cpu")
RUN = {"target_r": 0.5, "dem_weight": 0.2}  # modules end at rank 0


def models(**fields):
    """A model a rank, all alike; made before the ranks begin, for they share one random state."""
    return [adapted(**fields) for _ in range(RANKS)]


MODES = [
    ("ddp", {}),
    ("fsdp2", {"importance": "share"}),
    ("fsdp2", {}),
    ("fsdp2", {"gated": True}),
]


@pytest.mark.parametrize(("mode", "fields"), MODES, ids=str)
def test_both_ranks_end_where_one_alone_ends(tmp_path, mode, fields):
    fields = {**RUN, **fields}
    made = models(**fields)

    def work(rank):
        allocator, wrapped, losses, _ = worker_processes.trained(mode, made[rank], **fields)
        ranks, stored = allocator.ranks(), [m.rank for m in allocator.modules]
        export_lora(wrapped, tmp_path / str(rank))
        logits = wrapped(data()[0]).detach()
        return losses, ranks, stored, logits

    one, two = returned(on_all_ranks(work))
    expected, alone = single_process(**fields)
    assert one[0] == two[0]
    torch.testing.assert_close(one[0], expected, rtol=RTOL, atol=0)
    assert one[1] == two[1] == alone.ranks()
    assert 0 in one[1].values()
    shrunk = list(one[1].values()) if mode == "ddp" else [4, 4, 4]  # others keep shapes and mask
    assert one[2] == two[2] == shrunk
    assert [(tmp_path / name).exists() for name in "01"] == [True, False]
    loaded = PeftModel.from_pretrained(small_net(), tmp_path / "0")
    torch.testing.assert_close(loaded(data()[0]), one[3], rtol=0, atol=1e-6)


def test_until_the_first_cut_ddp_is_ddp_without_an_allocator_bit_for_bit():
    ends = []
    for mode in ("ddp", "ddp-without"):
        made = models()

        def work(rank, mode=mode, made=made):
            _, _, losses, optimizer = worker_processes.trained(
                mode, made[rank], steps=13, target_r=0.5
            )
            return losses, optimizer.state_dict()["state"]

        found = returned(on_all_ranks(work))
        ends.append([(*f, m.state_dict()) for f, m in zip(found, made, strict=True)])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_gradient_that_is_bad_on_one_rank_stops_both(mode):
    made = models()
    found = on_all_ranks(lambda rank: worker_processes.trained(mode, made[rank], spoil=7, **RUN))
    for error in found:
        assert isinstance(error, NotFiniteError)
        assert str(error).startswith("NaN or infinite gradient at step 8 in ")


def test_fsdp1_is_refused_with_its_successor():
    made = models()
    found = on_all_ranks(lambda rank: worker_processes.trained("fsdp1", made[rank], **RUN))
    for error in found:
        assert isinstance(error, ValueError)
        assert "is wrapped by FullyShardedDataParallel (FSDP1)" in str(error)
        assert "Use FSDP2" in str(error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (finalize_, "Call export_lora(model, folder) on every process"),
        (warm_start_, "call warm_start_ before FSDP or DeepSpeed wraps the model"),
    ],
)
def test_what_would_change_a_sharded_adapter_in_place_is_refused(call, message):
    made = models(gated=call is finalize_)
    found = on_all_ranks(lambda rank: call(worker_processes.fsdp2(made[rank])))
    for error in found:
        assert isinstance(error, ValueError)
        assert "adapter='default' is sharded over several processes" in str(error)
        assert message in str(error)


def test_parts_of_parameters_and_gradients_become_whole_on_every_rank():
    made = models()
    plain = adapted()
    ((plain(data()[0]) - data()[1]) ** 2).mean().backward()
    expected = {n: p for n, p in plain.named_parameters() if "lora_" in n}

    def work(rank):
        wrapped = worker_processes.fsdp2(made[rank])
        ((wrapped(data()[0]) - data()[1]) ** 2).mean().backward()
        shown = {}
        for name, parameter in wrapped.named_parameters():
            if "lora_" not in name:
                continue
            before = full_tensor(parameter).detach().clone()
            part = gradient_of(parameter)
            full = full_gradient(parameter)
            scale_all_([parameter], [torch.full_like(parameter.detach(), 0.5)])
            shown[name] = before, full, full_tensor(parameter).detach(), part.numel()
        return shown

    one, two = returned(on_all_ranks(work))
    assert one.keys() == expected.keys()
    for name, parameter in expected.items():
        for before, full, after, _ in (one[name], two[name]):
            torch.testing.assert_close(before, parameter.detach(), rtol=0, atol=0)
            torch.testing.assert_close(full, parameter.grad, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(after, parameter.detach() / 2, rtol=0, atol=0)
        assert one[name][3] + two[name][3] == parameter.numel()


def test_a_gradient_is_added_to_the_part_that_a_rank_holds_present_or_not():
    made = models()

    def work(rank):
        wrapped = worker_processes.fsdp2(made[rank])
        parameters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
        for parameter in parameters:
            for _ in range(2):
                add_gradient_(parameter, torch.full(full_shape(parameter), 1.5))
        return [full_gradient(p) for p in parameters]

    for full in (g for rank in returned(on_all_ranks(work)) for g in rank):
        assert torch.equal(full, torch.full_like(full, 3.0))


# -- agreeing --------------------------------------------------------------------------------------


def test_the_first_ranks_choice_is_everybodys():
    choices = [torch.tensor([True, False, True]), torch.tensor([False, True, True])]
    found = returned(on_all_ranks(lambda rank: broadcast_choice(choices[rank], CPU).tolist()))
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
        ddp = DistributedDataParallel(made[rank])
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


def test_a_sharded_run_of_trainer_keeps_its_shapes_and_says_how_to_export_it(tmp_path):
    made = models()

    def work(rank):
        model = worker_processes.fsdp2(made[rank])
        optimizer, callback = adamw(model, foreach=False), DynLoraCallback(0.5)
        handler = CallbackHandler([callback], model, None, optimizer, None)
        arguments = SimpleNamespace(
            output_dir=str(tmp_path / str(rank)),
            fp16=False,
            load_best_model_at_end=False,
            save_strategy="no",
            restore_callback_states_from_checkpoint=False,
        )
        state = TrainerState(max_steps=30, is_world_process_zero=rank == 0)
        control = TrainerControl()
        handler.on_train_begin(arguments, state, control)
        for step in range(1, 31):
            train(model, optimizer, 1)
            state.global_step = step
            handler.on_step_end(arguments, state, control)
        handler.on_train_end(arguments, state, control)
        return callback.ranks, callback.allocator.ranks(), dist.get_rank()

    with pytest.warns(UserWarning, match="is sharded .* stay in it as zeros. Call"):
        one, two = returned(on_all_ranks(work))
    assert one[0] == two[0] == one[1]
    assert 0 in one[0].values()
    assert not (tmp_path / "1").exists()
    events = read_history(tmp_path / "0")
    assert events[-1]["event"] == "end"
    assert events[-1]["ranks"] == one[0]
