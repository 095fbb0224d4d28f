"""What an engine is asked, and what it answers: plain data, which goes from process to process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One item for one adapter.

    Args:
        asked: token ids that are to be answered, as a server gets them.
        prompt: token ids before those of `completion`.
        completion: token ids of what is expected, whose loss is wanted.
        adapter: its name; None: the base model.
        folder: where it lies as it is; None: it is that of the store.
        digest: of the folder's files (`upload_digest`).
    """

    asked: list[int]
    prompt: list[int]
    completion: list[int]
    adapter: str | None = None
    folder: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was said, and the loss of what was expected in nats a token; or why there is none."""

    said: str
    loss: float
    failed: str | None = None


@dataclass(frozen=True)
class EngineSettings:
    """An engine on a store.

    Args:
        store: its folder.
        manifest_sha256: of the generation that is meant.
        model: the base model's folder or name.
        store_base_model: see `vllm_jd.serve.engine_args`.
        max_model_len: tokens of the longest item, with its answer.
        max_lora_rank: the highest rank of an uncompressed adapter.
        flags: vLLM's, from the command line.
    """

    store: str
    manifest_sha256: str
    model: str
    store_base_model: str | None
    max_model_len: int
    max_lora_rank: int
    flags: list[str]
