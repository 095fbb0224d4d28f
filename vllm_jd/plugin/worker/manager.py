"""The LoRA manager of a vLLM worker: a thin face to vLLM.

It takes the place of `vllm.lora.worker_manager.LRUCacheWorkerLoRAManager` in the model runner.
Which adapter lies in which slot is decided by the engine (`vllm_jd.plugin.engine.adapters`), which
sends its orders (`carry_out`); a step's tokens come with their slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_supported_lora_modules, process_packed_modules_mapping
from vllm.lora.worker_manager import WorkerLoRAManager

from vllm_jd.kernels import backend_name
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.orders import (
    AlsoAt,
    CloseSource,
    LoadUpload,
    MakeBlend,
    OpenStore,
    Order,
)
from vllm_jd.plugin.engine.residency import Adapter, Basis, Fill
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.placed import slot_of
from vllm_jd.plugin.worker.blends import Blends
from vllm_jd.plugin.worker.compiled import CompiledModel
from vllm_jd.plugin.worker.output import LogitRows
from vllm_jd.plugin.worker.slots import Slots, StoreSource, keeps_codes
from vllm_jd.plugin.worker.step import Step
from vllm_jd.plugin.worker.uploads import FolderLoader, Uploads
from vllm_jd.plugin.worker.wrap import wrap_layers
from vllm_jd.store import Store, check_base_model
from vllm_jd.store.generations import open_number

logger = init_logger("vllm.vllm_jd")


class ResidentLoRAManager(WorkerLoRAManager):
    """Holds the adapters of a store, and PEFT adapters beside them, on one worker."""

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
        _check_embedded(self.store, model_config)
        self._dtype = model_config.dtype
        self._step = Step.make(
            _max_tokens(vllm_config),
            device,
            recorded=vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE,
        )
        self._logit_rows = LogitRows(Step.make(_max_tokens(vllm_config), device))
        self._tables = Tables(self.store)
        self.capacity = capacity_of(
            self.store,
            self._tables,
            config,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_lora_rank=self.lora_config.max_lora_rank,
            in_codes=keeps_codes(self.store, self._dtype),
            fully_sharded=self.lora_config.fully_sharded_loras,
        )

    def create_lora_manager(
        self, model: torch.nn.Module, vllm_config: VllmConfig
    ) -> torch.nn.Module:
        """Wrap the model's linear layers and fill their slots. Returns the model.

        Raises:
            ValueError: the store has modules that the model lacks, or of other shapes.
        """
        self._adapter_manager = _LoaderView(model)
        wrapped = wrap_layers(
            model,
            process_packed_modules_mapping(model),
            self.store,
            self.lora_config,
            self.capacity,
            step=self._step,
            rows=self._logit_rows if _knows_logits(vllm_config) else None,
            # A step's tokens are not all of what is embedded then.
            embeds=not vllm_config.model_config.enable_prompt_embeds,
            dtype=self._dtype,
            device=self.device,
        )
        self.layers = wrapped.layers
        self._compiled = CompiledModel(model)
        slots = self._slots = Slots(
            self.store,
            self._tables,
            list(self.layers.values()),
            self.capacity,
            dtype=self._dtype,
            device=self.device,
        )
        # The engine numbers its sources from 1, and this is the first.
        self._stores: dict[int, StoreSource] = {1: slots.begin()}
        self._uploads = Uploads(
            FolderLoader(model, self.lora_config, self._load_adapter, wrapped.experts),
            list(self.layers.values()),
            wrapped.elsewhere,
            self.lora_config.max_lora_rank,
            max(self.config.max_cpu_loras, self.config.max_loras),
        )
        self._upload_slots: dict[int, dict[str, int]] = {}
        self._blends = Blends(slots, self._stores, self._uploads, self._upload_slots)
        logger.info(
            "vllm-jd: %d compressed adapters, room for %d at once (%.1f MB of cores), store %s "
            "generation %d%s, %s kernel",
            len(self.store),
            self.capacity.cores,
            slots.nbytes / 1e6,
            self.store.path,
            self.store.generation,
            "" if self.capacity.whole else ", bases read when they are needed",
            backend_name(self.device),
        )
        return model

    # --- what the engine asks for ---

    def carry_out(self, orders: list[Order]) -> dict[int, str]:
        """Do what the engine has decided, in this order (`vllm_jd.plugin.engine.orders`)."""
        faults: dict[int, str] = {}
        for places, some in _together(orders):
            try:
                self._do(some)
            except Exception:  # one adapter's failure is not the others', nor the engine's
                for place, order in zip(places, some, strict=True):
                    try:
                        self._do([order])
                    except Exception as error:
                        logger.warning("vllm-jd: %s: %s", order, error)
                        faults[place] = str(error) or type(error).__name__
        return faults

    def _do(self, orders: Sequence[Order]) -> None:
        order = orders[0]
        if isinstance(order, OpenStore):
            store = open_number(Path(order.path), order.generation, verify=False)
            self._stores[order.source] = self._slots.source(store)
        elif isinstance(order, LoadUpload):
            self._uploads.add(*order)
        elif isinstance(order, AlsoAt):
            self._uploads.also_at(*order)
        elif isinstance(order, MakeBlend):
            self._blends.add(order)
        elif isinstance(order, CloseSource):
            self._close(order.source)
        elif isinstance(order.what, Basis):
            self._fill_basis(order.what, order.slot)
        else:
            self._fill_adapters(orders)

    def _fill_basis(self, basis: Basis, slot: int) -> None:
        if basis.source in self._uploads:
            upload = self._uploads.get(basis.source)
            self._slots.fill_upload_basis(upload, basis.side, slot)
            self._upload_slots.setdefault(basis.source, {})[basis.side] = slot
            return
        source = self._stores[basis.source]
        for other in self._stores.values():
            if other is not source:  # `fill_basis` sees to its own
                taken = other.slots[basis.side]
                taken[taken == slot] = -1
        self._slots.fill_basis(source, basis.side, basis.number, slot)

    def _fill_adapters(self, fills: Sequence[Fill]) -> None:
        source = fills[0].what.source
        if source in self._blends:
            for fill in fills:
                self._blends.fill(fill.what, fill.slot, rows_only=fill.rows_only)
            return
        if source in self._uploads:
            for fill in fills:
                upload = self._uploads.get(source)
                self._slots.fill_upload(upload, fill.slot, self._upload_slots[source])
            return
        self._slots.fill_adapters(
            self._stores[source],
            [fill.what.number for fill in fills],
            [fill.slot for fill in fills],
            rows_only=fills[0].rows_only,
        )

    def _close(self, source: int) -> None:
        self._blends.forget(source)
        self._uploads.forget(source)
        self._upload_slots.pop(source, None)
        closed = self._stores.pop(source, None)
        if closed is not None:
            closed.store.close()

    # --- what vLLM calls ---

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Tell all layers which adapter each token of the coming step has.

        The engine has put each adapter's slot into its id. Others are vLLM's own stand-ins in a
        warm-up run: they have no slots, but a CUDA graph that is recorded with them is replayed
        with others, so that the kernels must be in it.
        """
        if mapping is None:
            return
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        slots = [slot_of(request) for request in requests]
        real = [slot for slot in slots if slot is not None]
        token_slots = (ids - 1).astype(np.int32)
        samples = np.asarray(mapping.prompt_mapping, dtype=np.int32) - 1
        if len(real) != len(slots):
            token_slots[:] = samples[:] = -1
            real = []
        self._compiled.run_eagerly(
            self.device.type == "cpu" and bool(real) and bool(self._slots.eager[real].any())
        )
        keys = None if self._step.order is None else self._slots.keys[token_slots]
        self._step.begin(token_slots, keys, active=bool(requests))
        self._logit_rows.begin(token_slots, samples, self._slots.keys)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Nothing is loaded by vLLM's own call: the engine sends orders instead."""
        return False

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
        """The engine decides what goes."""
        return False

    def remove_all_adapters(self) -> None:
        """Called after warm-up, which had no adapters; the engine decides what goes."""

    def pin_adapter(self, adapter_id: int) -> bool:
        """The engine decides what stays."""
        return False

    def list_adapters(self) -> set[int]:
        """None that vLLM's own calls have loaded."""
        return set()


