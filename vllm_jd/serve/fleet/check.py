"""Whether an upload can be served, and be compressed later: asked before it is acknowledged."""

from pathlib import Path

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.adapters import method_of, read_for_store
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.store import Store, StoreError

_SHOWN = 5


def check_upload(folder: Path, store: Store) -> None:
    """Check an adapter's files: its config, and every number of its weights. What only the model
    can say, such as the shapes of its layers, the engine says when it loads them.

    Args:
        folder: has them.
        store: of whose base model it must be.

    Raises:
        FleetFault: naming what is wrong with them.
    """
    try:
        collection = read_for_store([folder], store.manifest)
    except AdapterError as error:
        faults = [fault.replace(f"{folder}: ", "") for fault in error.faults]
        more = f" (and {len(faults) - _SHOWN} faults more)" if len(faults) > _SHOWN else ""
        raise FleetFault("; ".join(faults[:_SHOWN]) + more) from None
    except StoreError as error:
        raise FleetFault(str(error)) from None
    if method_of(collection) != "LORA":
        raise FleetFault(
            f"found a {method_of(collection)} adapter, expected a LoRA one: others are served from "
            "a store only (`vllm-jd add`)"
        )
