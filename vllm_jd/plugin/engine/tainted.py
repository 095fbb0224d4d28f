"""KV blocks in which a request may have left what is no number, on CPU.

vLLM's attention on CPU multiplies by 0 what lies beyond a request in its last block, and 0 times
NaN is NaN: one request that overflowed would reach every later one that is given its blocks. So
blocks of requests whose adapters may overflow are remembered when they are freed, and emptied by
the workers when somebody else is given them. (GPU kernels do not read what lies beyond.)
"""

from typing import Any


class TaintedBlocks:
    """The blocks of one scheduler.

    Args:
        kv_cache_manager: vLLM's, which is made to record the blocks that it gives out.
    """

    def __init__(self, kv_cache_manager: Any):
        self._manager = kv_cache_manager
        self._blocks: set[int] = set()
        for each in kv_cache_manager.coordinator.single_type_managers:
            each._record_new_block_ids = True

    def freed(self, request_id: str) -> None:
        """A request that may have overflowed gives up its blocks."""
        for blocks in self._manager.get_block_ids(request_id):
            self._blocks.update(blocks)

    def to_empty(self) -> list[int] | None:
        """Which of the blocks given out in this step have to be emptied, or None."""
        given = self._manager.take_new_block_ids()
        if not self._blocks:
            return None
        found = [block for block in given if block in self._blocks]
        self._blocks.difference_update(found)
        return found or None
