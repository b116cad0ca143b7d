"""``full`` and ``bitfit``: training the base model's own parameters, all of them or the biases."""

from dynlora_lab.methods.adapted import Adapted, Target, is_in_head, train_only, trainable_beside
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.trained_weights import save_trained


def full(_options: AdapterOptions, target: Target) -> Adapted:
    """Every parameter is trained; the result is a whole model."""
    train_only(target.model, lambda _: True)
    return Adapted(
        model=target.model, parameters=lambda: trainable_beside(target.model, target.head)
    )


def bitfit(_options: AdapterOptions, target: Target) -> Adapted:
    """All biases and the head are trained (Ben Zaken et al., ACL 2022).

    Raises:
        ValueError: the model has no biases.
    """
    model, head = target.model, target.head
    train_only(model, lambda name: name.endswith("bias") or is_in_head(name, head))
    if not trainable_beside(model, head):
        raise ValueError(
            f"method=bitfit trains biases, and {type(model).__name__} has none; choose another method."
        )
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, head),
        save=lambda folder: save_trained(model, folder),
    )
