"""The vLLM plugin: everything of ours that touches vLLM's internals.

`register` is a `vllm.general_plugins` entry point: vLLM calls it in each of its processes. It
changes nothing unless the engine's `additional_config` names a store (`PluginConfig`).
"""


def register() -> None:
    """Entry point for vLLM. Loading it more than once is harmless."""
    from vllm_jd.plugin.install import install

    install()
