"""A process group whose ranks are threads of this process: real collectives, nothing is started."""

import threading

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

RANKS = 2
WAIT_S = 60  # for all of a test
GRACE_S = 5  # for a rank that is at the end of a collective when another one fails


def on_all_ranks(work):
    """Do ``work(rank)`` on every rank at once; what each has returned, or raised."""
    world, store = _install_threaded_pg(), dist.HashStore()
    found, ended = [None] * RANKS, [threading.Event() for _ in range(RANKS)]

    def rank_of_its_own(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
            found[rank] = work(rank)
        except Exception as error:  # the test looks at it
            found[rank] = error
            ended[rank].set()
            if not all(done.wait(GRACE_S) for r, done in enumerate(ended) if r != rank):
                ProcessLocalGroup.exception_handle(error)  # nobody waits for this rank any more
        except SystemExit:
            found[rank] = TimeoutError(f"rank {rank} waited for one that has failed")
        finally:
            ended[rank].set()
            if world.default_pg is not None:
                dist.destroy_process_group()

    _set_thread_isolation_mode(True)  # a group's name belongs to its thread
    try:
        threads = [
            threading.Thread(target=rank_of_its_own, args=(r,), daemon=True) for r in range(RANKS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    finally:
        _set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
    return found


def returned(found):
    """What the ranks returned; the first error of theirs is raised."""
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found
