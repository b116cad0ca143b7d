"""Copies of the adapter that others keep, such as averages, and that will not fit it once it shrinks."""

import gc
import warnings
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dynlora.lora.components import LoraComponents


def warn_of_outside_copies(
    modules: Sequence[LoraComponents], followers: Sequence[nn.Module] = ()
) -> None:
    """Warn if as many other tensors as the adapter has parameters have their shapes.

    An EMA, a Lookahead optimizer or a snapshot keeps copies that no hook can find; that there are so many
    tensors of these shapes is the only trace of them. Parameters of other models, gradients and the state
    of optimizers do not count.

    Args:
        modules: before they are cut.
        followers: copies of the model that shrink with it.
    """
    shrinking = [m for m in modules if not m.is_dropped and not bool(m.live.all())]
    expected = Counter(tuple(f.parameter.shape) for m in shrinking for f in m.factors)
    if not expected:
        return
    found = Counter(tuple(tensor.shape) for tensor in _copies(followers))
    if all(found[shape] >= count for shape, count in expected.items()):
        warnings.warn(
            f"{expected.total()} tensors outside the model have the shapes of the adapter's parameters, "
            "which shrink now. An average (EMA), a Lookahead optimizer or a snapshot that is combined with "
            "them later will not fit: let a copied model shrink along with "
            "allocator.also_compact(copy), or keep all shapes until the end with compact=False.",
            stacklevel=2,
        )


def _copies(followers: Sequence[nn.Module]) -> list[Tensor]:
    """Tensors that may be copies of parameters."""
    ours = {id(module) for follower in followers for module in follower.modules()}
    things = gc.get_objects()  # asked by type(): isinstance() may run code of theirs
    known: set[int] = set()
    for optimizer in (thing for thing in things if issubclass(type(thing), Optimizer)):
        groups = [optimizer.state.values(), *(s.values() for s in optimizer.state.values())]
        known |= {id(value) for group in groups for value in group}
    known |= {id(thing.grad) for thing in things if type(thing) is nn.Parameter}
    averages = [t for t in things if issubclass(type(t), AveragedModel) and id(t) not in ours]
    plain = [thing for thing in things if type(thing) is Tensor and id(thing) not in known]
    return [*plain, *(p for average in averages for p in average.parameters())]
