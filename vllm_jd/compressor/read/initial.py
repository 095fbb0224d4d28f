"""Adapters whose training began by changing the base model's weights, as plain LoRA adapters.

PiSSA and OLoRA begin at factors B₀, A₀ that they take out of a layer's weights W, and train on:
what they mean is W − s·B₀A₀ + s·BA. On the unchanged W that is the LoRA adapter of twice the rank
with s·(BA − B₀A₀), as PEFT's `subtract_mutated_init` makes it from the saved B₀ and A₀. Both follow
from W alone, so that the base model's folder is enough here.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.names import layer_key
from vllm_jd.compressor.read.weights import Adapter
from vllm_jd.store.part import save_tensors

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Initial:
    """What training took from one layer's weights: the first r of `left` · `right` for rank r.

    Args:
        left: float32 `[d_out, R]`.
        right: float32 `[R, d_in]`, R the highest rank that is needed.
        scaled: whether PEFT's scale counts (OLoRA); PiSSA's factors have its inverse in them.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaled: bool

    def given_back(
        self, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of twice the rank, for the unchanged weights.

        Args:
            a: float32 `[r, d_in]`.
            b: float32 `[d_out, r]`, the scale in it.
            scale: PEFT's.
        """
        rank = a.shape[0]
        left = self.left[:, :rank] * (scale if self.scaled else 1.0)
        return torch.cat([a, self.right[:rank]]), torch.cat([b, -left], dim=1)


def initial_of(
    adapters: list[Adapter],
    shapes: dict[str, tuple[int, int]],
    folder: Path | None,
    cache: Path | None,
    on_progress: Callable[[int, int], None],
) -> dict[tuple[str, str], Initial]:
    """What training took from each layer: (starting values, module) → factors.

    The hashes of the adapters that need some become those of their files and of the weights of the
    layers that they adapt, whoever is read beside them.
    In memory at once are one layer's weights, and as much as one adapter of each kind.

    Args:
        adapters: all; those that changed nothing need nothing.
        shapes: module → (d_in, d_out).
        folder: the base model's, with its weights as safetensors.
        cache: a folder in which decompositions are kept: one may take a minute.
        on_progress: called with (layers done, layers).

    Raises:
        AdapterError: the weights are not there, quantised, or of other shapes.
    """
    ranks: dict[tuple[str, str], int] = {}
    for adapter in adapters:
        for module in _changed(adapter):
            key = (module, adapter.init)
            ranks[key] = max(ranks.get(key, 0), adapter.rank(module))
    if not ranks:
        return {}
    assert folder is not None
    weights = _Weights(folder)
    hashes, found = {}, {}
    for done, ((module, init), rank) in enumerate(sorted(ranks.items())):
        on_progress(done, len(ranks))
        weight = weights.read(module, shapes[module])
        numbers = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        hashes[module] = numbers
        kept = None if cache is None else cache / f"{init}-{rank}-{numbers}.safetensors"
        found[init, module] = _kept(kept) or _taken(init, weight, rank)
        if kept is not None and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            taken = found[init, module]
            save_tensors({"left": taken.left, "right": taken.right}, kept)
    on_progress(len(ranks), len(ranks))
    for adapter in adapters:
        if adapter.init:
            layers = "".join(f"{module} {hashes[module]} " for module in sorted(_changed(adapter)))
            both = f"{adapter.sha256} {hashlib.sha256(layers.encode()).hexdigest()}"
            adapter.sha256 = hashlib.sha256(both.encode()).hexdigest()
    return found


def _changed(adapter: Adapter) -> list[str]:
    """The layers whose weights its training changed: of an embedding PEFT changes none."""
    if not adapter.init:
        return []
    return [module for module in adapter.tensors if module not in adapter.embeddings]


def _kept(file: Path | None) -> Initial | None:
    """What an earlier run has kept."""
    if file is None or not file.exists():
        return None
    try:
        tensors = load_file(file)
        return Initial(tensors["left"], tensors["right"], scaled=file.name.startswith("olora"))
    except (OSError, SafetensorError, LookupError):
        file.unlink(missing_ok=True)
        return None


def _taken(init: str, weight: torch.Tensor, rank: int) -> Initial:
    """What PEFT's `pissa_init` and `olora_init` take from weights, by the same steps."""
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = s[:rank].sqrt()
        return Initial(u[:, :rank] * root, root[:, None] * vh[:rank], scaled=False)
    # The first columns of Q are those of the first columns of W; R is what they make of all of W.
    q = torch.linalg.qr(weight[:, :rank]).Q
    return Initial(q, q.T @ weight, scaled=True)


class _Weights:
    """The linear layers' weights in a model's folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._where: dict[str, tuple[Path, str]] = {}  # layer → file, key
        for file in self._files():
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118, it is no dictionary
                        if key.endswith(".weight"):
                            layer = layer_key(key.removesuffix(".weight"))
                            self._where[layer] = (file, key)
            except (OSError, SafetensorError) as error:
                raise AdapterError([f"{file}: cannot be read: {error}"]) from None

    def _files(self) -> list[Path]:
        index = self._folder / _INDEX
        if index.is_file():
            try:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                return [self._folder / name for name in sorted(names)]
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise AdapterError([f"{index}: cannot be read: {error}"]) from None
        files = sorted(self._folder.glob("model*.safetensors"))
        if not files:
            raise AdapterError(
                [
                    f"{self._folder}: found no weights as safetensors, which --convert needs; "
                    "expected the folder of the base model as save_pretrained writes it"
                ]
            )
        return files

    def read(self, module: str, shape: tuple[int, int]) -> torch.Tensor:
        """One layer's weights, float32 `[d_out, d_in]`; `shape` (d_in, d_out)."""
        where = self._where.get(layer_key(module))
        if where is None:
            raise AdapterError(
                [f"{self._folder}: has no weights of {module}, which adapters adapt"]
            )
        file, key = where
        with safe_open(file, "pt") as tensors:
            weight = tensors.get_tensor(key)
        if weight.dtype not in _FLOATS or tuple(weight.shape) != shape[::-1]:
            raise AdapterError(
                [
                    f"{file}: {key} is {weight.dtype} {list(weight.shape)}, expected numbers of "
                    f"16 or 32 bits, {list(shape[::-1])}: the model that the adapters were trained "
                    "on, not quantised"
                ]
            )
        return weight.float()
