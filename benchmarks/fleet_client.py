"""A client that changes a server's fleet over HTTP."""

import json
from pathlib import Path
from typing import Any

import aiohttp

FILES = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}


class FleetClient:
    """Uploads, deletes and asks about adapters; what is refused is noted in `errors`.

    Args:
        http: with the headers that it needs.
        url: of the server, without path.
        errors: where refusals are noted.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, errors: list[str]):
        self.http, self.url, self.errors = http, url, errors

    async def upload(self, name: str, folder: Path, *, new: bool = False) -> None:
        """Upload a folder; `new`: as one that the server has not seen."""
        await self._send("POST", "/v1/adapters", folder, name, new=new)

    async def put(self, name: str, folder: Path) -> None:
        """Give a name the adapter of a folder, whatever it had."""
        await self._send("PUT", f"/v1/adapters/{name}", folder, None)

    async def _send(
        self, method: str, path: str, folder: Path, name: str | None, *, new: bool = False
    ) -> None:
        form = aiohttp.FormData()
        if name is not None:
            form.add_field("name", name)
        for part, file in FILES.items():
            content = (folder / file).read_bytes()
            if new and part == "adapter_config":
                content = json.dumps(json.loads(content) | {"revision": name}).encode()
            form.add_field(part, content, filename=file)
        async with self.http.request(method, self.url + path, data=form) as reply:
            await self._check(reply)

    async def delete(self, name: str) -> None:
        """Delete an adapter."""
        async with self.http.delete(f"{self.url}/v1/adapters/{name}") as reply:
            await self._check(reply)

    async def post(self, path: str) -> None:
        """Ask for what a path does."""
        async with self.http.post(self.url + path) as reply:
            await self._check(reply)

    async def store(self) -> Any:
        """What the server says of its store."""
        async with self.http.get(f"{self.url}/v1/store") as reply:
            await self._check(reply)
            return await reply.json()

    async def last(self) -> dict[str, Any]:
        """What the server says of its last recompression; empty: there was none."""
        return (await self.store())["recompression"]["last"] or {}

    async def _check(self, reply: aiohttp.ClientResponse) -> None:
        if reply.status >= 400:
            self.errors.append(f"{reply.method} {reply.url.path}: {(await reply.text())[:300]}")
