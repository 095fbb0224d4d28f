"""Read single rows of a generation's pools of basis vectors, file by file."""

import torch
from safetensors import safe_open

from vllm_jd.store.quantise import dequantise
from vllm_jd.store.reader import Store


class BasisShards:
    """The basis files of a generation, and which rows of which pool each of them has.

    A pool is a tensor `<module>.U`, `<module>.V`, `<module>.scales` or `<module>.clusters` of all
    files together; it is the concatenation of what they have, in the order of the manifest.
    """

    def __init__(self, store: Store):
        self._store = store
        self._files = [
            safe_open(store.folder / name, framework="pt") for name in store.manifest.basis_shards
        ]
        self._keys = [set(file.keys()) for file in self._files]

    def spans(self, pool: str) -> list[tuple[int, int, int]]:
        """(file, first row, last row + 1) of each file that has rows of a pool; files are counted
        as in the manifest's `basis_shards`."""
        spans = []
        first = 0
        for i, (file, keys) in enumerate(zip(self._files, self._keys, strict=True)):
            if pool in keys:
                last = first + file.get_slice(pool).get_shape()[0]
                spans.append((i, first, last))
                first = last
        return spans

    def rows(self, pool: str, count: int, width: int) -> torch.Tensor:
        """The first `count` rows of a pool of vectors as they are read: `[count, width]`.

        Of the files, only those bytes are read.
        """
        parts = [torch.empty(0, width, dtype=self._store.dtype)]
        for i, first, last in self.spans(pool):
            if first >= count:
                break
            at = slice(0, min(last, count) - first)
            part = self._files[i].get_slice(pool)[at]
            if f"{pool}.steps" in self._keys[i]:
                steps = self._files[i].get_slice(f"{pool}.steps")[at]
                part = dequantise(part, steps, width).to(self._store.dtype)
            parts.append(part)
        return torch.cat(parts)
