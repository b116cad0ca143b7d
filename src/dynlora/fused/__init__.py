"""A faster forward and backward pass for PEFT's LoRA layers over a plain ``nn.Linear``.

``fuse_`` switches it on for the layers of a model, ``unfuse_`` off.
"""

from dynlora.fused.install import fuse_, unfuse_

__all__ = ["fuse_", "unfuse_"]
