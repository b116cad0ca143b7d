"""RankAllocator and the parts of a run: scores, masks, compaction, checks, resume, record."""

from dynlora.allocator.allocator import RankAllocator

__all__ = ["RankAllocator"]
