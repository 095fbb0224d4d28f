"""The paper's smaller studies of what joint diagonalisation finds, on real adapters, by error.

- `random` (Tables 14 and 15): trained adapters, beside them random ones, and ones whose singular
  values are those of the trained ones and whose directions are random. What the first two differ
  by is that trained spectra decay; what is beyond the third, that trained adapters have directions
  in common.
- `convergence` (Table 16): JD-Full stopped after so many iterations, or when the paper's criterion
  (eq. 19) holds.
- `scope` (A.3): clusters of whole adapters, as the compressor finds them, and of every module by
  itself, on a sample of the modules.
- `dial` (HydraOpt): M matrices B from 1 to one an adapter.

All errors are relative squared reconstruction errors ‖BA − B̂Â‖²_F / ‖BA‖²_F, the mean over
adapters and modules. What is in the JSON already is not run again. One command:

    python benchmarks/studies.py ADAPTERS --out out/studies.json
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_jd.compressor import Collection, Settings, read_adapters
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd_full import cores, jd_full, jd_full_clusters
from vllm_jd.compressor.report.summary import sizes
from vllm_jd.compressor.run.clustering import assign_adapters
from vllm_jd.compressor.run.compress import compress

RANKS = (4, 8, 16, 32)
MOST_ITERATIONS = (1, 2, 3, 5, 10, 20, 50, 200)
SCOPES = ((2, 16), (4, 16), (4, 8), (8, 16))  # clusters, rank
STEPS = 100  # of HydraOpt
LOOKS = 10  # modules, evenly spaced, of `random`, `convergence` and `scope`

console = Console(stderr=True)


def main(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapters of one base model.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    base_model: Annotated[str, typer.Option(help="What the adapters' base is called.")] = "base",
    seed: int = 0,
) -> None:
    collection = read_adapters(adapters, base_model=base_model, same_base=True)
    of = {"adapters": len(collection.names), "sources": sorted(collection.source_sha256)}
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if found.get("of") != of:
        found = {"of": of}
    for name, study in STUDIES.items():
        if name in found:
            continue
        start = time.perf_counter()
        with console.status(name):
            found[name] = list(study(collection, seed))
        found[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        found |= {
            "date": date.today().isoformat(),
            "machine": machine.describe(),
            "versions": {of: version(of) for of in ("torch", "vllm-jd")},
            "seed": seed,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    for name in STUDIES:
        show(name, found[name])


def trained_and_random(collection: Collection, seed: int) -> Iterator[dict[str, Any]]:
    """Errors of JD-Full of every rank, on n adapters of three kinds."""
    everyone = len(collection.names)
    counts = sorted({count for count in (4, 8, 16, 32, 64) if count < everyone} | {everyone})
    for n in counts:
        for rank in RANKS:
            errors = {"trained": [], "spectra": [], "random": []}
            for at, module in enumerate(sample(collection)):
                trained = collection.factors(module).subset(torch.arange(n))
                generator = torch.Generator().manual_seed(seed + at)
                kinds = {
                    "trained": trained,
                    "spectra": turned(trained, generator),
                    "random": noise(trained, generator),
                }
                for kind, factors in kinds.items():
                    factors = factors.normalised()[0]
                    bases = jd_full(factors, rank, seed=seed)
                    errors[kind].append(lost(factors, *bases).mean())
            means = {kind: rounded(torch.stack(each).mean()) for kind, each in errors.items()}
            yield {"adapters": n, "rank": rank} | means


def noise(like: ModuleFactors, generator: torch.Generator) -> ModuleFactors:
    """Normal factors of the same ranks."""
    a, b = (torch.randn(rows.shape, generator=generator) for rows in (like.a, like.b))
    return ModuleFactors(a, b, like.ranks)


def turned(like: ModuleFactors, generator: torch.Generator) -> ModuleFactors:
    """Adapters of the same singular values, in random directions."""
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for own in (like.subset(torch.tensor([i])) for i in range(len(like))):
        if not len(own.a):
            pairs.append(None)
            continue
        (left, right) = (torch.linalg.qr(rows.T.double()).R for rows in (own.b, own.a))
        values = torch.linalg.svdvals(left @ right.T).float()
        v, u = (
            torch.linalg.qr(torch.randn(rows.shape[1], len(values), generator=generator)).Q.T
            for rows in (own.a, own.b)
        )
        pairs.append((v, (u * values[:, None]).T))
    return ModuleFactors.stack(pairs, like.d_in, like.d_out)


def convergence(collection: Collection, seed: int) -> Iterator[dict[str, Any]]:
    """The error after at most so many iterations; fewer where eq. 19 holds before."""
    for rank in RANKS:
        for most in MOST_ITERATIONS:
            errors = []
            for module in sample(collection):
                factors = collection.factors(module).normalised()[0]
                bases = jd_full(factors, rank, iterations=most, seed=seed)
                errors.append(lost(factors, *bases).mean())
            yield {
                "rank": rank,
                "most_iterations": most,
                "error": rounded(torch.stack(errors).mean()),
            }


def scopes(collection: Collection, seed: int) -> Iterator[dict[str, Any]]:
    """Clusters of whole adapters, judged by all of the sampled modules, and of each module."""
    modules = [collection.factors(module).normalised()[0] for module in sample(collection)]
    for clusters, rank in SCOPES:
        if clusters > len(collection.names) // 2:
            continue
        together = assign_adapters(modules, clusters, rank, seed=seed)
        errors = {"adapter": [], "module": []}
        for factors in modules:
            alone = assign_adapters([factors], clusters, rank, seed=seed)
            for scope, assignment in (("adapter", together), ("module", alone)):
                bases = jd_full_clusters(
                    factors, assignment, clusters, rank, iterations=10, seed=seed
                )
                each = torch.stack([lost(factors, *pair) for pair in bases], dim=1)
                errors[scope].append(each.gather(1, assignment[:, None]).mean())
        means = {scope: rounded(torch.stack(each).mean()) for scope, each in errors.items()}
        yield {"clusters": clusters, "rank": rank} | means


def dial(collection: Collection, seed: int) -> Iterator[dict[str, Any]]:
    """HydraOpt with few to many matrices B, by size and error."""
    n = len(collection.names)
    for matrices in sorted({1, 2, 4, n // 4, n // 2, 3 * n // 4, n} - {0}):
        settings = Settings(
            method="hydraopt",
            rank=16,
            matrices=matrices,
            distance="frobenius",
            steps=STEPS,
            seed=seed,
        )
        folder = Path(tempfile.mkdtemp())
        try:
            with compress(collection, folder / "store", settings) as store:
                size = sizes(store)
                error = store.error[store.present].double().mean()
        finally:
            shutil.rmtree(folder)
        yield {
            "matrices": matrices,
            "bytes": size.store_bytes,
            "saved": round(size.parameter_saved_ratio, 4),
            "error": rounded(error),
        }


STUDIES = {
    "random": trained_and_random,
    "convergence": convergence,
    "scope": scopes,
    "dial": dial,
}


def sample(collection: Collection) -> list[str]:
    """Modules evenly spaced over the network."""
    modules = list(collection.shapes)
    count = min(LOOKS, len(modules))
    return [modules[int((i + 0.5) * len(modules) / count)] for i in range(count)]


def lost(factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Relative squared errors of normalised adapters with the best cores: `[n]`."""
    kept = cores(factors, u, v).double().square().sum((1, 2))
    return 1 - kept / factors.squared_norms().double().clamp_min(1e-300)


def rounded(value: torch.Tensor) -> float:
    return round(float(value), 4)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table of one study."""
    table = Table(box=box.SIMPLE, title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
