"""The Triton backend: CUDA GPUs, or CPU tensors in the interpreter."""
