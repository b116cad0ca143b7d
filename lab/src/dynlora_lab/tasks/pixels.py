"""Pictures as arrays to model inputs, without torchvision: size, channels, scale."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns colours to grey


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How a picture becomes an input; saved in the format of transformers' image processors.

    Attributes:
        size: (height, width) of the input.
        channels: 1 (grey) or 3 (red, green, blue).
        mean, std: subtracted and divided by, a channel; of values in 0..1.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any) -> Tensor:
        """Shape (channels, height, width), float32.

        Args:
            image: an array or a Pillow picture of (height, width) or (height, width, channels), with
                1, 3 or 4 channels (the fourth, opacity, is left out), as whole numbers of 0..255 or
                fractions of 0..1.

        Raises:
            ValueError: it has another shape.
        """
        values = torch.from_numpy(np.array(image))
        scaled = values.float() / 255 if not values.is_floating_point() else values.float()
        if scaled.dim() == 2:
            scaled = scaled.unsqueeze(-1)
        if scaled.dim() != 3 or scaled.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"image of shape {tuple(values.shape)}: give (height, width) or (height, width, "
                "channels) with 1, 3 or 4 channels."
            )
        planes = self._channelled(scaled[..., :3].permute(2, 0, 1))  # (channels, height, width)
        if planes.shape[1:] != self.size:
            planes = F.interpolate(
                planes.unsqueeze(0), self.size, mode="bilinear", antialias=True, align_corners=False
            ).squeeze(0)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (planes - mean) / std

    def save_pretrained(self, folder: str | os.PathLike[str], **_options: Any) -> None:
        """Write ``preprocessor_config.json``, which transformers' ViTImageProcessor reads."""
        fields = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        path = Path(folder) / "preprocessor_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf8")

    def _channelled(self, planes: Tensor) -> Tensor:
        if len(planes) == self.channels:
            return planes
        if self.channels == 1:
            return (planes * torch.tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
        return planes.expand(self.channels, -1, -1)


def pixels_for(model: str, config: PreTrainedConfig) -> Pixels:
    """The inputs that ``model`` was trained on; mean and std are 0.5 where it does not say.

    Args:
        model: hub id or folder.
        config: the model's.
    """
    known = _processor_fields(model)
    channels = int(getattr(config, "num_channels", 3))
    mean, std = (
        tuple(float(v) for v in known.get(name) or [0.5] * channels)
        for name in ("image_mean", "image_std")
    )
    return Pixels(size=_pair(config.image_size), channels=channels, mean=mean, std=std)


def _processor_fields(model: str) -> Mapping[str, Any]:
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError:  # a model may come without a processor
        return {}
    return dict(fields)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
