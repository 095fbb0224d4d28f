"""The compression methods, one file each; `vllm_jd.compressor.registry` lists them."""
