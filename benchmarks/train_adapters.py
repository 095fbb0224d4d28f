"""Train LoRA adapters with PEFT, one for each task of a folder of JSON-lines files.

    python benchmarks/train_adapters.py DATA_DIR --out DIR
    python benchmarks/train_adapters.py DATA_DIR --out DIR --device cuda    # all of them at once

Each line of DATA_DIR/<task>.jsonl is ``{"split": ..., "input": ..., "output": ...}`` with a split
of train, validation or test. An adapter learns to continue ``Input: {input}\\nOutput:`` with
`` {output}`` and the end-of-sequence token; the loss is taken on that continuation alone.

DIR/<name>/ receives the adapter in PEFT's format (bfloat16) and training.json, which tells how it
was made. It appears in one rename when its training is done: run the same command again after an
interruption and only the missing adapters are trained. On a GPU all of them learn side by side
(`together.py`) and appear at the end, together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from task_files import Task, UserError, find_tasks, read_task

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vllm_jd.compressor.choose.examples import Example

ROW_TOKENS = 1024  # of each adapter, that are looked at at once where no gradient is taken
LOSS_SAMPLE = 32  # train instances on which the loss before and after training is reported

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides an adapter's numbers, apart from its task's data."""

    base_model: str
    rank: int
    alpha: float
    target_modules: list[str]
    epochs: int
    max_train: int | None
    learning_rate: float
    batch_tokens: int
    seed: int


# --- model --------------------------------------------------------------------------------------


def load_base(
    model_path: str, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen base model and its tokenizer.

    On a GPU, and on a CPU with AVX512-BF16 or AMX, the weights of the linear layers are held in
    bfloat16 and used under autocast: about 1.8 times faster than float32 on such a CPU. Where the
    CPU would emulate bfloat16, everything stays in float32.

    Args:
        model_path: local folder or Hub name of a causal language model.
        device: where it goes.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the base model {model_path} cannot be loaded: {error}",
            "a local folder or Hub name of a causal language model with its tokenizer",
            "check --model; leave it out for SmolLM2-135M-Instruct",
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {model_path} has no end-of-sequence token",
            "eos_token in its tokenizer_config.json",
            "add it, or choose another --model",
        )
    model.requires_grad_(False)
    if fast_bfloat16(device):
        # Left in float32, these weights would be converted anew at every step. The output layer
        # stays: it is often the embedding itself.
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.to(torch.bfloat16)
    return model.to(device), tokenizer


def fast_bfloat16(device: str) -> bool:
    """Return whether this device multiplies bfloat16 matrices in hardware."""
    import torch

    if device != "cpu":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def attach_lora(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Wrap `model` in a fresh LoRA adapter whose B is zero. ``.unload()`` undoes it.

    Raises:
        UserError: the model has no such module, or its layers are of a type PEFT cannot wrap.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
        }
    )
    missing = sorted(set(settings.target_modules) - set(linear))
    if missing or not settings.target_modules:
        raise UserError(
            f"--target-modules names {', '.join(missing) or 'nothing'}"
            f"{f', which {settings.base_model} lacks' if missing else ''}",
            f"one or more of its linear layers: {', '.join(linear)}",
            "correct --target-modules",
        )
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = settings.base_model
    return peft_model


def batch_loss(peft_model: PeftModel, batch: Sequence[Example]) -> tuple[torch.Tensor, int]:
    """Return the summed negative log-likelihood (nats, float32 scalar) and the target tokens."""

    from vllm_jd.compressor.choose.cores import summed_loss

    with autocast("cpu"):
        loss = summed_loss(peft_model, batch)
    return loss, sum(len(item.completion) for item in batch)


