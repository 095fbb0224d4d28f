"""Bad input of every kind: whatever comes, the server says why, in OpenAI's form, and lives on.

`VLLM_JD_BAD_INPUTS=10000` sends so many (default: a few hundred).
"""

import json
import os
from collections import Counter

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.serve.tenants.conftest import Client, guarded
from tests.serve.tenants.test_guard import answer_of

INPUTS = int(os.environ.get("VLLM_JD_BAD_INPUTS", "600"))
FUZZ = {
    "deadline": None,
    "derandomize": INPUTS <= 1000,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}

PATHS = [
    *("/v1/models", "/v1/models/{}", "/v1/adapters", "/v1/adapters/{}", "/v1/adapters/{}/pin"),
    *(
        "/v1/adapters/{}/unpin",
        "/v1/store",
        "/v1/store/rollback",
        "/v1/store/reload",
        "/v1/recompress",
        "/{}",
    ),
    *("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics", "/{}/{}"),
]
OURS = ("/v1/models", "/v1/adapters", "/v1/store", "/v1/recompress")
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: JSON | good
        for name, good in {
            "name": st.just("x"),
            "model": st.sampled_from(["base", "x", "t/x"]),
            "prompt": st.just("x"),
            "source": st.sampled_from(["/", "s3://b/x", "hf://o/n", "../x", "\0"]),
            "blend": st.dictionaries(TEXT, st.floats() | st.integers(), max_size=3),
            "adapters": st.lists(
                st.fixed_dictionaries({}, optional={"name": TEXT | JSON, "weight": JSON}),
                max_size=3,
            ),
            "way": st.sampled_from(["ties", "linear", "dare_ties"]),
            "density": st.floats(),
            "seed": st.integers(),
            "generation": st.integers(),
            "refit": st.booleans(),
            "cache_salt": TEXT,
            "stream": st.booleans(),
            "n": st.integers(-3, 3),
            "lora_name": TEXT,
            "lora_path": TEXT,
            "load_inplace": st.booleans(),
        }.items()
    },
)


def multipart(parts):
    """A body with the boundary `b`, of (headers, data) each."""
    lines = [b"--b\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts]
    return b"".join(lines) + b"--b--\r\n"


PART = st.tuples(
    st.sampled_from(
        [
            b'content-disposition: form-data; name="name"',
            b'content-disposition: form-data; name="adapter_config"; filename="../../x"',
            b'content-disposition: form-data; name="adapter_model"; filename="x"',
            b'content-disposition: form-data; name="other"',
            b"content-disposition: form-data",
            b"x",
        ]
    )
    | st.binary(max_size=20),
    st.sampled_from([b"x", b"{}", b'{"r": 1}', b"\x08\0\0\0\0\0\0\0{}      "])
    | st.binary(max_size=40),
)
BODY = st.one_of(
    st.binary(max_size=60),
    FIELDS.map(lambda body: json.dumps(body).encode()),
    JSON.map(lambda body: json.dumps(body).encode()),
    st.just(b"[" * 20_000),
    st.lists(PART, max_size=4).map(multipart),
    st.tuples(st.lists(PART, max_size=4).map(multipart), st.integers(0, 99)).map(
        lambda found: found[0][: found[1]]
    ),
)
KINDS = [
    *(b"application/json", b"multipart/form-data; boundary=b", b"multipart/form-data", b"text/x"),
    *(b"application/json; charset=x", b"", b"\xff", b"multipart/form-data; boundary=" + b"b" * 99),
]
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [b"content-type", b"authorization", b"content-length", b"x-request-id", b"accept"]
        ),
        st.sampled_from(KINDS) | st.binary(max_size=20) | st.sampled_from([b"-1", b"9" * 30]),
    ),
    max_size=3,
)
QUERIES = st.sampled_from(
    [b"", b"limit=0", b"limit=x", b"limit=99999999999999999999", b"after=x", b"after=%ff", b"&&="]
) | st.binary(max_size=12)

