"""The three-stage product y += scale ∘ (U · core · V · x) of every adapter, chosen by device."""

import importlib.util
import os
from collections.abc import Callable

import torch

from vllm_jd.kernels import reference
from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.pools import (
    PACKED,
    Int8Rows,
    ModulePools,
)
from vllm_jd.kernels.triton.backend import add_adapters as add_adapters_triton

__all__ = [
    "PACKED",
    "Int8Rows",
    "ModulePools",
    "add_adapters",
    "backend",
    "backend_name",
]


Backend = Callable[..., None]
"""A backend, with the parameters of `add_adapters`; that of Triton also takes `order` (see
`vllm_jd.kernels.triton.backend`)."""
BACKENDS: dict[str, Backend] = {
    "reference": reference.add_adapters,
    "cpu": cpu.add_adapters,
    "triton": add_adapters_triton,  # needs no Triton before it is called
}


def backend_name(device: torch.device | str) -> str:
    """Name of the backend that `add_adapters` uses on `device`: a key of `BACKENDS`.

    The environment variable `VLLM_JD_KERNEL` forces one by name.

    Raises:
        ValueError: `VLLM_JD_KERNEL` names an unknown backend, or one that cannot run on `device`.
        RuntimeError: `VLLM_JD_KERNEL=cpu`, but the kernel could not be built.
        NotImplementedError: the device has no backend.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    forced = os.environ.get("VLLM_JD_KERNEL")
    if forced:
        return _check_forced(forced, kind)
    if kind == "cpu":
        return "cpu" if cpu.is_available() else "reference"
    if kind == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    missing = "Triton is not installed" if kind == "cuda" else "there are kernels for CPU and CUDA"
    raise NotImplementedError(
        f"no kernel for {kind} tensors: {missing}. Serve on CPU, or set VLLM_JD_KERNEL=reference "
        "for the slow torch path"
    )


def backend(device: torch.device | str) -> Backend:
    """The `add_adapters` of `device`, for who calls it often. Raises as `backend_name`."""
    return BACKENDS[backend_name(device)]


def _check_forced(name: str, kind: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"VLLM_JD_KERNEL={name} is unknown; known: {', '.join(BACKENDS)}")
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"VLLM_JD_KERNEL=cpu cannot run on {kind} tensors")
    if name == "cpu" and not cpu.is_available():
        raise RuntimeError("VLLM_JD_KERNEL=cpu, but the kernel could not be built (see the log)")
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if name == "triton" and not (kind == "cuda" or (kind == "cpu" and interpreted)):
        raise ValueError(
            f"VLLM_JD_KERNEL=triton cannot run on {kind} tensors, but on CUDA's; on CPU, for "
            "tests, in Triton's interpreter: set TRITON_INTERPRET=1"
        )
    return name


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor, fan: int = 1
) -> None:
    """Add to each token's output what its adapter contributes; y is changed in place.

    Semantics, shapes and errors: `vllm_jd.kernels.reference.add_adapters`. For each token t of slot
    token_slots[t] >= 0, each slice and each row of rank > 0:

        y[t, slice] += scale ∘ (Uᵀ · core · V · x[t // fan])

    with U and V the row's `rank` basis vectors from u_start and v_start on, its core (full,
    diagonal or none) and its output scale (or none), all as in `ModulePools`.
    """
    backend(x.device)(y, x, pools, token_slots, fan=fan)
