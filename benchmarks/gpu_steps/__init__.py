"""The steps of `benchmarks/gpu_first.py`, each a process of its own: `python -m gpu_steps.NAME`.

What they import is there on a bare GPU machine: torch, Triton, transformers, and of this repository
only what needs no more than that.
"""
