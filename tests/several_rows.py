"""Stores such as earlier versions made: several rows in a module, clusters of each module alone."""

from dataclasses import replace

import torch

from vllm_jd.compressor.run import compress as run
from vllm_jd.compressor.run.module import Rounding
from vllm_jd.row import CORE_NONE
from vllm_jd.store.part import Matrix, ModulePart

_SHARE = 0.3  # of an adapter's norm


def compress(collection, path, settings, *, own=0, mean=0, by_module=False, **options):
    """`compress`, after which each adapter that is in a cluster has two rows more in every module:
    one of its own of rank `own`, and one of rank `mean` that all share (0: not that one).

    They are random and smaller than the adapters, and no recorded error knows of them.
    `by_module`: other adapters are together in each module.
    """

    def module_map(function, modules):
        parts = (_in_turn(function, at) if by_module else function for at in range(len(modules)))
        for module, made in zip(modules, parts, strict=True):
            part = made(module)
            more = part.shared and (own or mean)
            widths = collection.shapes[module]
            yield _with_rows(part, Rounding.of(settings), widths, own, mean) if more else part

    return run.compress(collection, path, settings, module_map=module_map, **options)


def _in_turn(function, at):
    """Of a module's compression with everyone in the cluster of another."""
    job = function.__self__
    return replace(job, assignment=job.assignment.roll(at)).compress


def _with_rows(part: ModulePart, rounding, widths, own, mean) -> ModulePart:
    """`widths` are (d_in, d_out)."""
    each = part.rows[0, ..., 0].numel()  # experts, or 1
    generator = torch.Generator().manual_seed(1)
    there = part.chosen[:, 0] >= 0
    size = _SHARE * float(part.norm[there].mean()) if bool(there.any()) else 0.0
    u, v, tables, columns = [part.u], [part.v], [part.rows], [part.chosen]
    count = {"u": len(part.u), "v": len(part.v)}
    shared = part.shared
    for rank, owners in ((mean, None), (own, there)):
        if not rank:
            continue
        rows = 1 if owners is None else int(owners.sum())
        for vectors, width, factor in ((v, widths[0], 1.0), (u, widths[1], size / rank)):
            found = torch.randn(rows * each * rank, width, generator=generator)
            found *= factor / found.norm(dim=1, keepdim=True)
            vectors.append(rounding.store(found)[0])
        starts = rank * torch.arange(rows * each).view(rows, each)
        table = torch.stack(
            [
                starts + count["v"],
                starts + count["u"],
                torch.full_like(starts, rank),
                torch.full_like(starts, CORE_NONE),
                torch.full_like(starts, -1),
            ],
            dim=2,
        )
        if owners is not None and part.rows.ndim == 3 and part.cores.steps is None:
            # Of experts that an adapter lacks its cores are zeros, and its row is of rank 0.
            lacks = (part.cores.data[owners].view(rows, each, -1) == 0).all(dim=2)
            table[lacks] = torch.tensor([0, 0, 0, CORE_NONE, -1])
        tables.append(table.view(rows, *part.rows.shape[1:]).int())
        first = sum(map(len, tables[:-1]))
        place = first if owners is None else first + owners.cumsum(0) - 1
        columns.append(torch.where(there, place, -1).int()[:, None])
        shared += owners is None
        count = {side: start + rows * each * rank for side, start in count.items()}
    return ModulePart(
        **vars(part)
        | {
            "u": Matrix.cat(u),
            "v": Matrix.cat(v),
            "rows": torch.cat(tables),
            "chosen": torch.cat(columns, dim=1),
            "shared": shared,
        }
    )