def autocast(device: str) -> torch.autocast:
    """The context in which the model of `load_base` is run."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast_bfloat16(device))


def mean_loss(
    peft_model: PeftModel, instances: Sequence[Example], batch_tokens: int
) -> float | None:
    """Return the mean loss per target token in nats over `instances`, or None without any."""
    import torch

    from vllm_jd.compressor.choose.cores import batches

    if not instances:
        return None
    peft_model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(instances, batch_tokens, None):
            loss, count = batch_loss(peft_model, batch)
            total += loss.item()
            tokens += count
    return total / tokens


# --- training -----------------------------------------------------------------------------------


def train_task(
    task: Task,
    model: PreTrainedModel,
    splits: dict[str, list[Example]],
    settings: Settings,
    out: Path,
    progress: Progress,
    label: str,
) -> dict[str, Any]:
    """Train one adapter, save it as ``out/<task.name>`` and return its training record.

    `model` is left as it was. The progress bar counts optimiser steps and shows a running mean
    of the loss in nats per target token.

    Raises:
        UserError: the training diverged, or a target module does not exist.
    """
    import torch

    started = time.monotonic()
    torch.manual_seed(settings.seed)
    train, schedule = schedule_of(splits, settings)
    validation = splits["validation"]
    bar = progress.add_task(label, total=len(schedule), loss="measuring the base model")
    peft_model = attach_lora(model, settings)
    try:
        before = [
            mean_loss(peft_model, part, settings.batch_tokens)
            for part in (train[:LOSS_SAMPLE], validation)
        ]
        weights = [param for param in peft_model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
        warmup = max(1, len(schedule) // 20)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, (len(schedule) - step) / len(schedule)),
        )
        peft_model.train()
        running: float | None = None
        for step, batch in enumerate(schedule, start=1):
            total, tokens = batch_loss(peft_model, batch)
            loss = total / tokens
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"{task.name}: the loss became {loss.item()} at step {step}",
                    "a finite number",
                    f"lower --learning-rate (now {settings.learning_rate:g})",
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
            progress.update(bar, completed=step, loss=f"loss {running:.3f}")
        progress.update(bar, loss="measuring the adapter")
        # Measured as saved, so that the record tells about the file and not about what it was
        # rounded from.
        with torch.no_grad():
            for param in weights:
                param.copy_(param.bfloat16())
        after = [
            mean_loss(peft_model, part, settings.batch_tokens)
            for part in (train[:LOSS_SAMPLE], validation)
        ]
        seconds = time.monotonic() - started
        record = record_of(task, splits, settings, before, after, seconds)
        save_adapter(peft_model, record, out / task.name)
    finally:
        peft_model.unload()
        progress.remove_task(bar)
    return record


def schedule_of(
    splits: dict[str, list[Example]], settings: Settings
) -> tuple[list[Example], list[list[Example]]]:
    """Return the train instances, and the batches of all epochs in their order."""
    from vllm_jd.compressor.choose.cores import batches

    rng = random.Random(settings.seed)
    train = list(splits["train"])
    rng.shuffle(train)
    train = train[: settings.max_train]
    return train, [
        batch
        for _ in range(settings.epochs)
        for batch in batches(train, settings.batch_tokens, rng)
    ]


def record_of(
    task: Task,
    splits: dict[str, list[Example]],
    settings: Settings,
    before: Sequence[float | None],
    after: Sequence[float | None],
    seconds: float,
) -> dict[str, Any]:
    """Return what training.json says; losses are of train instances and of the validation's."""
    train, schedule = schedule_of(splits, settings)
    return {
        "name": task.name,
        "task": task.path.stem,
        "source": task.source,
        "source_sha256": hashlib.sha256(task.path.read_bytes()).hexdigest(),
        **dataclasses.asdict(settings),
        "train_instances": len(train),
        "validation_instances": len(splits["validation"]),
        "train_loss_before": _rounded(before[0]),
        "train_loss_after": _rounded(after[0]),
        "validation_loss_before": _rounded(before[1]),
        "validation_loss_after": _rounded(after[1]),
        "steps": len(schedule),
        "seconds": round(seconds, 1),
    }


