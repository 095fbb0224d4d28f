"""vLLM's own routes for loading and unloading adapters: what they load is there after a start."""

import logging
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from vllm_jd.plugin.api.adapter_paths import is_address
from vllm_jd.plugin.on_objects import replace_loading
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.serve.fleet.routes import fetched
from vllm_jd.store.fleet import UPLOAD_FILES

logger = logging.getLogger("vllm.vllm_jd")


def keep_what_is_loaded(models: OpenAIServingModels, live: LiveFleet) -> None:
    """Have `load_lora_adapter` and `unload_lora_adapter` change the fleet."""

    async def load(
        before: Any, request: LoadLoRAAdapterRequest, base_model_name: str | None
    ) -> ErrorResponse | str:
        # vLLM's own check, and where from: before a byte of it is read.
        refusal = await models._check_load_lora_adapter_request(request)
        if refusal is not None:
            return refusal
        source = request.lora_path
        folder = Path(source).expanduser()
        here = not is_address(source) and folder.is_dir()
        if request.is_3d_lora_weight or (here and not (folder / UPLOAD_FILES[1]).exists()):
            # Weights in another form than a store takes: as in vLLM.
            answer = await before(request, base_model_name)
            if not isinstance(answer, ErrorResponse):
                logger.warning(
                    "vllm-jd: %r has no %s: it is served until this server ends, and not kept",
                    request.lora_name,
                    UPLOAD_FILES[1],
                )
            return answer
        if not here and not is_address(source) and not folder.is_absolute():
            source = f"hf://{source}"  # as vLLM reads a path that is none
        try:
            await _load(live, request.lora_name, source, request.load_inplace)
        except FleetFault as fault:
            return fault.answer
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    async def unload(before: Any, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        if request.lora_name not in live.known:
            return await before(request)
        try:
            await live.may_change()
            await live.delete(request.lora_name)
        except FleetFault as fault:
            return fault.answer
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    replace_loading(models, load, unload)


async def _load(live: LiveFleet, name: str, source: str, in_place: bool) -> None:
    await live.may_change()
    live.check_giveable(name)
    with live.coming() as folder:
        exact = await fetched(live, source, folder, "lora_path")
        await live.check(folder)
        await live.give(name, folder, source=exact, replace=in_place)
