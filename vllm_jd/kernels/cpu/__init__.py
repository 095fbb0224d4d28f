"""The CPU backend: a fused C++ kernel."""
