"""What `vllm-jd serve` and the plugin's configuration take where nobody says otherwise.

Plain values, so that the command's help needs no other module.
"""

MAX_LORAS, MAX_CPU_LORAS = 8, 64
MAX_BLEND = 8
"""Adapters that one request may blend."""

RECOMPRESS_COUNT, RECOMPRESS_AGE = 32, 900
"""Uploads that wait, and seconds that the oldest of them has waited."""
RECOMPRESS_THREADS, RECOMPRESS_DEVICE = 1, "cpu"