REQUEST = {
    "method": st.sampled_from(METHODS) | TEXT,
    "path": st.sampled_from(PATHS),
    "parts": st.tuples(TEXT, TEXT) | st.just(("x", "x")),
    "who": st.sampled_from([0, 0, 1, 1, 1, None]),  # of two clients, or nobody
    "headers": HEADERS,
    "kind": st.sampled_from(KINDS),
    "query": QUERIES,
    "body": BODY,
}


def always(function):
    """Among the inputs of `function` is one for each of the statuses 200, 400, 401, 404 and 405,
    which a small draw may not come to."""
    plain = {"parts": ("x", "x"), "headers": [], "kind": b"application/json", "query": b""}
    for method, path, who, body in (
        ("GET", "/v1/models", 0, b""),
        ("POST", "/v1/adapters", 0, b"{]"),
        ("GET", "/v1/models", None, b""),
        ("GET", "/v1/adapters/{}", 0, b""),
        ("PATCH", "/v1/models", 0, b""),
    ):
        function = example(method=method, path=path, who=who, body=body, **plain)(function)
    return function


@pytest.fixture
def server(path, file, key):
    """With one key that may do everything, and one of a tenant."""
    texts = [
        key("ops", rights=["admin"]),
        key("t", tenant="t", rights=["use", "upload"], limits={"adapters": 3}),
    ]
    with guarded(path, file, max_adapter_bytes=1 << 20) as started:
        started.clients = [Client(started, text) for text in texts]
        yield started
        # It is alive, and has kept what it had.
        for client in started.clients:
            assert client.ask("base").status_code == 200
        assert len(started.clients[0].models()) >= 4
        assert not list((path / "incoming").glob("*/*"))
        assert not list(path.parent.glob("x"))


def judge(status, body, what, ours=True):
    """That an answer is none of a fault of ours, and says why in a form that clients read; `ours`:
    of a route of ours, none of vLLM's."""
    assert status < 500 or status in (502, 503, 507), (status, body, what)
    assert b"Traceback" not in body and b'File "' not in body
    if status >= 400 and body and status not in (404, 405):
        found = json.loads(body)
        stock = not ours and found.get("detail") == "There was an error parsing the body"
        error = found.get("error")
        assert stock or error == "Unauthorized" or (error["message"] and error["type"]), what


def test_no_request_is_answered_with_a_fault_of_ours(server, caplog):
    app, seen = server.http.app, Counter()

    @always
    @given(**REQUEST)
    @settings(max_examples=INPUTS * 2 // 3, **FUZZ)
    def send(method, path, parts, who, headers, kind, query, body):
        text = b"" if who is None else server.clients[who].text.encode()
        heads = [(b"content-type", kind), (b"authorization", b"Bearer " + text), *headers]
        status, answer = server.http.portal.call(
            ask, app, method, path.format(*parts), query, heads, body
        )
        seen[status] += 1
        judge(status, answer, (method, path, parts, heads, query, body), path.startswith(OURS))

    send()
    assert {200, 400, 401, 404, 405} <= seen.keys(), seen
    assert "Traceback" not in caplog.text


UNREADABLE = {  # body → what is said of it
    b"\xff\xfe\x00": "JSON",
    b"[" * 30_000: "JSON",
    b"{]": "JSON",
    b'{"x": 1}': ": ",
    b"[1]": ": ",
    b'"x"': ": ",
    b'{"refit": "x", "generation": "x", "name": 1, "source": [], "blend": 1}': ": ",
}


def test_every_route_of_ours_says_of_every_body_what_is_wrong_with_it(server):
    """All of those of the OpenAPI that take one, and those whose query is wrong."""
    admin = server.clients[0]
    ours = {
        (method, route.path_format)
        for route in server.http.app.routes
        for method in getattr(route, "methods", ())
        if getattr(route, "endpoint", guarded).__module__.startswith("vllm_jd.")
    }
    described = admin.get("/openapi.json").json()["paths"]
    taken = Counter()
    for path, methods in described.items():
        for method, operation in methods.items():
            if (method.upper(), path) not in ours:
                continue
            taken[method] += 1
            url = path.replace("{name}", "x").replace("{model}", "x")
            bodies = UNREADABLE if "requestBody" in operation else {}
            for body, said in bodies.items():
                heads = {"content-type": "application/json"}
                reply = admin.__getattr__(method)(url, content=body, headers=heads)
                assert reply.status_code == 400, (method, path, body[:20], reply.text)
                error = reply.json()["error"]
                assert error["type"] == "BadRequestError" and error["code"] == 400
                assert said in error["message"] and "Traceback" not in error["message"]
            for query in operation.get("parameters", ()):
                if query["in"] == "query" and query["name"] == "limit":
                    error = admin.get(url, params={"limit": "x"}).json()["error"]
                    assert (error["param"], error["code"]) == ("limit", 400)
                    assert "integer" in error["message"]
    assert taken == {"get": 5, "post": 6, "put": 1, "delete": 1}


async def ask(app, method, path, query, headers, body):
    found = []

    async def send(message):
        found.append(message)

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "query_string": query}
    scope |= {"headers": headers, "scheme": "http", "server": ("x", 1), "client": ("x", 1)}
    await app(scope, receive, send)
    return found[0]["status"], b"".join(message.get("body", b"") for message in found[1:])


