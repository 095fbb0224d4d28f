"""Does a store still do what its adapters do: their items asked through vLLM, and compared."""