def train_together(
    tasks: Sequence[Task],
    model: PreTrainedModel,
    data: dict[str, dict[str, list[Example]]],
    settings: Settings,
    out: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Train all adapters side by side, save each as ``out/<name>`` and return their records.

    Args:
        tasks: what to train on.
        model: the frozen base model, left as it was.
        data: of each task, by its name.
        settings: of all of them.
        out: folder that receives one folder an adapter.
        progress: a bar counts optimiser steps and shows the mean loss.

    Raises:
        UserError: a training diverged, or a target module does not exist.
    """
    import torch
    from together import lora

    started = time.monotonic()
    torch.manual_seed(settings.seed)
    plans = {task.name: schedule_of(data[task.name], settings) for task in tasks}
    ordered = sorted(tasks, key=lambda task: -len(plans[task.name][1]))
    peft_model = attach_lora(model, settings)
    first = dict(_factors(peft_model))
    peft_model.unload()
    device = str(model.device)
    scale = settings.alpha / settings.rank
    many = lora(model, first, len(ordered), scale, lambda: autocast(device))
    looked_at = (
        [plans[task.name][0][:LOSS_SAMPLE] for task in ordered],
        [data[task.name]["validation"] for task in ordered],
    )
    most = max(ROW_TOKENS, settings.batch_tokens)
    model.eval()
    schedules = [plans[task.name][1] for task in ordered]
    bar = progress.add_task(
        f"{len(ordered)} adapters", total=len(schedules[0]), loss="measuring the base model"
    )
    before = [many.losses(part, most) for part in looked_at]
    for step, losses in enumerate(many.train(schedules, settings.learning_rate), start=1):
        if not losses.isfinite().all():
            which = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{ordered[which].name}: the loss became {losses[which].item()} at step {step}",
                "a finite number",
                f"lower --learning-rate (now {settings.learning_rate:g})",
            )
        progress.update(bar, completed=step, loss=f"loss {losses.mean().item():.3f}")
    progress.update(bar, loss="measuring the adapters")
    many.numbers.copy_(many.numbers.bfloat16())  # as they are saved
    after = [many.losses(part, most) for part in looked_at]
    seconds = (time.monotonic() - started) / len(ordered)
    peft_model = attach_lora(model, settings)
    records = {}
    try:
        for i, task in enumerate(ordered):
            with torch.no_grad():
                factors = dict(zip(first, many.tensors(i), strict=True))
                for name, pair in _factors(peft_model):
                    for own, trained in zip(pair, factors[name], strict=True):
                        own.copy_(trained)
            losses_of = [[of_all[i] for of_all in when] for when in (before, after)]
            splits = data[task.name]
            record = record_of(task, splits, settings, *losses_of, seconds)
            save_adapter(peft_model, record, out / task.name)
            records[task.name] = record
    finally:
        peft_model.unload()
        progress.remove_task(bar)
    return records


def _factors(peft_model: PeftModel) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Each adapted layer's name in the base model, and its A and B."""
    for name, layer in peft_model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            yield name, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def _rounded(loss: float | None) -> float | None:
    return None if loss is None or math.isnan(loss) else round(loss, 4)


def save_adapter(peft_model: PeftModel, record: dict[str, Any], folder: Path) -> None:
    """Write the adapter and its record as `folder`, in one rename."""
    import torch

    # One fixed name beside the target: a killed run's leftover is found and cleared by the next.
    staged = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(staged, ignore_errors=True)
    for name, param in peft_model.named_parameters():
        if "lora_" in name:
            param.data = param.data.to(torch.bfloat16)
    # Only LoRA factors are trained; "auto" would look for the base model on the Hub to decide.
    peft_model.save_pretrained(staged, save_embedding_layers=False)
    (staged / "README.md").unlink(missing_ok=True)  # PEFT's model card, all placeholders
    (staged / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    # safetensors writes files that only their owner can read; a server may be another user.
    for file in staged.iterdir():
        file.chmod(0o644)
    staged.rename(folder)


def finished_record(folder: Path, task: Task, settings: Settings) -> dict[str, Any] | None:
    """Return the training record of an adapter that is already there, or None.

    Raises:
        UserError: the folder holds something else than what this command would make.
    """
    if not folder.exists():
        return None
    remedy = f"choose another --out, or remove {folder} to train it anew"
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is there already, but not as this script leaves it: {error}",
            "a finished adapter with its training.json, or nothing",
            remedy,
        ) from error
    asked = dataclasses.asdict(settings)
    asked["source_sha256"] = hashlib.sha256(task.path.read_bytes()).hexdigest()
    for key, value in asked.items():
        if record.get(key) != value:
            raise UserError(
                f"{folder} was trained with {key} = {record.get(key)!r}",
                f"{key} = {value!r}, as asked for now",
                remedy,
            )
    return record


# --- command ------------------------------------------------------------------------------------


def results_table(records: Sequence[dict[str, Any]]) -> Table:
    """Return a table of validation losses, base model against adapter."""
    table = Table(title="Validation loss (nats per target token)")
    table.add_column("adapter")
    for column in ("rank", "base model", "adapter"):
        table.add_column(column, justify="right")
    for record in records:
        losses = [record["validation_loss_before"], record["validation_loss_after"]]
        shown = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        table.add_row(record["name"], str(record["rank"]), *shown)
    return table


@contextlib.contextmanager
def step_progress() -> Iterator[Progress]:
    """Show a progress bar on stderr; only on a terminal does it move."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        yield progress


@app.command()
def main(
    data_dir: Annotated[
        Path, typer.Argument(metavar="DATA_DIR", help="Folder of JSON-lines files, one a task.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that receives one folder an adapter.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Comma-separated file stems, name=stem to rename; all if left out."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank r.")] = 4,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")] = 8,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated names of linear layers.")
    ] = "q_proj,k_proj,v_proj",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the train split.")] = 3,
    max_train: Annotated[
        int | None, typer.Option(min=1, help="Train instances to use, chosen at random.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="AdamW's peak rate, decaying linearly to 0.")
    ] = 3e-3,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a padded batch, at most.")
    ] = 256,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's choice if left out.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu: one after another; cuda: all of them side by side.")
    ] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of initialisation and shuffling.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Base model, folder or Hub name; SmolLM2-135M-Instruct if left out."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the records as JSON instead of a table.")
    ] = False,
) -> None:
    """Train one LoRA adapter for each task of DATA_DIR; skip those that are already in --out."""
    records: list[dict[str, Any]] = []
    total = 0
    try:
        found = find_tasks(data_dir, tasks)
        total = len(found)
        model_path = model or _default_base()
        settings = Settings(
            base_model=Path(model_path).name if Path(model_path).is_dir() else model_path,
            rank=rank,
            alpha=alpha,
            target_modules=[name for part in target_modules.split(",") if (name := part.strip())],
            epochs=epochs,
            max_train=max_train,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            seed=seed,
        )
        for record in _train_all(found, settings, model_path, out, threads, device):
            records.append(record)
    except UserError as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        err.print(
            f"interrupted: {len(records)} of {total} adapters are finished and kept in {out}; "
            "run the same command again to train the others",
            markup=False,
        )
        raise typer.Exit(130) from interrupt
    if as_json:
        typer.echo(json.dumps({"adapters": records}, indent=1))
    else:
        Console(highlight=False).print(results_table(records))


def _check_device(device: str) -> None:
    import torch

    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {device}", "cpu, or cuda where there is a GPU", "leave it out")


def _default_base() -> str:
    from vllm_jd.demo.smollm2 import BaseModelError, ensure_smollm2

    try:
        return str(ensure_smollm2(echo=lambda line: err.print(line, markup=False)))
    except BaseModelError as error:
        raise UserError(error.found, error.expected, error.remedy) from error


def _train_all(
    tasks: Sequence[Task],
    settings: Settings,
    model_path: str,
    out: Path,
    threads: int | None,
    device: str,
) -> Iterator[dict[str, Any]]:
    # Every folder is looked at before the minutes of training begin.
    done = {task.name: finished_record(out / task.name, task, settings) for task in tasks}
    missing = [task for task in tasks if done[task.name] is None]
    if missing:
        _import_libraries(threads)
        _check_device(device)
        base, tokenizer = load_base(model_path, device)
        limit = getattr(base.config, "max_position_embeddings", None) or sys.maxsize
        # So are all data files, for the same reason.
        data = {task.name: read_task(task.path, tokenizer, limit) for task in missing}
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{out} cannot be made: {error.strerror}", "a folder to write to", "change --out"
            ) from error
    with step_progress() as progress:
        together = {}
        if missing and device != "cpu":
            together = train_together(missing, base, data, settings, out, progress)
        for number, task in enumerate(tasks, start=1):
            place = f"{number} of {len(tasks)}"
            record = done[task.name] or together.get(task.name)
            if record is None:
                record = train_task(
                    task, base, data[task.name], settings, out, progress, f"{task.name} ({place})"
                )
            if done[task.name]:
                what = "finished before, skipped"
            else:
                what = f"{record['steps']} steps in {record['seconds']:.0f} s, validation loss "
                what += f"{record['validation_loss_before']} -> {record['validation_loss_after']}"
            progress.console.print(f"{place}: {task.name}: {what}", markup=False)
            yield record


def _import_libraries(threads: int | None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import peft  # noqa: F401  (imported here so that its absence is reported in one place)
        import torch
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"a library cannot be imported: {error}",
            "torch, transformers and peft",
            'install the demo extra: pip install "vllm-jd[demo]"; if the message names '
            "torchvision, pip uninstall torchvision torchaudio torchcodec",
        ) from error
    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()
