"""vLLM's own routes for loading and unloading adapters, handed to who keeps what they load."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from vllm_jd.plugin.api.adapter_paths import is_address
from vllm_jd.plugin.on_objects import replace_loading
from vllm_jd.store.fleet import UPLOAD_FILES

logger = logging.getLogger("vllm.vllm_jd")

Load = Callable[[str, str, bool], Awaitable[ErrorResponse | None]]
Unload = Callable[[str], Awaitable[ErrorResponse | None]]


def hand_over_loading(
    state: State, load: Load, unload: Unload, is_kept: Callable[[str], bool]
) -> None:
    """Have a server's `load_lora_adapter` and `unload_lora_adapter` ask somebody else.

    Args:
        state: of the server's app, with vLLM's own objects in it.
        load: called with (name, folder or address, whether the name may be there); answers an
            error, or None.
        unload: called with a name; the same.
        is_kept: whether `unload` knows a name; others are unloaded by vLLM.
    """
    models = state.openai_serving_models

    async def load_adapter(
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
        error = await load(request.lora_name, source, request.load_inplace)
        return error or f"Success: LoRA adapter '{request.lora_name}' added successfully."

    async def unload_adapter(before: Any, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        if not is_kept(request.lora_name):
            return await before(request)
        error = await unload(request.lora_name)
        return error or f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    replace_loading(models, load_adapter, unload_adapter)
