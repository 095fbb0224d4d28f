"""Train an adapter in the bases that a store has: a core for each module, and nothing else.

As LoRA-XS (Bałazy et al., 2405.17604) does in the singular vectors of the base model's weights,
here in a cluster's U and V, which other adapters have shaped: y += U Σ Vᵀ x, in which Σ alone is
trained, from 0. What comes out is an adapter of that cluster as any other, and nothing of it is
lost to compression.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_jd.compressor.change.export import embeddings_of, write_lora
from vllm_jd.compressor.change.incremental import add
from vllm_jd.compressor.change.uploads import bases_digest
from vllm_jd.compressor.choose.cores import Cores, batches, length, mean_loss, summed_loss
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import layers_of
from vllm_jd.compressor.errors import CompressorError
from vllm_jd.compressor.read.adapters import read_for_store
from vllm_jd.row import CORE_KIND, CORE_NONE
from vllm_jd.store import Store, StoreError
from vllm_jd.store.uploads import Incoming, Writer

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, done, total)."""

_CLIP = 1.0
_WARM_UP = 0.05  # of the steps
_LOOK = 8  # batches by which a cluster is chosen
_AT_ONCE = 1 << 27  # numbers that clusters' cores and activations take in one look
_SIZED = 256  # adapters whose cores are measured
_WAIT = 10.0  # seconds for a server's change


class TrainError(CompressorError):
    """A store that has no cores to train, or training that came to nothing."""


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        epochs: passes over the examples.
        learning_rate: Adam's at its peak, as a share of what the numbers of the cluster's cores
            are in the root mean square; it rises for a twentieth of the steps, then falls to 0.
        batch_tokens: of a padded batch, at most; an example that is longer is one by itself.
        held_out: share of the examples that are not trained on; the epoch that does best on them
            is kept.
        seed: of the choice of these and of the order.
    """

    epochs: int = 3
    learning_rate: float = 0.5
    batch_tokens: int = 256
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """Cores that were trained, and what it came to.

    Args:
        factors: module → (B = U·Σ `[d_out, r]`, A = Vᵀ `[r, d_in]`), float32.
        bases: `bases_digest` of the store whose bases they are for.
        cluster: whose bases these are.
        numbers: how many were trained.
        steps: of the optimiser.
        epoch: after which they were kept, from 1.
        before: mean loss of a token on the base model, in nats.
        after: the same with the adapter.
        judged: examples that these losses are of.
        held_out: whether these are others than the ones it was trained on.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    bases: str
    cluster: int
    numbers: int
    steps: int
    epoch: int
    before: float
    after: float
    judged: int
    held_out: bool


def train_core(
    store: Store,
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    training: Training | None = None,
    cluster: int | None = None,
    kept: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Trained:
    """Train cores on examples.

    Args:
        store: whose bases they are for.
        model: transformers' base model, on the device to train on; it is as it was afterwards.
        examples: of the task.
        training: how; default: `Training()`.
        cluster: in whose bases; None: those along which the loss falls most steeply.
        kept: a file in which every finished epoch is kept, so that the same call goes on there
            after a stop, or gives out once more what was trained; the caller's to delete.
        on_progress: see `Progress`.

    Raises:
        TrainError: the store's adapters have no cores, there is no such cluster, too few examples,
            or the loss became infinite.
        ModelError: the model lacks a module of the store.
    """
    training = training or Training()
    clusters = _clusters(store)
    if cluster is not None and not 0 <= cluster < clusters:
        raise TrainError(
            f"found no cluster {cluster} in {store.path}; expected 0 to {clusters - 1}, or none: "
            "the one that suits best is chosen then"
        )
    parts, judged = _parted(examples, training)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = layers_of(store, model)
    if cluster is None:
        cluster = _steepest(store, layers, model, parts, clusters, training, on_progress)
    with Cores(store, layers, [cluster]).installed() as cores:
        before = mean_loss(model, judged, training.batch_tokens)
        run = _Run(store, model, cores, cluster, parts, judged, training, kept)
        epoch, after = run.to_the_end(on_progress)
    return Trained(
        factors=cores.factors(),
        bases=bases_digest(store),
        cluster=cluster,
        numbers=sum(core.numel() for core in cores.values),
        steps=run.steps,
        epoch=epoch,
        before=before,
        after=after,
        judged=len(judged),
        held_out=judged is not parts,
    )


def add_trained(path: Path, trained: Trained, name: str, *, replace: bool = False) -> Store:
    """Give an adapter of these cores a place in the store: a new generation.

    As a LoRA adapter it becomes an upload of the store, which bases can be fitted anew to.

    Args:
        path: the store.
        trained: the cores.
        name: what the adapter is called.
        replace: an adapter of that name gives way.

    Raises:
        TrainError: the store's bases were fitted anew since.
        StoreError, AdapterError: see `vllm_jd.compressor.change.incremental.add`.
    """
    with Store.open(path, verify=False) as store:
        manifest, embeddings = store.manifest, embeddings_of(store)
        if bases_digest(store) != trained.bases:
            raise TrainError(
                f"{path}: its bases were fitted anew while {name} was trained in those that it "
                "had; train it again"
            )
    try:
        with closing(Incoming(path)) as incoming:
            folder = incoming.folder()
            write_lora(folder, trained.factors, manifest.base_model.name, embeddings)
            alone = read_for_store([folder], manifest)
            added = add(path, alone.renamed([(alone.names[0], name)]), replace=replace)
            # Only now: an upload that no generation was made from would be cleared away.
            with closing(Writer(path, wait=_WAIT)) as writer:
                writer.accept(folder)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}") from None
    return added


