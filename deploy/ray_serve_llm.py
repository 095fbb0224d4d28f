"""Replicas of a server on one store under Ray Serve LLM; docs/operations.md says what was tried.

    STORE=/nfs/store MODEL=BASE RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 \
        serve run deploy.ray_serve_llm:app
"""

import os

from ray.serve.llm import LLMConfig, build_openai_app

from vllm_jd.serve import engine_args

arguments = engine_args(os.environ["STORE"])
ours = arguments["additional_config"]["vllm_jd"]
# A replica that is started later begins with the generation that is live then.
del ours["generation"], ours["manifest_sha256"]
ours["adapter_roots"] = [os.environ["STORE"]]

app = build_openai_app(
    {
        "llm_configs": [
            LLMConfig(
                model_loading_config={"model_id": "base", "model_source": os.environ["MODEL"]},
                accelerator_type=os.environ.get("ACCELERATOR", "H100"),
                engine_kwargs=arguments,
                deployment_config={"num_replicas": 2},
                runtime_env={
                    "env_vars": {
                        # Each replica answers with vLLM's own routes, and ours: not with those of
                        # Ray's ingress, which knows no adapters of a store.
                        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
                        "VLLM_PLUGINS": "vllm_jd,vllm_jd_fleet",
                        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                    }
                },
            )
        ]
    }
)
