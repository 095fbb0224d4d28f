"""Real parts for the end-to-end tests: the demo model, shipped and synthetic adapters."""

import json
import os
import shutil
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.store import read_base_model

SHIPPED = Path(str(files("vllm_jd") / "data" / "adapters"))
MAX_MODEL_LEN = 256
NEW_TOKENS = 12
SHORT_LAYERS = 4
TIE = 3e-4
"""By how much, in logits, an answer's token may be less likely than another one, in float32: the
differences between logits of an engine are some 1e-4 at most from those of PEFT's forward pass."""


@pytest.fixture(scope="session", autouse=True)
def vllm_environment():
    """A small KV cache, no network, and no word of a GPU."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def model():
    return ensure_smollm2()


@pytest.fixture(scope="session")
def short(tmp_path_factory, model):
    """The demo's model cut after a few layers, for what does not depend on how many there are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("short") / model.name
    cut = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=SHORT_LAYERS)
    cut.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def write_short_adapter(source, folder, scale):
    """An adapter of `short`: what one of the whole model has for its layers, in float32, times
    `scale`, since so few layers say less."""
    folder.mkdir(parents=True)
    tensors = {
        key: (tensor.float() * (scale if "lora_B" in key else 1)).contiguous()
        for key, tensor in load_file(source / "adapter_model.safetensors").items()
        if int(key.split(".layers.")[1].split(".")[0]) < SHORT_LAYERS
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    shutil.copy(source / "adapter_config.json", folder)


@pytest.fixture(scope="session")
def shipped():
    """Names of the adapters that ship with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())


@pytest.fixture(scope="session")
def sources(tmp_path_factory, model, shipped):
    """Adapter name → folder: seven shipped ones, and one on every linear layer of the model."""
    folders = {name: SHIPPED / name for name in shipped[:7]}
    wide = tmp_path_factory.mktemp("wide") / "all-linear"
    write_wide_adapter(wide, model)
    folders["all-linear"] = wide
    return folders


def write_wide_adapter(folder, model, rank=3, seed=0, every=3):
    """A random adapter on q, k, v, o, gate, up and down of every third layer (or so), alpha pattern
    and rank pattern in use."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(0, config["num_hidden_layers"], every):
        for name, (d_in, d_out) in shapes.items():
            r = 5 if name == "mlp.down_proj" else rank
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(r, d_in, generator=generator)
            b = torch.randn(d_out, r, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = b * 0.002
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": model.name,
                "r": rank,
                "lora_alpha": 6,
                "rank_pattern": {"down_proj": 5},
                "alpha_pattern": {"down_proj": 5, "q_proj": 9},
                "layers_to_transform": list(range(0, config["num_hidden_layers"], every)),
                "target_modules": [name.rsplit(".", 1)[1] for name in shapes],
                "bias": "none",
            }
        )
    )


@pytest.fixture(scope="session")
def lossless_store(tmp_path_factory, model, sources):
    """A float32 store of `sources` at a rank at which nothing is lost (Prop. 1)."""
    path = tmp_path_factory.mktemp("stores") / "lossless"
    settings = Settings(rank=40, store_dtype="float32")
    collection = read_adapters(sources.values())
    store = compress(collection, path, settings, base_model=read_base_model(model))
    assert float(store.error.max()) < 1e-8
    return store


@pytest.fixture(scope="session")
def lossy_store(tmp_path_factory, model, sources):
    """A bfloat16 store of `sources` at rank 3 in two clusters: clearly lossy."""
    path = tmp_path_factory.mktemp("stores") / "lossy"
    collection = read_adapters(sources.values())
    settings = Settings(rank=3, clusters=2)
    store = compress(collection, path, settings, base_model=read_base_model(model))
    assert float(store.error.mean()) > 0.05
    return store


@pytest.fixture(scope="session")
def prompts(model):
    """Token ids of a few prompts in the form that the shipped adapters were trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (
        "The old clock in the hall stopped at noon.",
        "bright",
        "A farmer sells 12 eggs on Monday and 7 on Tuesday.",
    )
    return [tokenizer(f"Input: {text}\nOutput:").input_ids for text in texts]


class PeftReference:
    """Greedy tokens and log-probabilities from PEFT's own forward pass, in float32."""

    def __init__(self, model):
        from transformers import AutoModelForCausalLM

        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._base.generation_config.eos_token_id = None
        self._model = None
        self._names = {}
        self._said = {}

    @contextmanager
    def _with(self, folder):
        """The model with the adapter in `folder`, with a blend of ((folder, weight), …), or without
        one."""
        if folder is None:
            if self._model is None:
                yield self._base
            else:
                with self._model.disable_adapter():
                    yield self._model
            return
        name = self._blended(folder) if isinstance(folder, tuple) else self._loaded(folder)
        self._model.set_adapter(name)
        yield self._model

    def _loaded(self, folder):
        from peft import PeftModel

        if folder not in self._names:
            name = self._names[folder] = f"adapter{len(self._names)}"
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, folder, adapter_name=name)
            else:
                self._model.load_adapter(folder, adapter_name=name)
        return self._names[folder]

    def _blended(self, parts):
        if parts not in self._names:
            names, weights = [self._loaded(part) for part, _ in parts], [w for _, w in parts]
            name = self._names[parts] = f"adapter{len(self._names)}"
            self._model.add_weighted_adapter(names, weights, name, combination_type="cat")
        return self._names[parts]

    @torch.inference_mode()
    def greedy(self, folder, prompt, tokens=NEW_TOKENS, guess=None):
        """`tokens` new token ids for `prompt` (a list of ids).

        `guess` is what they may be: if the model says each of its tokens after the ones before it,
        one forward pass has shown that they are. Otherwise they are decoded one by one.
        """
        key = (folder, tuple(prompt), tokens)
        said = self._said.get(key)
        guessed = guess is not None and guess != said and len(guess) == tokens
        if guessed and self._follows(folder, prompt, guess):
            said = self._said[key] = list(guess)
        if said is None:
            said = self._said[key] = self._decode(folder, prompt, tokens)
        return said

    def answers(self, folders, requests, guesses):
        """What it says to each (adapter name, prompt), the adapters being in `folders`."""
        return [
            self.greedy(folders[name], prompt, guess=guess)
            for (name, prompt), guess in zip(requests, guesses, strict=True)
        ]

    @torch.inference_mode()
    def says(self, folder, prompt, answer):
        """Whether that is what it says to `prompt`."""
        return self._follows(folder, prompt, answer)

    def _follows(self, folder, prompt, answer):
        """Whether each token of `answer` is the likeliest after `prompt` and those before it, or
        one of several between which nothing but rounding decides (TIE)."""
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        with self._with(folder) as model:
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        said = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return bool((logits.amax(-1) - said <= TIE).all())

    def _decode(self, folder, prompt, tokens):
        ids = torch.tensor([prompt])
        with self._with(folder) as model:
            result = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return result[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def log_probabilities(self, folder, ids):
        """Of each token of `ids` after the first, given those before it."""
        with self._with(folder) as model:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        following = torch.tensor(ids[1:])[:, None]
        return torch.log_softmax(logits.double(), -1).gather(1, following)[:, 0].tolist()


@pytest.fixture(scope="session")
def peft_reference(model):
    return PeftReference(model)


@pytest.fixture(scope="session")
def short_reference(short):
    return PeftReference(short)