def test_what_openapi_promises_is_kept(server, caplog):
    described = server.clients[0].get("/openapi.json").json()
    # Those of vLLM's own routes take long to make: only where many are asked for.
    stock = () if INPUTS > 1000 else ("completions",)

    def send(method, url, headers, body, who):
        heads = {**headers, **server.clients[who].headers}
        reply = server.http.request(method, url, headers=heads, content=body)
        return reply.status_code, reply.content

    seen = what_openapi_promises(described, stock, INPUTS // 3, send)
    assert {path for path, _ in seen} >= {"/v1/adapters", "/v1/models", "/v1/adapters/{name}"}
    assert {status for _, status in seen} >= {200, 400, 403, 404}, seen
    assert "Traceback" not in caplog.text


def what_openapi_promises(described, left_out, count, send):
    """schemathesis makes requests from what a server says of itself, good and bad ones; how often
    each path was answered with each status.

    `left_out`: words of paths. `send(method, url, headers, body, who)` sends one of about `count`,
    as client 0 (who may do everything) or 1, and says (status, body).
    """
    schemathesis = pytest.importorskip("schemathesis")
    import requests

    schema = schemathesis.openapi.from_dict(described)
    operations = [each.ok() for each in schema.get_all_operations()]
    ours = [
        each
        for each in operations
        if each.path.startswith((*OURS, "/v1/completions"))
        and not any(word in each.path for word in left_out)
    ]
    assert {"/v1/adapters", "/v1/adapters/{name}", "/v1/store"} <= {each.path for each in ours}
    modes = schemathesis.GenerationMode
    each_gets = max(2, count // len(ours) // 2)
    seen = Counter()
    for operation in ours:
        for mode in (modes.POSITIVE, modes.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode), who=st.sampled_from([0, 1, 1]))
            @settings(max_examples=each_gets, **FUZZ)
            def once(case, who):
                if case.path in ("/v1/recompress",) and who == 0:
                    return  # it would start processes
                kwargs = case.as_transport_kwargs(base_url="http://testserver")
                names = ("method", "url", "headers", "params", "json", "data", "files", "cookies")
                asked = requests.Request(**{name: kwargs.get(name) for name in names}).prepare()
                url = asked.url.removeprefix("http://testserver")
                status, body = send(asked.method, url, asked.headers, asked.body, who)
                seen[case.path, status] += 1
                judge(status, body, case.as_curl_command(), ours=case.path.startswith(OURS))

            try:
                once()
            except schemathesis.errors.InvalidSchema:
                raise
            except Exception as error:
                if "Unsatisfiable" in type(error).__name__ or "SkipTest" in type(error).__name__:
                    continue  # no bad input there, such as for what takes none
                raise
    return seen


def test_the_answer_of_a_request_without_a_body_is_one(server):
    """What `answer_of` sends has no query and few headers, as some clients send it."""
    app = server.http.app
    status, body = server.http.portal.call(answer_of, app, "POST", "/v1/adapters")
    assert (status, body) == (401, b'{"error":"Unauthorized"}')
