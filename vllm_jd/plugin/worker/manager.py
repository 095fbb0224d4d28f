"""The LoRA manager of a vLLM worker, with compressed adapters resident.

It takes the place of `vllm.lora.worker_manager.LRUCacheWorkerLoRAManager` in the model runner.
Compressed adapters need no loading or activation: a request's name is looked up in the store's
table, and a step's tokens get the adapter's slot (plugin/slots.py). Uncompressed adapters (PEFT
folders) are loaded by vLLM's own code and share a fixed number of places, least recently used out.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import (
    from_layer,
    get_supported_lora_modules,
    is_in_target_modules,
    parse_fine_tuned_lora_name,
    process_packed_modules_mapping,
    replace_submodule,
)
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import supports_multimodal
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_jd.kernels import backend_name
from vllm_jd.plugin.api.requests import is_store_request, is_warmup_request, store_path
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.worker.layer import LayerPools, Slice
from vllm_jd.plugin.worker.sharded import parallel_of
from vllm_jd.plugin.worker.slots import Slots, keeps_codes
from vllm_jd.plugin.worker.step import Step
from vllm_jd.store import check_base_model

logger = init_logger("vllm.vllm_jd")


class ResidentLoRAManager(WorkerLoRAManager):
    """Serves the adapters of a store, and PEFT adapters beside them, on one worker."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        embedding_modules: dict[str, str],
        *,
        config: PluginConfig,
    ):
        super().__init__(vllm_config, device, embedding_modules)
        _check_supported(vllm_config)
        self.config = config
        self.store = config.open_store(verify=not config.verified)
        model_config = vllm_config.model_config
        check_base_model(
            self.store.manifest.base_model,
            model_config.model,
            model_config.hf_config.to_dict(),
            config.store_base_model,
        )
        self._dtype = model_config.dtype
        self._path = store_path(config.store, self.store.generation)
        self._step = Step.make(
            self._max_tokens(vllm_config),
            device,
            recorded=vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
        )
        self._loaded: OrderedDict[str, LoRAModel] = OrderedDict()
        self._loaded_paths: dict[str, str] = {}
        self._places: OrderedDict[str, int] = OrderedDict()
        self._pinned: set[str] = set()
        self._names: dict[int, str] = {}
        self._slot_of_id = np.full(1, -1, dtype=np.int32)  # during one call; between two, all −1
        self._known: dict[int, tuple[LoRARequest, int]] = {}
        """The latest step's compressed adapters by id, and the object that asked for each: most
        steps have the requests of the step before."""
        self._layers: dict[str, LayerPools] = {}
        self._elsewhere: tuple[str, ...] = ()  # how names begin that other pipeline stages have
        self._eager_places: set[int] = set()  # of adapters that the compiled model leaves out
        most = vllm_config.scheduler_config.max_num_seqs
        in_codes = keeps_codes(self.store, self._dtype)
        self._count = config.slots(self.store, at_least=most, in_codes=in_codes)
        if self._count < min(most, len(self.store)):
            raise ValueError(
                f"found {self._count} slots for cores (--core-slots), expected at least "
                f"{most} (--max-num-seqs): so many adapters one step may have"
            )

    def create_lora_manager(
        self, model: torch.nn.Module, vllm_config: VllmConfig
    ) -> torch.nn.Module:
        """Wrap the model's linear layers and fill their pools. Returns the model.

        Raises:
            ValueError: the store has modules that the model lacks, or of other shapes.
        """
        self._adapter_manager = _LoaderView(model)
        columns = self._columns(model)
        packed = self._adapter_manager.packed_modules_mapping
        modules = list(model.named_modules(remove_duplicate=False))
        self._elsewhere = tuple(
            f"{name}." for name, module in modules if isinstance(module, PPMissingLayer)
        )
        prefix = _language_prefix(model)
        known: dict[int, BaseLayerWithLoRA] = {}
        for name, module in modules:
            if not isinstance(module, LinearBase) or not name.startswith(prefix):
                continue
            if id(module) in known:  # the same layer in another place of the model
                replace_submodule(model, name, known[id(module)])
                continue
            if not is_in_target_modules(name, self.lora_config.target_modules, packed):
                continue
            parent, _, last = name.rpartition(".")
            parts = packed.get(last, [])
            wrapped = self._wrap(module, parts, model)
            if not isinstance(wrapped, BaseLayerWithLoRA):
                continue
            full_names = [f"{parent}.{part}" if parent else part for part in parts] or [name]
            if len(full_names) != len(wrapped.output_slices):
                continue  # one weight for several outputs: vLLM cuts it in ways of its own
            slices = [Slice(part, columns.pop(part, None)) for part in full_names]
            layer = LayerPools(
                name,
                wrapped,
                slices,
                self.store,
                max_loras=self.config.max_loras,
                max_rank=self.lora_config.max_lora_rank,
                step=self._step,
                dtype=self._dtype,
                device=self.device,
                sharded=parallel_of(wrapped) if self.lora_config.fully_sharded_loras else None,
            )
            replace_submodule(model, name, wrapped)
            wrapped.set_mapping(layer)
            known[id(module)] = wrapped
            self._layers[name] = layer
        left = [name for name in columns if not name.startswith(self._elsewhere)]
        if left:
            raise ValueError(
                f"the store adapts {len(left)} modules that the served model does not have, or "
                f"that LoRA cannot wrap (such as {left[0]}); it was made for base "
                f"model {self.store.manifest.base_model.name}"
            )
        self._attach()
        # What vLLM compiles, as a step may have to be run without (see LayerPools).
        self._eagerly = False
        self._compiled = [
            part for part in model.modules() if getattr(part, "do_not_compile", True) is False
        ]
        logger.info(
            "vllm-jd: %d compressed adapters, %d of them resident at once (%.1f MB of cores), "
            "store %s generation %d, %s kernel",
            len(self.store),
            self._slots.count,
            self._slots.nbytes / 1e6,
            self.store.path,
            self.store.generation,
            backend_name(self.device),
        )
        return model

    def _wrap(
        self, module: LinearBase, parts: list[str], model: torch.nn.Module
    ) -> torch.nn.Module:
        """vLLM's LoRA layer around a linear one, for 0 adapters, or the layer itself."""
        # vLLM asks where the weight lies. A quantised layer may have packed it away, and left None.
        packed = getattr(module, "weight", module) is None
        if packed:
            module.weight = torch.nn.Parameter(torch.empty(0, device=self.device), False)
        # Its layers for fully sharded adapters ask their punica wrapper for each stage.
        lora_config = copy.copy(self.lora_config)
        lora_config.fully_sharded_loras = False
        try:
            wrapped = from_layer(module, 0, lora_config, parts, model.config)
        finally:
            if packed:
                module.weight = None
        if self.lora_config.fully_sharded_loras and hasattr(wrapped, "_enable_aux_cuda_stream"):
            # As with those: the workers' sends to each other stay on one stream.
            wrapped._enable_aux_cuda_stream = False
        return wrapped

    def _attach(self) -> None:
        """Give all layers their slots."""
        self._slots = Slots(
            self.store,
            [column for layer in self._layers.values() for column in layer.columns],
            [lines for layer in self._layers.values() for lines in layer.lines],
            count=self._count,
            max_loras=self.config.max_loras,
            dtype=self._dtype,
            device=self.device,
        )
        first = 0
        for layer in self._layers.values():
            last = first + len(layer.lines)
            rows = self._slots.rows[:, first:last]
            layer.attach(self._slots.cores, rows, self._slots.core_steps)
            first = last

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Tell all layers which adapter each token of the coming step has."""
        slots = self._slots_of(requests)
        if mapping is None:
            return
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        names, places = list(slots), list(slots.values())
        if max(names, default=0) + 1 >= len(self._slot_of_id):
            self._slot_of_id = np.full(2 * max(names, default=0) + 2, -1, dtype=np.int32)
        self._slot_of_id[names] = places
        # Ids without a request are vLLM's padding and rows of the base model (id 0). The last
        # number is nobody's: larger ids find that one.
        token_slots = self._slot_of_id.take(ids, mode="clip")
        self._slot_of_id[names] = -1
        keys = None if self._step.order is None else self._slots.keys[token_slots]
        # A warm-up run's requests have no slots, but a CUDA graph that is recorded with them is
        # replayed with others: the kernels must be in it.
        self._step.begin(token_slots, keys, active=bool(requests))

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Make an adapter ready; False if nothing was to be done.

        Raises:
            ValueError: a compressed adapter that this generation does not have, or a PEFT
                adapter that cannot be served (the message says why).
        """
        if is_warmup_request(lora_request):
            return True
        self._names[lora_request.lora_int_id] = lora_request.lora_name
        if is_store_request(lora_request):
            self._check_store_request(lora_request)
            return False
        name = lora_request.lora_name
        changed = self._loaded_paths.get(name) != lora_request.lora_path
        if name in self._loaded and not changed and not lora_request.load_inplace:
            self._loaded.move_to_end(name)
            return False
        adapter = self._load_adapter(lora_request)
        self._check_linear(adapter, name)
        self._loaded[name] = adapter
        self._loaded.move_to_end(name)
        self._loaded_paths[name] = lora_request.lora_path
        if name in self._places:
            self._fill(self._places[name], adapter)
        self._forget_oldest()
        return True

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Warm-up needs no adapter: the path costs the same whichever numbers it reads."""
        return False

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing to cache, see `add_dummy_lora`."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Any rank will do, see `add_dummy_lora`."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Adapters of vision towers are not supported."""
        return False

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an uncompressed adapter. A compressed one stays: it costs nothing."""
        name = self._names.pop(adapter_id, None)
        if name is None or name not in self._loaded:
            return False
        self._drop(name)
        return True

    def remove_all_adapters(self) -> None:
        """Forget all uncompressed adapters."""
        for name in list(self._loaded):
            self._drop(name)
        self._names.clear()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keep an uncompressed adapter in its place; compressed ones are always resident."""
        name = self._names.get(adapter_id)
        if name is None:
            return False
        if name in self._loaded:
            self._place(name, in_use=set())
            self._pinned.add(name)
        return True

    def list_adapters(self) -> set[int]:
        """Ids of the adapters that requests have named and that are ready."""
        return {
            lora_id
            for lora_id, name in self._names.items()
            if name in self._loaded or name in self.store
        }

    def _slots_of(self, requests: Iterable[LoRARequest]) -> dict[int, int]:
        """Slot of each request's adapter by its id; uncompressed ones get a place first."""
        adapters: dict[int, int] = {}
        uncompressed = []
        known = self._known
        self._known = {}
        for request in requests:
            lora_id = request.lora_int_id
            found = known.get(lora_id)
            if found is not None and found[0] is request:
                self._known[lora_id] = found
                adapters[lora_id] = found[1]
            elif is_store_request(request):
                adapters[lora_id] = self._check_store_request(request)
                self._known[lora_id] = (request, adapters[lora_id])
            elif not is_warmup_request(request):
                uncompressed.append(request)
        taken = self._slots.take(adapters.values())
        slots = {lora_id: taken[adapter] for lora_id, adapter in adapters.items()}
        in_use = {request.lora_name for request in uncompressed}
        places = set()
        for request in uncompressed:
            self.add_adapter(request)
            place = self._place(request.lora_name, in_use)
            places.add(place)
            slots[request.lora_int_id] = self._slots.count + place
        self._run_eagerly(not places.isdisjoint(self._eager_places))
        return slots

    def _run_eagerly(self, eagerly: bool) -> None:
        if self.device.type == "cpu" and eagerly != self._eagerly:
            self._eagerly = eagerly
            for part in self._compiled:
                part.do_not_compile = eagerly

    def _check_store_request(self, request: LoRARequest) -> int:
        """The adapter's index."""
        if request.lora_path != self._path or request.lora_name not in self.store:
            raise ValueError(
                f"adapter {request.lora_name!r} of {request.lora_path} was asked for, but "
                f"{self._path} is served and has {len(self.store)} adapters"
                + ("" if request.lora_name in self.store else ", none of that name")
            )
        return self.store.index(request.lora_name)

    def _place(self, name: str, in_use: set[str]) -> int:
        """The place of a loaded uncompressed adapter, taken from the least recently used one."""
        if name in self._places:
            self._places.move_to_end(name)
            return self._places[name]
        if len(self._places) < self.config.max_loras:
            place = next(i for i in range(self.config.max_loras) if i not in self._places.values())
        else:
            keep = in_use | self._pinned
            oldest = next((other for other in self._places if other not in keep), None)
            if oldest is None:
                raise RuntimeError(
                    f"{len(keep)} uncompressed adapters are in use or pinned, and there is room "
                    f"for {self.config.max_loras} (--max-loras)"
                )
            place = self._places.pop(oldest)
        self._fill(place, self._loaded[name])
        self._places[name] = place
        return place

    def _fill(self, place: int, adapter: LoRAModel) -> None:
        for layer in self._layers.values():
            layer.set_adapter(
                place,
                [
                    None
                    if (found := adapter.get_lora(item.name)) is None
                    else (found.lora_a, found.lora_b)
                    for item in layer.slices
                ],
            )
        others = (layer for layer in self._layers.values() if not layer.adapted)
        if any(adapter.get_lora(item.name) for layer in others for item in layer.slices):
            self._eager_places.add(place)
        else:
            self._eager_places.discard(place)

    def _drop(self, name: str) -> None:
        del self._loaded[name]
        del self._loaded_paths[name]
        self._pinned.discard(name)
        place = self._places.pop(name, None)
        if place is not None:
            self._eager_places.discard(place)
            for layer in self._layers.values():
                layer.clear_adapter(place)

    def _forget_oldest(self) -> None:
        """Keep at most `max_cpu_loras` adapters loaded, of those that hold no place."""
        spare = [name for name in self._loaded if name not in self._places]
        for name in spare[: max(0, len(self._loaded) - self.config.max_cpu_loras)]:
            if name != next(reversed(self._loaded)):
                del self._loaded[name]
                del self._loaded_paths[name]

    def _check_linear(self, adapter: LoRAModel, name: str) -> None:
        for lora in adapter.loras.values():
            lora.optimize()
        known = {item.name for layer in self._layers.values() for item in layer.slices}
        unknown = sorted(
            name for name in set(adapter.loras) - known if not name.startswith(self._elsewhere)
        )
        if unknown:
            raise ValueError(
                f"adapter {name!r} adapts {len(unknown)} modules that cannot be served (such as "
                f"{unknown[0]}); vllm-jd serves adapters of linear layers, and the model has "
                f"{len(known)} of those"
            )

    def _columns(self, model: torch.nn.Module) -> dict[str, int]:
        """vLLM's name of each of the store's modules → its column."""
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is not None:
            mapper = mapper.get_rename_mapper()
        return {
            parse_fine_tuned_lora_name(f"base_model.model.{module.name}.lora_A.weight", mapper)[
                0
            ]: i
            for i, module in enumerate(self.store.manifest.modules)
        }

    @staticmethod
    def _max_tokens(vllm_config: VllmConfig) -> int:
        scheduler = vllm_config.scheduler_config
        graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, graphs) + 8


