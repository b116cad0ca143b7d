"""A run's outcome as something to look at; takes plain mappings and files, never a model."""

from dynlora.report.rank_map import rank_image

__all__ = ["rank_image"]
