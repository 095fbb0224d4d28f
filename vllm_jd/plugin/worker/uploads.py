"""Uploaded adapters on one worker: read and checked once, kept in main memory."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.experts import read_experts
from vllm_jd.compressor.read.folder import PICKLED, WEIGHTS_FILES, read_folder
from vllm_jd.compressor.read.peft_config import LoraConfig
from vllm_jd.compressor.read.weights import Adapter, read_tensor
from vllm_jd.plugin.api.requests import upload_digest
from vllm_jd.plugin.worker.expert_names import ExpertNames, expert_module
from vllm_jd.plugin.worker.experts import fit_halves
from vllm_jd.plugin.worker.layer import LayerPools

logger = init_logger("vllm.vllm_jd")


class FolderLoader:
    """Reads an uploaded folder as `vllm-jd compress` does, into vLLM's own object.

    What is taken and what is refused is the same as there (docs/adapters.md), but for pickles,
    which vLLM's own loader takes.

    Args:
        model: the served one, which says what its layers are called in vLLM.
        lora_config: vLLM's.
        stock: vLLM's own loader.
        experts: its layers of experts.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lora_config: LoRAConfig,
        stock: Callable[[LoRARequest], LoRAModel],
        experts: ExpertNames,
    ):
        self._model, self._lora_config, self._stock = model, lora_config, stock
        self._experts = experts

    def __call__(self, request: LoRARequest) -> LoRAModel:
        """The adapter, its scales not yet in its factors.

        Raises:
            ValueError: what is wrong with the folder.
            LoRAAdapterNotFoundError: there is no such folder.
        """
        folder = Path(get_adapter_absolute_path(request.lora_path))
        readable = any((folder / name).exists() for name in WEIGHTS_FILES)
        pickled = any((folder / name).exists() for name in PICKLED)
        if not folder.is_dir() or (pickled and not readable):
            return self._stock(request)
        try:
            adapter, faults = read_folder(folder, request.lora_name)
            if adapter is None or faults:
                raise AdapterError(faults)
            return self._loaded(adapter)
        except AdapterError as error:
            raise ValueError(_told(request.lora_name, error.faults)) from None

    def _loaded(self, adapter: Adapter) -> LoRAModel:
        config = adapter.config
        if not isinstance(config, LoraConfig):
            raise AdapterError(
                [
                    f"a {config.METHOD} adapter, which is served from a store only: add it to one "
                    "(vllm-jd compress, vllm-jd add)"
                ]
            )
        helper = PEFTHelper.from_dict(config.model_dump())
        helper.validate_legal(self._lora_config)
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        # Stacked and left out parameters are of no concern to adapters.
        mapper = None if mapper is None else mapper.get_rename_mapper()
        for note in adapter.notes:
            logger.warning("vllm-jd: adapter %r %s", adapter.name, note)
        loaded = LoRAModel.from_lora_tensors(
            1,
            {
                f"base_model.model.{module}.lora_{side}.weight": read_tensor(adapter, tensor)
                for module, pair in adapter.tensors.items()
                for side, tensor in pair.items()
            },
            helper,
            device="cpu",
            dtype=self._lora_config.lora_dtype,
            weights_mapper=mapper,
            skip_prefixes=getattr(self._model, "lora_skip_prefixes", None),
        )
        for module in adapter.experts:
            self._add_experts(loaded, adapter, module, mapper)
        return loaded

    def _add_experts(self, loaded: LoRAModel, adapter: Adapter, module: str, mapper: Any) -> None:
        """Add what an adapter has of a projection of experts, by the names that layers have."""
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
        found = self._experts.find(name)
        if found is not None:
            name = f"{found[0]}.{found[2]}"
        for expert, pair in enumerate(read_experts(adapter, module)):
            if pair is not None:
                own = expert_module(name, expert)
                a, b = (each.to(self._lora_config.lora_dtype) for each in pair)
                loaded.loras[own] = LoRALayerWeights(own, len(a), len(a), a, b, scaling=1)


class _Known(NamedTuple):
    """An upload: by which name it came first, the digest of its files, and where these lie."""

    name: str
    digest: str
    paths: list[str]


