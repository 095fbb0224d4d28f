"""What right a request needs, by its method and path. What is not listed needs `admin`."""

import re

OPEN = frozenset({"/health", "/ping", "/version", "/dashboard"})
"""Asked for no key: probes, load balancers and browsers have none, and nothing of a tenant is told.
The dashboard is a page without contents, which asks for a key itself."""

_USE = {
    "GET": r"/v1/(models|adapters)(/.*)?",
    "POST": (
        r"/v1/(chat/completions(/batch|/render)?|completions(/render)?|responses(/render)?"
        r"|messages(/count_tokens|/render)?)|/tokenize|/detokenize|/invocations"
    ),
}
_UPLOAD = {"POST": r"/v1/adapters", "PUT": r"/v1/adapters/.+", "DELETE": r"/v1/adapters/.+"}
_METRICS = {"GET": r"/metrics/?"}
_NEEDS = {
    "use": _USE,
    "upload": _UPLOAD,
    "metrics": _METRICS,
}


def right_for(method: str, path: str) -> str:
    """The right that a request needs."""
    for right, routes in _NEEDS.items():
        if method in routes and re.fullmatch(routes[method], path, re.DOTALL):
            return right
    return "admin"


def generates(method: str, path: str) -> bool:
    """Whether the engine may have to answer a request, which has to queue for that."""
    return method == "POST" and right_for(method, path) == "use" and "tokenize" not in path
