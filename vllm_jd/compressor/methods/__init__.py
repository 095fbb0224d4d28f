"""The compression methods, one file each; `vllm_jd.compressor.methods.registry` lists them."""
