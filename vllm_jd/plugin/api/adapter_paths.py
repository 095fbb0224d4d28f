"""Where an adapter that a client names may be loaded from while the server runs."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

SCHEMES = ("hf", "s3", "gs", "az")
"""Of the addresses that adapters are fetched from: the Hugging Face Hub, and object stores."""

_SEGMENT = re.compile(r"\w[\w.-]*", re.ASCII)
_KINDS = {"collections", "datasets", "models", "spaces"}  # of the Hub, where an owner would stand


def is_address(text: str) -> bool:
    """Whether `text` is meant as an address rather than a path of this machine."""
    return "://" in text


def parse_address(text: str) -> tuple[str, ...]:
    """The parts of an address, the scheme first. Of `hf://org/name@revision/folder` the third
    part is the revision, or empty.

    Raises:
        ValueError: it is none of a known scheme; the message says what was expected.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ValueError(f"found the scheme {scheme[:40]!r}, expected one of {known}")
    parts = rest.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\x00-\x1f\x7f\\?#]|::", rest):
        raise ValueError(
            "found an address with empty parts, dots for parts, or characters that have a meaning "
            f"in URLs; expected {scheme}://{'org/name' if scheme == 'hf' else 'bucket/folder'}"
        )
    if scheme != "hf":
        if "@" in parts[0]:
            raise ValueError(f"found {parts[0]!r}, expected the name of a bucket alone")
        return (scheme, *parts)
    owner, name, *below = *parts, ""
    name, _, revision = name.partition("@")
    if not _SEGMENT.fullmatch(owner) or owner in _KINDS or (name and not _SEGMENT.fullmatch(name)):
        raise ValueError(
            "found no name of a model repository, expected hf://org/name, hf://org/name@revision "
            "or hf://org/name@revision/folder"
        )
    return (scheme, owner, *([name, revision, *below[:-1]] if name else []))


def _is_below(parts: tuple[str, ...], root: tuple[str, ...]) -> bool:
    if root[0] == "hf" and len(root) > 3 and not root[3]:  # any revision
        parts, root = parts[:3] + parts[4:], root[:3] + root[4:]
    return parts[: len(root)] == root


@dataclass(frozen=True)
class Refusal:
    """Why a `lora_path` is refused: what was found and expected.

    `forbidden` says that the path may not be loaded from, rather than that it is none.
    """

    message: str
    forbidden: bool


@dataclass(frozen=True)
class AdapterPaths:
    """The rule: folders inside of `roots`, symbolic links followed, what lies at or below one of
    `addresses`, and names of the Hub if `remote`. A path means what it means to vLLM: `~` is the
    server's home, and a relative one that does not exist is a name of the Hub.
    """

    roots: tuple[str, ...] = ()
    remote: bool = False
    addresses: tuple[str, ...] = ()

    def refusal(self, lora_path: str) -> Refusal | None:
        """Why an adapter may not be loaded from `lora_path`; None: it may be.

        A folder inside of a root that does not exist may be: vLLM says that it is not there. Of one
        outside of the roots it is not told whether it exists.
        """
        if "\0" in lora_path:
            return Refusal(f"lora_path {lora_path!r}: found a NUL, expected a path", False)
        if is_address(lora_path):
            return self._address_refusal(lora_path)
        path = Path(os.path.expanduser(lora_path))  # noqa: PTH111 - as vLLM: never an error
        local = path.is_absolute() or os.path.exists(path)  # noqa: PTH110 - nor here
        if self._inside(path):
            if local:
                return self._folder_refusal(lora_path, path)
        elif local or not self.remote:
            return Refusal(
                f"lora_path {lora_path!r}: found a path outside of the folders that adapters may "
                f"be loaded from; expected one inside of {self._listed()}",
                True,
            )
        if self.remote:
            return None
        return Refusal(
            f"lora_path {lora_path!r}: found no such folder, and names of the Hub are not taken by "
            f"this server (--allow-remote-adapters); expected a folder inside of {self._listed()}",
            True,
        )

    def _folder_refusal(self, lora_path: str, path: Path) -> Refusal | None:
        try:
            entries = list(path.iterdir())
        except FileNotFoundError:
            return None
        except OSError as error:
            return Refusal(
                f"lora_path {lora_path!r}: expected an adapter's folder ({error.strerror})", False
            )
        for entry in entries:
            if not self._inside(entry):
                return Refusal(
                    f"lora_path {lora_path!r}: found {entry.name!r}, a link to outside of the "
                    f"folders that adapters may be loaded from; expected all of it inside of "
                    f"{self._listed()}",
                    True,
                )
        return None

    def _address_refusal(self, address: str) -> Refusal | None:
        try:
            parts = parse_address(address)
        except ValueError as error:
            # A path of this machine, too, for all that is told.
            message = f"lora_path {address!r}: {error}, inside of {self._listed()}"
            return Refusal(message, True)
        if self.remote and parts[0] == "hf":
            return None
        if any(_is_below(parts, parse_address(root)) for root in self.addresses):
            return None
        return Refusal(
            f"lora_path {address!r}: found an address that adapters may not be loaded from; "
            f"expected one inside of {self._listed()}",
            True,
        )

    def _inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(os.path.realpath(root)) for root in self.roots)

    def _listed(self) -> str:
        named = ", ".join((*self.roots, *self.addresses))
        return named or "one that --adapter-root names at the start (none is named)"
