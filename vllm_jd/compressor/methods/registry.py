"""The compression methods by the names of `--method`."""

from vllm_jd.compressor.errors import SettingsError
from vllm_jd.compressor.methods.hydraopt import HYDRAOPT
from vllm_jd.compressor.methods.jd_diag import JD_DIAG
from vllm_jd.compressor.methods.jd_full import JD_FULL
from vllm_jd.compressor.methods.merges import DARE, DARE_TIES, TASK_ARITHMETIC, TIES
from vllm_jd.compressor.methods.method import Method
from vllm_jd.compressor.methods.none import NONE
from vllm_jd.compressor.methods.svd import SVD

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


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        SettingsError: there is none; it lists those that there are.
    """
    if name not in METHODS:
        raise SettingsError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
