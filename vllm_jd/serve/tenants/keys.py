"""The file of API keys: who may ask a server for what, and how much.

    {"format": 1, "keys": [{"name": "acme-1", "sha256": "…", "tenant": "acme",
                            "rights": ["use", "upload"], "adapters": ["*"],
                            "limits": {"requests": 8, "tokens_per_minute": 60000, "adapters": 50}}]}

A key is known by the sha256 of its text: keys are made of 256 random bits, so that nothing slower
is needed to keep them from being guessed.
"""

import hashlib
import re
import secrets
import time
from pathlib import Path
from typing import Literal

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_jd.store.files import replace_text

Right = Literal["use", "upload", "metrics", "admin"]

_PREFIX = "sk-jd-"
_FORMAT = 1
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_LOCK_SECONDS = 10
_FIELDS = ConfigDict(extra="forbid", frozen=True)


class KeyFileError(ValueError):
    """The file cannot be read or changed; the message says what was found and expected."""


class Limits(BaseModel):
    """How much a key may ask for; None: as much as there is.

    Attributes:
        requests: that are being answered at a time.
        tokens_per_minute: of prompts and answers together.
        adapters: in its tenant's name space; more are not taken.
        bytes: of their weights, as they came; more are not taken.
    """

    model_config = _FIELDS

    requests: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    adapters: int | None = Field(default=None, ge=0)
    bytes: int | None = Field(default=None, ge=0)


class Key(BaseModel):
    """One key.

    Attributes:
        name: by which it is listed and removed.
        sha256: hex, of its text.
        tenant: whose it is. The adapters `tenant/…` are the tenant's own.
        rights: `use` adapters, `upload` own ones, read `metrics`, `admin`: all of the server.
        adapters: globs over the names of the others that it may use. `*` and `?` stop at a `/`,
            `**` does not.
        limits: how much it may ask for.
        created_at: seconds since 1970.
    """

    model_config = _FIELDS

    name: str = Field(pattern=_NAME)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tenant: str | None = Field(default=None, pattern=_NAME)
    rights: frozenset[Right] = Field(default=frozenset({"use"}), min_length=1)
    adapters: tuple[str, ...] = ("*",)
    limits: Limits = Limits()
    created_at: float | None = None

    @field_validator("adapters")
    @classmethod
    def _not_blank(cls, found: tuple[str, ...]) -> tuple[str, ...]:
        if not all(found):
            raise ValueError("found an empty glob, expected one such as *, team/* or **")
        return found

    @model_validator(mode="after")
    def _fits(self) -> "Key":
        if "admin" in self.rights and self.tenant is not None:
            raise ValueError(
                f"found the right admin and the tenant {self.tenant!r}; expected no tenant: an "
                "admin's is the whole server"
            )
        if "upload" in self.rights and "admin" not in self.rights and self.tenant is None:
            raise ValueError("found the right upload, expected a tenant, whose adapters they are")
        return self

    def may(self, right: str) -> bool:
        """Whether it has a right."""
        return right in self.rights or "admin" in self.rights


class KeyFile(BaseModel):
    """The keys of one file."""

    model_config = _FIELDS

    format: Literal[1]
    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _differ(self) -> "KeyFile":
        for what in ("name", "sha256"):
            found = [getattr(key, what) for key in self.keys]
            twice = next((each for each in found if found.count(each) > 1), None)
            if twice is not None:
                raise ValueError(f"found the {what} {twice!r} twice, expected it once")
        return self


def digest_of(text: str) -> str:
    """The `sha256` of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(file: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        KeyFileError: it cannot be read, or is not of this form.
    """
    try:
        return KeyFile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise KeyFileError(
            f"{file}: cannot be read: {error.strerror}; expected a file of keys (`vllm-jd keys add "
            "FILE NAME` makes one)"
        ) from None
    except ValidationError as error:
        raise KeyFileError(f"{file}: {_told(error)}") from None


def add_key(file: Path, **fields: object) -> tuple[str, Key]:
    """Make a key, and add it to a file, which need not be there.

    Args:
        file: is replaced at once; servers that read it follow.
        fields: of the `Key`, without `sha256`.

    Returns:
        Its text, which is nowhere else, and what the file has of it.

    Raises:
        KeyFileError: there is a key of that name, the fields are not good, or the file is not.
    """
    text = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(sha256=digest_of(text), created_at=time.time(), **fields)
    except ValidationError as error:
        raise KeyFileError(_told(error)) from None
    with _locked(file):
        keys = read_keys(file).keys if file.exists() else ()
        if any(each.name == key.name for each in keys):
            raise KeyFileError(
                f"{file}: found a key {key.name!r} already; choose another name, or remove that one"
            )
        _write(file, (*keys, key))
    return text, key


def remove_key(file: Path, name: str) -> None:
    """Take a key out of a file: servers that read it refuse it within a second.

    Raises:
        KeyFileError: there is no key of that name, or the file is not good.
    """
    with _locked(file):
        keys = read_keys(file).keys
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            names = ", ".join(key.name for key in keys[:20]) or "none"
            raise KeyFileError(f"{file}: found no key {name!r}; there are: {names}")
        _write(file, left)


def glob_pattern(glob: str) -> str:
    """A regular expression (with `re.DOTALL`) of the names that a glob means: `*` and `?` stop at a
    `/`, `**` does not; all else is itself."""
    parts = re.split(r"(\*\*|\*|\?)", glob)
    means = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(means.get(part) or re.escape(part) for part in parts)


def _locked(file: Path) -> filelock.BaseFileLock:
    if not file.parent.is_dir():  # which the lock would make
        raise KeyFileError(f"{file}: cannot be written: there is no folder {file.parent}")
    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"))
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except filelock.Timeout:
        raise KeyFileError(f"{file}: held by another process for {_LOCK_SECONDS} s") from None
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be written: {error.strerror}") from None
    return lock


def _write(file: Path, keys: tuple[Key, ...]) -> None:
    found = KeyFile(format=_FORMAT, keys=keys)
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        replace_text(file, found.model_dump_json(indent=2, exclude_defaults=True) + "\n")
        file.chmod(mode)
    except OSError as error:
        raise KeyFileError(f"{file}: cannot be written: {error.strerror}") from None


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
