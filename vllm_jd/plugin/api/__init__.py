"""Inside vLLM's API process: endpoints, metrics, and how adapters are named to the engine."""