class Uploads:
    """The uploads that a worker knows.

    Args:
        load: reads a PEFT folder, as vLLM does.
        layers: the worker's.
        elsewhere: how names begin that other pipeline stages have.
        max_rank: the highest rank there is room for.
        keep: how many stay in memory; the others' folders are read again when they are needed.
    """

    def __init__(
        self,
        load: Callable[[LoRARequest], LoRAModel],
        layers: Sequence[LayerPools],
        elsewhere: tuple[str, ...],
        max_rank: int,
        keep: int,
    ):
        self._load, self._layers, self._elsewhere = load, layers, elsewhere
        self._max_rank, self._keep = max_rank, keep
        self._known: dict[int, _Known] = {}
        self._loaded: OrderedDict[int, LoRAModel] = OrderedDict()

    def __contains__(self, source: int) -> bool:
        return source in self._known

    def add(self, source: int, name: str, digest: str, path: str) -> None:
        """Read an upload, and check that it can be served.

        Raises:
            ValueError: it cannot; the message says why.
            Exception: whatever vLLM raises of a folder that it cannot read.
        """
        self._loaded[source] = self._read(name, digest, path)
        self._known[source] = _Known(name, digest, [path])
        self._trim()

    def also_at(self, source: int, path: str) -> None:
        """Remember another folder that an upload may be read from."""
        self._known[source].paths.insert(0, path)  # the latest is the likeliest to be there

    def get(self, source: int) -> LoRAModel:
        """Its factors, the scale α/r folded into B.

        Raises:
            ValueError: it has to be read again, and none of its folders has it any more.
        """
        if source not in self._loaded:
            self._loaded[source] = self._read_again(self._known[source])
        self._loaded.move_to_end(source)
        upload = self._loaded[source]
        self._trim()
        return upload

    def forget(self, source: int) -> None:
        """Give up its memory."""
        self._known.pop(source, None)
        self._loaded.pop(source, None)

    def _trim(self) -> None:
        while len(self._loaded) > self._keep:
            self._loaded.popitem(last=False)

    def _read_again(self, known: "_Known") -> LoRAModel:
        faults = []
        for path in known.paths:
            try:
                return self._read(known.name, known.digest, path)
            except Exception as error:  # whatever vLLM raises; another folder may have it
                faults.append(str(error) or type(error).__name__)
        raise ValueError("; ".join(faults))

    def _read(self, name: str, digest: str, path: str) -> LoRAModel:
        upload = self._load(LoRARequest(name, 1, path))
        if upload_digest(Path(get_adapter_absolute_path(path))) != digest:
            raise ValueError(
                f"the files in {path} are not those that were loaded as {name!r}; load them again"
            )
        for lora in upload.loras.values():
            lora.optimize()
        self._split(upload)
        for layer in self._layers:
            fit_halves(upload, layer)
        ranks = {module: lora.rank for module, lora in upload.loras.items()}
        faults = self._faults(upload, ranks)
        if faults:
            raise ValueError(_told(name, faults))
        return upload

    def _split(self, upload: LoRAModel) -> None:
        """Give the modules of a layer their own factors, where an upload adapts it as a whole."""
        for layer in self._layers:
            whole = upload.loras.get(layer.name)
            widths = [d_out for d_out, _ in layer.shapes]
            names = [item.name for item in layer.slices]
            if whole is None or len(names) == 1 or not torch.is_tensor(whole.lora_b):
                continue
            if len(whole.lora_b) != sum(widths):
                continue
            if not any(name in upload.loras for name in names):
                del upload.loras[layer.name]
                for name, b in zip(names, whole.lora_b.split(widths), strict=True):
                    upload.loras[name] = LoRALayerWeights(
                        name, whole.rank, whole.lora_alpha, whole.lora_a, b, scaling=1
                    )

    def _faults(self, upload: LoRAModel, ranks: dict[str, int]) -> list[str]:
        shapes = {
            name: shape
            for layer in self._layers
            for name, shape in zip(layer.names, layer.shapes * layer.each, strict=True)
        }
        unknown = sorted(
            name
            for name in set(upload.loras) - set(shapes)
            if not f"{name}.".startswith(self._elsewhere)
        )
        faults = []
        if unknown:
            faults.append(
                f"it adapts {len(unknown)} modules that cannot be served (such as {unknown[0]}); "
                f"vllm-jd serves adapters of linear layers and of the embedding, and the model has "
                f"{len(shapes)} of those"
            )
            here = any(layer.experts for layer in self._layers)
            if not here and any(".experts." in name for name in unknown):
                faults.append(
                    "uploads that adapt experts are served beside a store that does: start the "
                    "server with one of such adapters"
                )
        for module, lora in sorted(upload.loras.items()):
            if module not in shapes:
                continue
            a, b, rank = lora.lora_a, lora.lora_b, ranks[module]
            if not torch.is_tensor(a) or not torch.is_tensor(b):
                faults.append(f"{module} has factors for experts, which are not served")
                continue
            d_out, d_in = shapes[module]
            found, expected = (tuple(b.shape), tuple(a.shape)), ((d_out, rank), (rank, d_in))
            if found != expected:
                faults.append(
                    f"{module}: found B {list(found[0])} and A {list(found[1])}, expected "
                    f"{list(expected[0])} and {list(expected[1])}: what adapter_config.json (r) "
                    "and the served model say"
                )
            elif rank > self._max_rank:
                faults.append(
                    f"{module}: found rank {rank}, expected {self._max_rank} at most; serve with "
                    f"--max-lora-rank {rank}"
                )
            elif not (a.isfinite().all() and b.isfinite().all()):
                faults.append(f"{module}: found numbers that are NaN or infinite")
        return faults


def _told(name: str, faults: list[str]) -> str:
    more = f" (and {len(faults) - 3} faults more)" if len(faults) > 3 else ""
    return f"adapter {name!r}: " + "; ".join(faults[:3]) + more
