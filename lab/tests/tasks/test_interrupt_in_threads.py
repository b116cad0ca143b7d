"""Ctrl-C that only one process hears stops all of them; the processes are threads here."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from dynlora_lab.tasks.interrupt import AGREE_EVERY, Interrupted, StopOnInterrupt
from group_of_threads import RANKS, on_all_ranks, returned

CPU = torch.device("cpu")


def test_ranks_stop_together_at_the_step_that_they_agree_on():
    """Only rank 1 hears of Ctrl-C; both write the checkpoint of the next step that is agreed on."""

    def work(rank):
        stop = StopOnInterrupt()
        if rank == 1:
            stop._on_signal(2, None)
        saved, arguments = [], SimpleNamespace(device=CPU)
        for step in range(1, 2 * AGREE_EVERY):
            state, control = TrainerState(global_step=step), TrainerControl(should_evaluate=True)
            stop.on_step_end(arguments, state, control)
            if control.should_save:
                assert not control.should_evaluate
                saved.append(step)
                with pytest.raises(Interrupted) as caught:
                    stop.on_save(arguments, state, control)
                assert (caught.value.step, caught.value.has_checkpoint) == (step, True)
                break
            stop.on_save(arguments, state, control)  # Trainer's own: no reason to stop
        return saved

    assert returned(on_all_ranks(work)) == [[AGREE_EVERY]] * RANKS
