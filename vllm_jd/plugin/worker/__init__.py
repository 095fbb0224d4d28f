"""Inside a vLLM worker: the LoRA manager, the layers' pools, and each step's slots."""