def _check_supported(vllm_config: VllmConfig) -> None:
    """Refuse settings under which answers would be wrong; warn of those that gain nothing."""
    lora_config = vllm_config.lora_config
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "found dual batch overlap (--enable-dbo or --ubatch-size), expected none: the parts of "
            "a batch would all get the adapters of its first tokens. Leave it out"
        )
    if lora_config.specialize_active_lora:
        logger.warning(
            "--specialize-active-lora records a CUDA graph for each of many numbers of adapters; "
            "vllm-jd needs one for all of them. Leave it out for a faster start and more memory"
        )


def _language_prefix(model: torch.nn.Module) -> str:
    """How the names of the language model's layers begin: the others see other tokens than those
    that have adapters."""
    if supports_multimodal(model) and hasattr(model, "get_mm_mapping"):
        return model.get_mm_mapping().language_model[0]
    return ""


class _LoaderView(SimpleNamespace):
    """As much of a LoRAModelManager as vLLM's `WorkerLoRAManager._load_adapter` looks at."""

    moe_ep_load_spec = None

    def __init__(self, model: torch.nn.Module):
        super().__init__(
            model=model,
            supported_lora_modules=get_supported_lora_modules(model),
            packed_modules_mapping=process_packed_modules_mapping(model),
        )

    def _validate_moe_lora_format(self, lora: LoRAModel) -> None:
        pass

    def _validate_modules_to_save(self, lora: LoRAModel) -> None:
        if lora.modules_to_save:
            raise ValueError(
                f"modules_to_save is {sorted(lora.modules_to_save)}; expected none: vllm-jd "
                "serves adapters of linear layers only"
            )

    def _validate_token_classification_lora(self, lora: LoRAModel) -> None:
        pass

    _validate_classification_head_lora = _validate_modules_to_save  # vLLM 0.33's for these two
