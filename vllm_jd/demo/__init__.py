"""`vllm-jd demo`: the real model, real adapters, end to end."""
