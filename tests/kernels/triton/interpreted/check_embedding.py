"""V · x of an embedding, in Triton's interpreter (see `test_interpreter.py`)."""

import pytest
import torch

from tests.kernels.test_embedding import CASES, check
from vllm_jd.kernels.triton.embedding import look_up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@CASES
def test_it_is_the_tokens_column_of_v(dtype, int8, plain):
    check(look_up, dtype, int8=int8, plain=plain)
