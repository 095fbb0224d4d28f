"""The compression methods by the names of `--method`."""

from vllm_jd.compressor.methods.jd import JD_DIAG, JD_FULL
from vllm_jd.compressor.methods.merging import DARE, DARE_TIES, HYDRAOPT, TASK_ARITHMETIC, TIES
from vllm_jd.compressor.methods.method import Method
from vllm_jd.compressor.methods.single import NONE, SVD

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        JD_FULL,
        JD_DIAG,
        SVD,
        HYDRAOPT,
        TIES,
        TASK_ARITHMETIC,
        DARE,
        DARE_TIES,
        NONE,
    )
}
