"""vLLM's own routes for loading and unloading adapters: what they load is there after a start."""

from typing import Any

from starlette.datastructures import State

from vllm_jd.plugin.api.loading import hand_over_loading
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.serve.fleet.routes import fetched


def keep_what_is_loaded(state: State, live: LiveFleet) -> None:
    """Have a server's `load_lora_adapter` and `unload_lora_adapter` change the fleet."""

    async def load(name: str, source: str, in_place: bool) -> Any:
        try:
            await live.may_change()
            live.check_giveable(name)
            with live.coming() as folder:
                exact = await fetched(live, source, folder, "lora_path")
                await live.check(folder)
                await live.give(name, folder, source=exact, replace=in_place)
        except FleetFault as fault:
            return fault.answer
        return None

    async def unload(name: str) -> Any:
        try:
            await live.may_change()
            await live.delete(name)
        except FleetFault as fault:
            return fault.answer
        return None

    hand_over_loading(state, load, unload, lambda name: name in live.known)
