"""The fleet's life: adapters that come, go and are compressed while a server runs."""
