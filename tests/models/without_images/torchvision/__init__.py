"""Stands in for torchvision, which has no build for CPUs in the package index: vLLM's models of
families that also see images import it when they are loaded, and use it for images only."""

__version__ = "0.28.0"
