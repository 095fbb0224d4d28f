"""Requests that ask for several adapters over HTTP, and blends with names."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from vllm_jd.plugin.api.blend_requests import is_blend_request, parse_blend_path
from vllm_jd.plugin.api.blends import SERVING, Blends, serve_blends
from vllm_jd.plugin.api.failures import raise_failure
from vllm_jd.plugin.placed import BAD_BLEND, FAILED
from vllm_jd.store.blend import BlendError, UnknownPart, of_mapping

STORE = "vllm-jd:/store@3"


@pytest.fixture
def models():
    found = SimpleNamespace(
        lora_requests={name: LoRARequest(name, i + 1, STORE) for i, name in enumerate("abc")},
        is_base_model=lambda name: name == "base",
        base_model_paths=[SimpleNamespace(name="base")],
        lora_id_counter=AtomicCounter(9),
    )
    upload = f"vllm-jd-upload:{'0' * 64}:/adapters/u"
    found.lora_requests["u"] = LoRARequest("u", 9, upload)
    return found


@pytest.fixture
def serving(models):
    return BaseServing(models, SimpleNamespace())


@pytest.fixture
def blends(models, serving):
    made = Blends(models, 3)
    state = State()
    setattr(state, SERVING[0], serving)
    serve_blends(state, made)
    serve_blends(state, made)  # harmless
    return made


def test_every_object_of_vllm_that_takes_them_is_told(models):
    state, mine = State(), Blends(models, 3)
    for name in SERVING:
        setattr(state, name, BaseServing(models, SimpleNamespace()))
    serve_blends(state, mine)
    for name in SERVING:
        assert is_blend_request(answered(getattr(state, name), chat(adapters=listed(a=1)))[0])


def test_a_name_that_is_not_known_is_looked_for_before_it_is_refused(models, serving, blends):
    looks = []

    async def look():
        looks.append(None)
        models.lora_requests["new"] = LoRARequest("new", 7, STORE)

    async def gone():
        looks.append(None)

    for model in ("a", "base"):
        assert answered(serving, chat(model))[1] is None
    assert answered(serving, chat("new"))[1].code == 404
    blends.look = gone
    assert answered(serving, chat("nobody"))[1].code == 404
    assert answered(serving, chat(adapters=listed(a=1, new=1)))[1].code == 404
    assert len(looks) == 2
    blends.look = look
    assert is_blend_request(answered(serving, chat(adapters=listed(a=1, new=1)))[0])
    del models.lora_requests["new"]
    assert answered(serving, chat("new"))[0].lora_name == "new"
    assert len(looks) == 4
    for model in ("a", "base", "new"):
        answered(serving, chat(model))
    answered(serving, chat(adapters=listed(a=1, new=1)))
    answered(serving, chat(adapters=[{"name": "a", "weight": "much"}]))
    assert len(looks) == 4, "what is known is not looked for"


def chat(model="a", **extra):
    message = {"role": "user", "content": "hello"}
    return ChatCompletionRequest(model=model, messages=[message], **extra)


def answered(serving, request):
    """(the LoRARequest, None), or (None, what it is told)."""
    refused = asyncio.run(serving._check_model(request))
    return (None, refused.error) if refused else (serving._maybe_get_adapters(request), None)


def listed(**weights):
    return [{"name": name, "weight": weight} for name, weight in weights.items()]


@pytest.mark.parametrize("kind", ["chat", "batch", "completion", "responses"])
def test_a_request_names_its_parts(blends, serving, kind):
    adapters = listed(a=0.7, u=-0.3)
    if kind == "chat":
        request = chat(adapters=adapters)
    elif kind == "batch":
        talks = [[{"role": "user", "content": text}] for text in ("hello", "goodbye")]
        request = BatchChatCompletionRequest(model="a", messages=talks, adapters=adapters)
    elif kind == "responses":
        request = ResponsesRequest(model="a", input="hello", adapters=adapters)
    else:
        request = CompletionRequest(model="a", prompt="hello", adapters=adapters)
    lora, _ = answered(serving, request)
    assert lora.lora_name == "a" and is_blend_request(lora)
    blended = parse_blend_path(lora.lora_path)
    paths = {part.name: (part.path, part.weight) for part in blended.parts}
    assert paths == {
        "a": (STORE, 0.7),
        "u": (f"vllm-jd-upload:{'0' * 64}:/adapters/u", -0.3),
    }


def test_a_way_may_be_asked_for(blends, serving):
    how = {"way": "ties", "density": 0.5}
    lora, _ = answered(serving, chat(adapters=listed(a=1, b=1), blend=how))
    assert parse_blend_path(lora.lora_path).blend == of_mapping({"a": 1, "b": 1}, **how)


def test_the_model_may_be_the_base(blends, serving):
    lora, _ = answered(serving, chat("base", adapters=listed(a=1.5)))
    assert lora.lora_name == "base" and is_blend_request(lora)


def test_no_model_is_the_base(blends, serving):
    """As in vLLM; a LoRARequest without a name would end the engine."""
    lora, _ = answered(serving, chat(None, adapters=listed(a=1)))
    assert lora.lora_name == "base" and is_blend_request(lora)


def test_who_asks_for_none_gets_what_vllm_finds(blends, serving, models):
    assert answered(serving, chat("b")) == (models.lora_requests["b"], None)
    assert answered(serving, chat("base")) == (None, None)
    assert answered(serving, chat("nobody"))[1].code == 404
    assert answered(serving, chat("nobody", adapters=listed(a=1)))[1].param == "model"


@pytest.mark.parametrize(
    ("extra", "code", "match"),
    [
        ({"adapters": listed(a=1, d=1)}, 404, "'d', which does not exist"),
        ({"adapters": listed(a=float("nan"))}, 400, "weight nan of 'a'"),
        ({"adapters": listed(a=1e9)}, 400, "at most 100"),
        ({"adapters": listed(a=10**400)}, 400, "too large"),
        ({"adapters": listed(a=True)}, 400, "adapters[0]: expected a number"),
        ({"adapters": listed(a="1")}, 400, "expected a number"),
        ({"adapters": listed(a=1, b=1, c=1, u=1)}, 400, "found 4 parts, expected 3"),
        ({"adapters": [*listed(a=1), *listed(a=2)]}, 400, "'a' a second time"),
        ({"adapters": []}, 400, "expected a list"),
        ({"adapters": {"a": 1}}, 400, "expected a list"),
        ({"adapters": ["a"]}, 400, "adapters[0]: expected an object with a name"),
        ({"adapters": [{"name": "a", "weigth": 1}]}, 400, "'weigth'"),
        ({"adapters": listed(base=1)}, 400, "the base model"),
        ({"adapters": listed(a=0)}, 400, "other than 0"),
        ({"adapters": listed(a=1), "blend": {"way": "sum"}}, 400, "way"),
        ({"adapters": listed(a=1), "blend": {"weights": {}}}, 400, "weights"),
        ({"adapters": listed(a=1), "blend": "ties"}, 400, "expected an object"),
        ({"blend": {"way": "ties"}}, 400, "no `adapters`"),
    ],
)
def test_mistakes_get_openais_error_objects(blends, serving, extra, code, match):
    _, error = answered(serving, chat(**extra))
    assert match in error.message and error.code == code and error.param == "adapters"
    assert error.type == ("NotFoundError" if code == 404 else "BadRequestError")


def test_one_that_is_gone_in_between(blends, serving, models):
    request = chat(adapters=listed(a=1, b=1))
    assert asyncio.run(serving._check_model(request)) is None
    del models.lora_requests["b"]
    with pytest.raises(VLLMValidationError, match="'b'"):
        serving._maybe_get_adapters(request)


def test_a_server_without_them(models):
    with pytest.raises(BlendError, match="--max-blend 0"):
        Blends(models, 0).asked(chat(adapters=listed(a=1)))


def test_what_the_engine_finds_wrong_is_the_users_to_mend():
    def output(reason):
        each = SimpleNamespace(finish_reason="error", stop_reason=FAILED + reason)
        return SimpleNamespace(outputs=[each])

    with pytest.raises(VLLMValidationError, match="one cluster"):
        raise_failure(output(f"{BAD_BLEND}expected parts of one cluster"))
    with pytest.raises(GenerationError):
        raise_failure(output("a core cannot be read"))


class TestNames:
    def test_they_are_models_like_any_other(self, blends, serving, models):
        blends.set_named({"ab": of_mapping({"a": 0.7, "b": 0.3})})
        lora, _ = answered(serving, chat("ab"))
        assert lora.lora_name == "ab" and "ab" in models.lora_requests
        assert {part.name for part in parse_blend_path(lora.lora_path).parts} == {"a", "b"}

    def test_they_may_be_parts(self, blends, serving):
        blends.set_named({"ab": of_mapping({"a": 0.7, "b": 0.3})})
        lora, _ = answered(serving, chat(adapters=listed(ab=2, c=1)))
        weights = parse_blend_path(lora.lora_path).blend.weights
        assert weights == {"a": 1.4, "b": 0.6, "c": 1.0}

    def test_they_follow_their_parts(self, blends, models):
        named = {"ab": of_mapping({"a": 0.7, "b": 0.3}), "abc": of_mapping({"ab": 1, "c": 1})}
        blends.set_named(named)
        before = dict(models.lora_requests)
        models.lora_requests["b"] = LoRARequest("b", 2, "vllm-jd:/store@4")
        blends.set_named(named)
        for name in named:
            assert models.lora_requests[name].lora_path != before[name].lora_path
            assert "@4" in models.lora_requests[name].lora_path

    def test_one_whose_part_is_gone_says_so_until_it_is_back(self, blends, serving, models):
        named = {"ab": of_mapping({"a": 0.7, "b": 0.3}), "x": of_mapping({"ab": 1})}
        blends.set_named(named)
        gone = models.lora_requests.pop("b")
        blends.set_named(named)
        for name in named:
            _, error = answered(serving, chat(name))
            assert error.code == 404 and "the part 'b'" in error.message
            assert name not in models.lora_requests
        models.lora_requests["b"] = gone
        blends.set_named(named)
        assert answered(serving, chat("x"))[0].lora_name == "x" and not blends.faults

    def test_a_name_that_is_given_to_something_else_stays_that(self, blends, models):
        blends.set_named({"ab": of_mapping({"a": 1})})
        models.lora_requests["ab"] = LoRARequest("ab", 7, STORE)
        blends.set_named({})
        assert models.lora_requests["ab"].lora_path == STORE

    def test_cycles_and_unknown_parts_are_found_before_they_are_named(self, blends):
        blends.set_named({"x": of_mapping({"a": 1, "b": 1})})
        blends.check_named("y", of_mapping({"x": 1}))
        with pytest.raises(BlendError, match="part of itself"):
            blends.check_named("x", of_mapping({"x": 1}))
        with pytest.raises(UnknownPart):
            blends.check_named("y", of_mapping({"d": 1}))
        blends.set_named({"x": of_mapping({"a": 1}), "y": of_mapping({"x": 1})})
        with pytest.raises(BlendError, match="part of itself"):
            blends.check_named("x", of_mapping({"y": 1}))

    def test_names_of_one_content_are_told_apart(self, blends, models):
        blends.set_named({name: of_mapping({"a": 0.7}) for name in ("x", "y")})
        x, y = models.lora_requests["x"], models.lora_requests["y"]
        assert x.lora_path == y.lora_path
        assert len({each.lora_int_id for each in models.lora_requests.values()}) == 6
        blends.set_named({name: of_mapping({"a": 0.7}) for name in ("x", "y")})
        assert models.lora_requests["x"] is x, "what is pinned would be pinned anew"

    def test_ten_thousand_of_them(self, blends, models):
        named = {f"blend-{i}": of_mapping({"a": 0.5, "b": i / 10_000}) for i in range(10_000)}
        blends.set_named(named)
        assert len(models.lora_requests) == 10_004 and not blends.faults
