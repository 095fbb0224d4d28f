"""The compression methods by the names of `--method`."""

from vllm_jd.compressor.method import Method
from vllm_jd.compressor.methods.jd import JD_FULL
from vllm_jd.compressor.methods.single import NONE, SVD

METHODS: dict[str, Method] = {method.name: method for method in (JD_FULL, SVD, NONE)}
