"""What Triton and ptxas make of each kernel that ships, for GPUs that need not be there.

Registers of a thread, bytes spilled, shared memory of a program, the widest load of a thread from
global memory, and the instruction that multiplies matrices. Nothing runs: no time is measured.

    python benchmarks/kernels_compiled.py --markdown --out out/kernels_compiled.json
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from kernel_builds import CAPABILITIES, Shipped, shipped
from rich.console import Console
from rich.progress import track

console = Console(stderr=True)
Row = dict[str, str | int | bool]


def compile_one(one: Shipped) -> Row:
    """The figures of one kernel."""
    built = one.build()
    return {
        "configuration": one.config,
        "kernel": one.launch.kernel,
        **{name.lower(): value for name, value in one.launch.constants.items()},
        "chunked": one.chunked,
        "warps": one.launch.num_warps,
        "stages": one.launch.num_stages,
        "dtype": str(one.dtype).removeprefix("torch."),
        "capability": one.capability,
        "registers": built.registers,
        "spilled_bytes": built.spilled_bytes,
        "shared_bytes": built.shared_bytes,
        "widest_load_bytes": built.wide_load_bytes,
        "instruction": built.instruction,
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table of the bfloat16 kernels: a line for each tile, figures for each GPU.

    Lines that differ in whether bases are in 8 bits or cores are codes, or in the number of chunks,
    are one: it shows the largest figure.
    """
    lines: dict[tuple[object, ...], dict[int, list[Row]]] = {}
    for row in rows:
        if row["dtype"] != "bfloat16":
            continue
        block = "×".join(str(row[n]) for n in ("block_m", "block_k", "block_n") if n in row)
        fused = "yes" if row.get("fuse_mix") else ""
        key = (row["configuration"], row["kernel"], row["block_r"], block, fused)
        key += (row["warps"], row["stages"])
        found = lines.setdefault(key, {capability: [] for capability in CAPABILITIES})
        found[int(row["capability"])].append(row)
    titles = ["configuration", "kernel", "vectors", "tile", "cores", "warps", "stages"]
    titles += [f"sm_{capability}" for capability in CAPABILITIES]
    table = [titles, ["---"] * len(titles)]
    for key, found in lines.items():
        cells = [_cell(found[capability]) for capability in CAPABILITIES]
        table.append([*(str(part) for part in key), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _cell(rows: Sequence[Row]) -> str:
    """registers / spilled bytes / KB of shared memory, instruction."""
    registers, spilled, shared = (
        max(int(row[name]) for row in rows)
        for name in ("registers", "spilled_bytes", "shared_bytes")
    )
    instructions = "/".join(sorted({str(row["instruction"]) for row in rows}))
    return f"{registers} / {spilled} / {shared / 1024:.0f} {instructions}"


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs")
    arguments = parser.parse_args()
    ones = shipped()
    rows = [compile_one(one) for one in track(ones, "compiling", console=console, transient=True)]
    report = {
        "date": date.today().isoformat(),
        "triton": version("triton"),
        "kernels": rows,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if arguments.markdown:
        print(markdown(rows))
    elif not arguments.out:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
