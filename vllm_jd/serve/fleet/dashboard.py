"""`/dashboard`: one page that shows a running server. What it shows it asks for itself, with the
key that its reader gives it: `GET /v1/store`, `GET /v1/adapters`, `/metrics`."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from vllm_jd.plugin.api.errors import Route

router = APIRouter(route_class=Route)

_PAGE = files("vllm_jd.serve.fleet") / "dashboard.html"
_HEADERS = {
    # Nothing from elsewhere, and nowhere else to send anything.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/dashboard", response_class=HTMLResponse, include_in_schema=False)
async def dashboard() -> HTMLResponse:
    """The page; nothing of the server is in it."""
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_HEADERS)