def core_sizes(store: Store, cluster: int) -> list[float]:
    """The root mean square of the numbers in a cluster's cores, by module; of all adapters' where
    the cluster has none."""
    members = (store.chosen[:, 0, 0] == cluster).nonzero()[:, 0]
    if not len(members):
        members = torch.arange(len(store))
    some = members[:: -(-len(members) // _SIZED)].tolist()
    squares = torch.zeros(store.manifest.core_row, dtype=torch.float64)
    for i in some:
        squares += store.cores(i, i + 1)[0].double().square()
    spans = ((info.core_offset, info.core_size) for info in store.manifest.modules)
    found = torch.stack([squares[at : at + size].mean() for at, size in spans]).div(len(some))
    found = found.sqrt()
    usual = float(found[found > 0].mean()) if bool((found > 0).any()) else 1.0
    return [float(size) or usual for size in found]


class _Run:
    """Training of one core a module, an epoch at a time."""

    def __init__(
        self,
        store: Store,
        model: torch.nn.Module,
        cores: Cores,
        cluster: int,
        examples: Sequence[Example],
        judged: Sequence[Example],
        training: Training,
        kept: Path | None,
    ):
        self.model, self.cores, self.training, self.kept = model, cores, training, kept
        self.examples, self.judged = examples, judged
        rates = [training.learning_rate * size for size in core_sizes(store, cluster)]
        self.optimizer = torch.optim.Adam(
            [
                {"params": [core], "lr": rate, "peak": rate}
                for core, rate in zip(cores.values, rates, strict=True)
            ]
        )
        self.steps = sum(len(self._batches(epoch)) for epoch in range(training.epochs))
        self.step = 0
        self.best: tuple[float, int] | None = None
        self.best_cores: list[torch.Tensor] = []
        of = [asdict(training), cluster, bases_digest(store), store.manifest.base_model.name]
        of += [[example.prompt, example.completion] for example in examples]
        self.digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()

    def to_the_end(self, on_progress: Progress) -> tuple[int, float]:
        """(the epoch that was kept, its loss)."""
        for epoch in range(self._resumed(), self.training.epochs):
            for batch in self._batches(epoch):
                on_progress("training", self.step, self.steps)
                self._take(batch)
            loss = mean_loss(self.model, self.judged, self.training.batch_tokens)
            held_out = self.judged is not self.examples
            if self.best is None or not held_out or loss < self.best[0]:
                self.best = loss, epoch + 1
                self.best_cores = [core.detach().clone() for core in self.cores.values]
            self._keep(epoch + 1)
        on_progress("training", self.steps, self.steps)
        assert self.best is not None
        with torch.no_grad():
            for core, best in zip(self.cores.values, self.best_cores, strict=True):
                core.copy_(best)
        return self.best[1], self.best[0]

    def _take(self, batch: Sequence[Example]) -> None:
        self.step += 1
        warm = max(1, round(_WARM_UP * self.steps))
        share = min(self.step / warm, (self.steps - self.step + 1) / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        tokens = sum(len(example.completion) for example in batch)
        loss = summed_loss(self.model, batch) / tokens
        if not bool(loss.isfinite()):
            raise TrainError(
                f"the loss became {float(loss)} at step {self.step}; expected a finite number: "
                f"lower --learning-rate (now {self.training.learning_rate:g})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.cores.values, _CLIP)
        self.optimizer.step()

    def _batches(self, epoch: int) -> list[list[Example]]:
        rng = random.Random(f"{self.training.seed} {epoch}")
        return batches(self.examples, self.training.batch_tokens, rng)

    def _keep(self, epoch: int) -> None:
        if self.kept is None:
            return
        state = {
            "digest": self.digest,
            "epoch": epoch,
            "step": self.step,
            "best": self.best,
            "best_cores": self.best_cores,
            "cores": [core.detach() for core in self.cores.values],
            "optimizer": self.optimizer.state_dict(),
        }
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        half = self.kept.with_suffix(".half")
        torch.save(state, half)
        half.replace(self.kept)

    def _resumed(self) -> int:
        """How many epochs an earlier call has finished."""
        if self.kept is None or not self.kept.exists():
            return 0
        try:
            state = torch.load(self.kept, weights_only=True)
        except Exception:  # not a file of ours, or a damaged one: what it held is trained again
            return 0
        if not isinstance(state, dict) or state.get("digest") != self.digest:
            return 0
        with torch.no_grad():
            for core, value in zip(self.cores.values, state["cores"], strict=True):
                core.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], tuple(state["best"])
        self.best_cores = state["best_cores"]
        return state["epoch"]


def _clusters(store: Store) -> int:
    """How many clusters there are to choose from.

    Raises:
        TrainError: adapters of this store have no cores in bases that they share.
    """
    modules = store.manifest.modules
    if any(info.experts for info in modules):
        raise TrainError(
            f"{store.path}: found a store that adapts experts (MoE), whose cores are not trained; "
            "train a LoRA adapter and add it (`vllm-jd add`)"
        )
    kinds = {
        int(kind) for info in modules for kind in store.rows(info.name)[: info.shared, CORE_KIND]
    }
    if not kinds or CORE_NONE in kinds or any(info.shared == 0 for info in modules):
        raise TrainError(
            f"{store.path}: found a store by {store.manifest.method}, whose adapters have no cores "
            "in bases that they share; expected one by jd-full or jd-diag: compress so, or train a "
            "LoRA adapter and add it (`vllm-jd add`)"
        )
    return min(info.shared for info in modules)


def _parted(
    examples: Sequence[Example], training: Training
) -> tuple[Sequence[Example], Sequence[Example]]:
    """(what to train on, what to judge by), the same where none are held out."""
    count = round(training.held_out * len(examples))
    if count == 0:
        return examples, examples
    if count == len(examples):
        raise TrainError(
            f"{len(examples)} examples, of which {training.held_out:g} are held out, leave none to "
            "train on; give more, or --held-out 0"
        )
    order = list(range(len(examples)))
    random.Random(training.seed).shuffle(order)
    held = set(order[:count])
    rest = [example for i, example in enumerate(examples) if i not in held]
    return rest, [examples[i] for i in sorted(held)]


def _steepest(
    store: Store,
    layers: dict[str, torch.nn.Module],
    model: torch.nn.Module,
    examples: Sequence[Example],
    clusters: int,
    training: Training,
    on_progress: Progress,
) -> int:
    """The cluster in whose bases the loss has the largest gradient at no adapter at all."""
    if clusters == 1:
        return 0
    some_batches = batches(examples, training.batch_tokens, random.Random(training.seed))[:_LOOK]
    tokens = max(len(batch) * max(map(length, batch)) for batch in some_batches)
    each = sum(info.rank * (info.d_in + info.d_out + 2 * tokens) for info in store.manifest.modules)
    count = max(1, _AT_ONCE // each)
    slopes = []
    for first in range(0, clusters, count):
        some = list(range(first, min(first + count, clusters)))
        with Cores(store, layers, some).installed() as cores:
            for batch in some_batches:
                summed_loss(model, batch).backward()
        slopes.append(sum(core.grad.square().flatten(1).sum(1).cpu() for core in cores.values))
        on_progress("choosing a cluster", some[-1] + 1, clusters)
    return int(torch.cat(slopes).argmax())
