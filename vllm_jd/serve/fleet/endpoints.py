"""The fleet's entry point into vLLM's server."""

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from vllm_jd.plugin.api.names import Names, changes_allowed
from vllm_jd.plugin.api.spans import trace_adapters
from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.faults import faults_told
from vllm_jd.serve.fleet import dashboard, life
from vllm_jd.serve.fleet.fault import FleetFault, answer_fault
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.serve.fleet.loading import keep_what_is_loaded
from vllm_jd.serve.fleet.observed import Observed
from vllm_jd.serve.fleet.routes import router
from vllm_jd.serve.fleet.watched import watch
from vllm_jd.serve.server import FLEET
from vllm_jd.serve.tenants.start import guard, start


class FleetEndpoints:
    """A `vllm.endpoint_plugins` entry point; does nothing unless a store is configured. It comes
    after `vllm_jd`, whose endpoints name the store's adapters."""

    name = FLEET
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the fleet's routes, and ask for keys if there are any.

        Raises:
            KeyFileError: the file of keys is broken.
        """
        config = plugin_config(getattr(app.state.args, "additional_config", None))
        if config is not None:
            app.include_router(router)
            app.include_router(life.router)
            app.include_router(dashboard.router)
            app.exception_handler(FleetFault)(answer_fault)
            with faults_told():
                guard(app, config)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take over the fleet as the disk has it, and follow its generations and the folder of
        `--adapter-dir`.

        Raises:
            StoreError: the store or its fleet is damaged.
            ValueError: a name of the fleet is that of another model; or there are keys, and plugins
                of vLLM's that know none.
        """
        config = plugin_config(getattr(args, "additional_config", None))
        if config is None or engine_client is None:
            return
        with faults_told():
            names, updating = Names(engine_client, state), changes_allowed()
            live = LiveFleet(names, config, updating=updating, blends=state.vllm_jd_blends)
            await live.start()
            start(engine_client, state)
        state.vllm_jd_fleet = live
        state.vllm_jd_life = life.Life(live)
        state.vllm_jd_observed = Observed(state.vllm_jd_life, names, state.vllm_jd_residency)
        state.vllm_jd_observing = asyncio.create_task(state.vllm_jd_observed.run())
        state.vllm_jd_living = asyncio.create_task(state.vllm_jd_life.run())
        trace_adapters(engine_client, live.clusters_of)
        if updating:
            keep_what_is_loaded(state, live)
        if config.adapter_dir:
            state.vllm_jd_watch = asyncio.create_task(watch(live, config.adapter_dir))