def _together(orders: Sequence[Order]) -> Iterator[tuple[list[int], list[Order]]]:
    """The orders with their places; those that fill core slots from one source side by side."""
    i = 0
    while i < len(orders):
        last = i + 1
        if _is_adapter(orders[i]):
            while last < len(orders) and _is_adapter(orders[last]) and _alike(orders[i : last + 1]):
                last += 1
        yield list(range(i, last)), list(orders[i:last])
        i = last


def _is_adapter(order: Order) -> bool:
    return isinstance(order, Fill) and isinstance(order.what, Adapter)


def _alike(fills: Sequence[Any]) -> bool:
    first, last = fills[0], fills[-1]
    again = any(fill.slot == last.slot for fill in fills[:-1])
    same = first.what.source == last.what.source and first.rows_only == last.rows_only
    return same and not again


def _max_tokens(vllm_config: VllmConfig) -> int:
    scheduler = vllm_config.scheduler_config
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, graphs) + 8


def _knows_logits(vllm_config: VllmConfig) -> bool:
    """Whether it can be told which request each row of logits is of: not where drafts are checked,
    nor where the workers share out the requests."""
    shared = getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False)
    return vllm_config.speculative_config is None and not shared


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


def _check_embedded(store: Store, model_config: Any) -> None:
    """Refuse what the embedding is not given all of a step's tokens with."""
    adapted = [module.name for module in store.manifest.modules if module.embedding]
    if adapted and model_config.enable_prompt_embeds:
        raise ValueError(
            f"found --enable-prompt-embeds, expected none: the store adapts {adapted[0]}, and "
            "which of a step's tokens are looked up in it is not told then. Leave it out"
        )


class _LoaderView(SimpleNamespace):
    """As much of a LoRAModelManager as vLLM's `WorkerLoRAManager._load_adapter` looks at: it reads
    an upload's output layer and embedding, too, and layers as a whole that vLLM has in parts."""

    moe_ep_load_spec = None

    def __init__(self, model: torch.nn.Module):
        super().__init__(
            model=model,
            supported_lora_modules=[*get_supported_lora_modules(model), "lm_head", "embed_tokens"],
            packed_modules_mapping={
                name: [*{*parts, name}]
                for name, parts in process_packed_modules_mapping(model).items()
            },
        )

    def _validate_moe_lora_format(self, lora: LoRAModel) -> None:
        pass

    def _validate_modules_to_save(self, lora: LoRAModel) -> None:
        if lora.modules_to_save:
            raise ValueError(
                f"modules_to_save is {sorted(lora.modules_to_save)}; expected none: vllm-jd "
                "serves adapters of linear layers and of the embedding only"
            )

    def _validate_token_classification_lora(self, lora: LoRAModel) -> None:
        pass

    _validate_classification_head_lora = _validate_modules_to_save  # vLLM 0.33's for these two
