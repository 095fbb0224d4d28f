"""What is asked of a server, and the client that asks it and takes the times."""

import asyncio
import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from tokenizers import Tokenizer
from verse import verses

TRAFFICS = ("uniform", "zipf", "one")
QUANTILES = (50, 95, 99)
RECORD_FIELDS = ("adapter", "due_ms", "prompt_tokens", "output_tokens", "chunks_ms", "error")
"""A request in the JSON file. `due_ms` counts from the start of the run, each of `chunks_ms` (when
a piece of text came) from `due_ms`."""


@dataclass(frozen=True)
class Shape:
    """How long a request is: `prompt_tokens` None stands for a whole poem, sent as text."""

    name: str
    prompt_tokens: int | None
    new_tokens: int


SONNET = Shape("sonnet", None, 10)
DECODE = Shape("decode-heavy", 16, 64)
PREFILL = Shape("prefill-heavy", 384, 4)


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` of them at any time (a closed loop), or at random moments,
    `rate` a second on average (Poisson)."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.concurrency} at a time" if self.concurrency else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Request:
    """One request: `due` in seconds from the start of the run (0 in a closed loop), `adapter` an
    index, `prompt` a text or token ids."""

    due: float
    adapter: int
    prompt: str | list[int]
    new_tokens: int


@dataclass
class Record:
    """What became of one request; times in seconds from the start of the run.

    `due` is when it had to be sent (in a closed loop: when it was), and all waiting counts from
    there: a client that falls behind does not make the server look better. `chunks` are the
    moments at which pieces of text came; vLLM sends one a token, unless its HTTP process lags.
    """

    adapter: int
    due: float
    chunks: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def end(self) -> float:
        return self.chunks[-1] if self.chunks else self.due

    def row(self) -> list[Any]:
        """For the JSON file, as `RECORD_FIELDS` says; `error` only if there is one."""
        chunks = [round(1000 * (moment - self.due), 1) for moment in self.chunks]
        row = [self.adapter, round(1000 * self.due, 1), self.prompt_tokens, self.output_tokens]
        return [*row, chunks, self.error] if self.error else [*row, chunks]


def make_requests(
    load: Load,
    shape: Shape,
    traffic: str,
    adapters: int,
    *,
    seed: str,
    tokenizer: Tokenizer,
    poems: Sequence[str] | None = None,
) -> list[Request]:
    """The requests of one run. The same seed gives the same moments and prompts, whatever the
    traffic and the number of adapters.

    Args:
        load: how many, and when.
        shape: of each.
        traffic: which adapters: `uniform`, `zipf` or `one`.
        adapters: how many there are.
        seed: of all random choices.
        tokenizer: of the model, for shapes of so many tokens.
        poems: prompts to draw from; default: new ones, no two of which begin alike.
    """
    moments, texts, names = np.random.default_rng(list(seed.encode())).spawn(3)
    dues = np.zeros(load.requests)
    if load.rate:
        dues = poisson(load.rate, load.requests, moments)
    if shape.prompt_tokens is None:
        if poems is None:
            prompts = verses(load.requests, seed)
        else:
            prompts = [poems[i] for i in texts.integers(len(poems), size=load.requests)]
    else:
        prompts = _token_prompts(load.requests, shape.prompt_tokens, seed, tokenizer)
    indices = assign(traffic, adapters, load.requests, names)
    return [
        Request(float(due), int(adapter), prompt, shape.new_tokens)
        for due, adapter, prompt in zip(dues, indices, prompts, strict=True)
    ]


def poisson(rate: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Arrival times in seconds, float64 `[count]`: gaps are exponential with mean 1 / `rate`."""
    return np.cumsum(rng.exponential(1 / rate, count))


def assign(traffic: str, adapters: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The adapter of each request, int64 `[count]`.

    `uniform`: all alike. `zipf`: the k-th with a probability that goes by 1 / k (exponent 1; the
    paper's own runs are uniform). `one`: always adapter 0.

    Raises:
        ValueError: another word.
    """
    if traffic == "uniform":
        return rng.integers(adapters, size=count)
    if traffic == "zipf":
        weights = 1 / np.arange(1, adapters + 1)
        return rng.choice(adapters, size=count, p=weights / weights.sum())
    if traffic == "one":
        return np.zeros(count, dtype=np.int64)
    raise ValueError(f"traffic is {traffic!r}; choose from {', '.join(TRAFFICS)}")


def _token_prompts(count: int, tokens: int, seed: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of verse, `tokens` each; a poem has more than 80 words, so as many tokens."""
    per_prompt = tokens // 80 + 1
    poems = verses(count * per_prompt, seed)
    texts = ["\n\n".join(poems[i::count]) for i in range(count)]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids[:tokens] for encoding in encoded]


async def send(
    url: str,
    models: Sequence[str],
    requests: Sequence[Request],
    *,
    concurrency: int | None,
    timeout: float = 900,
    key: str | None = None,
) -> list[Record]:
    """Send `requests` to an OpenAI-compatible server and wait for all answers.

    Args:
        url: of the server, without path.
        models: the name of each adapter.
        requests: in order of their `due`.
        concurrency: so many at any time, one after the other, their `due` not heeded; None: each
            when it is due.
        timeout: seconds for one request.
        key: API key.

    Returns:
        A record for each request, in the order given. Failures of any kind are in `error`.
    """
    # The default allows 100 connections; waiting for one would be counted as the server's.
    connector = aiohttp.TCPConnector(limit=0)
    limit = aiohttp.ClientTimeout(total=timeout)
    headers = {"Authorization": f"Bearer {key}"} if key else None
    async with aiohttp.ClientSession(
        connector=connector, timeout=limit, headers=headers
    ) as session:
        clock = asyncio.get_running_loop().time
        start = clock()

        async def ask(request: Request, due: float) -> Record:
            record = Record(request.adapter, due)
            body = {
                "model": models[request.adapter],
                "prompt": request.prompt,
                "max_tokens": request.new_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                async with session.post(f"{url}/v1/completions", json=body) as reply:
                    if reply.status != 200:
                        record.error = f"HTTP {reply.status}: {(await reply.text())[:200]}"
                        return record
                    async for line in reply.content:
                        _read(line, clock() - start, record)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                record.error = f"{type(error).__name__}: {error}"
            if record.error is None and (
                record.output_tokens != request.new_tokens or not record.chunks
            ):
                record.error = (
                    f"{record.output_tokens} tokens in {len(record.chunks)} pieces came, "
                    f"{request.new_tokens} were asked for"
                )
            return record

        if concurrency is None:

            async def wait_and_ask(request: Request) -> Record:
                await asyncio.sleep(start + request.due - clock())
                return await ask(request, request.due)

            return list(await asyncio.gather(*map(wait_and_ask, requests)))

        records: list[Record | None] = [None] * len(requests)
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for i, request in waiting:
                records[i] = await ask(request, clock() - start)

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return [record for record in records if record is not None]


def _read(line: bytes, moment: float, record: Record) -> None:
    """One line of a server-sent event stream. Raises ValueError: it is not JSON."""
    if not line.startswith(b"data: {"):
        return
    event = json.loads(line[len(b"data: ") :])
    if "error" in event:
        record.error = f"in the stream: {json.dumps(event['error'])[:200]}"
    if event.get("choices"):
        record.chunks.append(moment)
    if usage := event.get("usage"):
        record.prompt_tokens = usage["prompt_tokens"]
        record.output_tokens = usage["completion_tokens"]


@dataclass(frozen=True)
class Run:
    """One load on one system in one round."""

    system: str
    round: int
    wave: int
    shape: Shape
    load: Load
    traffic: str
    records: list[Record]

    @property
    def cell(self) -> tuple[Shape, str]:
        """What runs must have in common to be compared, whatever their adapters."""
        return self.shape, self.load.name

    @property
    def rate(self) -> float:
        """Answered requests a second, until the last answer."""
        answered = [record.end for record in self.records if record.error is None]
        return len(answered) / max(answered) if answered else 0.0

    def json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "round": self.round,
            "wave": self.wave,
            "shape": self.shape.name,
            "load": self.load.name,
            "traffic": self.traffic,
            "requests_per_second": self.rate,
            "records": [record.row() for record in self.records],
        }


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of runs of one system, traffic and load: rates are medians over the runs, times
    are quantiles over all answered requests (linear interpolation), seconds.

    `requests_per_second` counts until the last answer. Where requests come at random, that is a bit
    less than `arrivals_per_second` even if all are answered at once.
    """
    load = runs[0].load
    answered = [[r for r in run.records if r.error is None] for run in runs]
    everything = [record for records in answered for record in records]
    errors = [r.error for run in runs for r in run.records if r.error is not None]
    seconds = [max((r.end for r in records), default=0.0) for records in answered]

    def per_second(count: Any) -> float:
        rates = [
            sum(map(count, records)) / passed if passed else 0.0
            for records, passed in zip(answered, seconds, strict=True)
        ]
        return float(np.median(rates))

    flights = [distinct_in_flight(run.records) for run in runs]
    return {
        "concurrency": load.concurrency,
        "offered_requests_per_second": load.rate,
        "arrivals_per_second": _arrivals(runs) if load.rate else None,
        "requests_per_second": per_second(lambda record: 1),
        "output_tokens_per_second": per_second(lambda record: record.output_tokens),
        "total_tokens_per_second": per_second(lambda r: r.prompt_tokens + r.output_tokens),
        "ttft_seconds": _quantiles([r.chunks[0] - r.due for r in everything]),
        "inter_token_seconds": _quantiles(
            [gap for r in everything for gap in np.diff(r.chunks).tolist()]
        ),
        "latency_seconds": _quantiles([r.end - r.due for r in everything]),
        "distinct_adapters_in_flight": {
            "mean": float(np.mean([mean for mean, _ in flights])),
            "max": max(most for _, most in flights),
        },
        "requests": sum(len(run.records) for run in runs),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def _arrivals(runs: Sequence[Run]) -> float:
    """What the random moments came to: requests over the time until the last was sent, median."""
    return float(np.median([len(run.records) / run.records[-1].due for run in runs]))


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, QUANTILES)
    return {f"p{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def distinct_in_flight(records: Sequence[Record]) -> tuple[float, int]:
    """Different adapters that are being asked at one moment: the mean over time from the first
    request to the last answer, and the most."""
    moments = sorted({moment for record in records for moment in (record.due, record.end)})
    if len(moments) < 2:
        return 0.0, 0
    spans = np.diff(moments)
    asked: list[set[int]] = [set() for _ in spans]
    for record in records:
        first, last = (bisect.bisect_left(moments, moment) for moment in (record.due, record.end))
        for span in asked[first:last]:
            span.add(record.adapter)
    counts = [len(span) for span in asked]
    return float(np.dot(counts, spans) / spans.sum()), max(counts)
