"""Get an adapter's two files into a folder: out of an HTTP body, or from where they lie.

Nothing here is checked but sizes; the folder is the caller's to delete.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import IO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read import hub
from vllm_jd.plugin.api.adapter_paths import is_address, parse_address
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.store.fleet import NAME_BYTES, UPLOAD_FILES, upload_folder

CONFIG_BYTES = 1 << 20
_PIECE = 1 << 20
PARTS = {"adapter_config": UPLOAD_FILES[0], "adapter_model": UPLOAD_FILES[1]}
"""The files of an upload, by their fields in multipart/form-data."""
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}


def limits(most: int) -> dict[str, int]:
    """How large each file may be, in bytes, where weights may have `most`."""
    return dict(zip(UPLOAD_FILES, (CONFIG_BYTES, most), strict=True))


class Multipart:
    """The body of an upload, as it comes in: field `name`, files `adapter_config` and
    `adapter_model`. Files are written as they come.

    Args:
        content_type: the request's.
        folder: gets the files.
        most: bytes of the weights.

    Raises:
        FleetFault: (this, and all methods) the body is not of this form, too large, or cannot be
            written.
    """

    def __init__(self, content_type: str, folder: Path, most: int):
        self._folder, self._limits = folder, limits(most)
        self._header, self._headers = [b"", b""], {}
        self._field: str | None = None
        self._file: IO[bytes] | None = None
        self._size = 0
        self._seen: set[str] = set()
        self._text = b""
        self._ended = False
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise FleetFault("found a body without a boundary, expected multipart/form-data")
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._more_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": lambda data, start, end: self._write(data[start:end]),
            "on_part_end": self._close,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise FleetFault(f"found a body that cannot be read: {error}") from None

    def write(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise FleetFault(f"found a body that is no multipart/form-data: {error}") from None
        except OSError as error:
            raise disk_fault(error) from error

    def finish(self, *, named: bool) -> str | None:
        """The field `name`, once the body has ended.

        Args:
            named: whether it must be there; otherwise it must not.
        """
        self.abandon()
        expected = {*PARTS, *(["name"] if named else [])}
        if not self._ended:
            raise FleetFault("found a body that ends within a part, expected all of it")
        if self._seen != expected:
            found = ", ".join(sorted(self._seen)) or "none"
            raise FleetFault(
                f"found the parts {found}; expected {', '.join(sorted(expected))}",
                param=min(expected ^ self._seen),
            )
        try:
            return self._text.decode() if named else None
        except UnicodeDecodeError:
            raise FleetFault("found a name that is not UTF-8", param="name") from None

    def abandon(self) -> None:
        """Close what is open. Harmless when repeated."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers, self._header = {}, [b"", b""]

    def _more_header(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _end_header(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in PARTS and name != "name":
            raise FleetFault(
                f"found a part {name[:40]!r}; expected name, {' and '.join(PARTS)}",
                param=name[:40],
            )
        if name in self._seen:
            raise FleetFault(f"found the part {name} twice, expected it once", param=name)
        self._seen.add(name)
        self._field, self._size = name, 0
        if name in PARTS:
            self._file = (self._folder / PARTS[name]).open("wb")

    def _write(self, data: bytes) -> None:
        self._size += len(data)
        if self._file is None:
            if self._size > NAME_BYTES:
                raise FleetFault(
                    f"found a name of more than {NAME_BYTES} bytes, expected a shorter one",
                    param="name",
                )
            self._text += data
            return
        most = self._limits[PARTS[self._field or ""]]
        if self._size > most:
            raise too_large(self._field or "", most)
        self._file.write(data)

    def _close(self) -> None:
        self.abandon()

    def _end(self) -> None:
        self._ended = True


def too_large(what: str, most: int) -> FleetFault:
    """The fault of a file that has more than `most` bytes."""
    return FleetFault(
        f"{what}: found more than {most:,} bytes, expected that many at most (weights: "
        "--max-adapter-size)",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        what,
    )


def disk_fault(error: OSError) -> FleetFault:
    """The fault of a store that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FleetFault(
        f"the store cannot be written ({error.strerror or error}); nothing has changed"
        + (": make room on its disk" if full else ""),
        HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.SERVICE_UNAVAILABLE,
    )


def fetch(source: str, folder: Path, most: int) -> str:
    """Copy an adapter's files from where they lie: a folder of this machine, the Hub, an object
    store. Whether they may be taken from there has been asked.

    Args:
        source: a path, or an address (`vllm_jd.plugin.api.adapter_paths`).
        folder: gets the files.
        most: bytes of the weights.

    Returns:
        The source, by the name that will mean the same files longest.

    Raises:
        FleetFault: there is no adapter, it is too large, or it cannot be had.
    """
    if not is_address(source):
        _copy_all(Path(source).expanduser(), source, folder, most)
        return source
    if parse_address(source)[0] == "hf":
        return _from_hub(source, folder, most)
    _from_object_store(source, folder, most)
    return source


def _copy_all(from_: Path, source: str, folder: Path, most: int) -> None:
    for name, limit in limits(most).items():
        try:
            with (from_ / name).open("rb") as file:
                _copy(file, folder / name, limit, f"{source}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(source, name) from None
        except OSError as error:
            raise FleetFault(
                f"{source}/{name}: cannot be read: {error.strerror}", param="source"
            ) from error


def _from_hub(source: str, folder: Path, most: int) -> str:
    if len(parse_address(source)) < 3:
        raise FleetFault(f"{source}: found an owner, expected hf://org/name", param="source")
    try:
        found = hub.fetch([source])
    except AdapterError as error:
        raise FleetFault("; ".join(error.faults), param="source") from None
    if len(found) != 1:
        raise FleetFault(
            f"{source}: found {len(found)} adapters ({found[0].address}, …), expected one: name "
            "its folder, hf://org/name@revision/folder",
            param="source",
        )
    _copy_all(found[0].folder, source, folder, most)
    return f"hf://{found[0].address}"


def _from_object_store(source: str, folder: Path, most: int) -> None:
    package = _PACKAGES[parse_address(source)[0]]
    try:
        import fsspec

        store, path = fsspec.core.url_to_fs(source, use_listings_cache=False)
    except ImportError:
        raise FleetFault(
            f"{source}: needs the package {package} on the server: pip install 'vllm-jd[remote]'",
            HTTPStatus.BAD_GATEWAY,
            "source",
        ) from None
    except Exception as error:  # such as no credentials, as each package has it
        raise _unreachable(source, error) from error
    for name, limit in limits(most).items():
        where = f"{source.rstrip('/')}/{name}"
        try:
            if store.info(f"{path.rstrip('/')}/{name}")["size"] > limit:
                raise too_large(where, limit)
            with store.open(f"{path.rstrip('/')}/{name}", "rb") as file:
                _copy(file, folder / name, limit, where)
        except FleetFault:
            raise
        except FileNotFoundError:
            raise _missing(source, name) from None
        except Exception as error:  # of any kind: each package has its own
            raise _unreachable(where, error) from error


def _copy(file: IO[bytes], to: Path, limit: int, where: str) -> None:
    pieces = _pieces(file, limit, where)
    try:
        with to.open("wb") as out:
            for piece in pieces:
                out.write(piece)
    except OSError as error:
        raise disk_fault(error) from error


def _pieces(file: IO[bytes], limit: int, where: str) -> Iterator[bytes]:
    size = 0
    while True:
        try:
            piece = file.read(_PIECE)
        except Exception as error:  # of any kind: an object store's packages have their own
            raise _unreachable(where, error) from error
        if not piece:
            return
        size += len(piece)
        if size > limit:
            raise too_large(where, limit)
        yield piece


def _missing(source: str, name: str) -> FleetFault:
    return FleetFault(
        f"{source}: found no {name}, expected an adapter as PEFT saves it "
        f"({' and '.join(UPLOAD_FILES)})",
        HTTPStatus.NOT_FOUND,
        "source",
    )


def _unreachable(where: str, error: Exception) -> FleetFault:
    return FleetFault(
        f"{where}: cannot be read: {error or type(error).__name__}",
        HTTPStatus.BAD_GATEWAY,
        "source",
    )


def has_room(folder: Path, size: int) -> bool:
    """Whether so many bytes more find room on a folder's disk."""
    try:
        return shutil.disk_usage(folder).free > size
    except OSError:
        return True


def weights_bytes(store: Path, digest: str) -> int | None:
    """Size of an upload's weights; None: they are gone, and requests with them say so."""
    try:
        return (upload_folder(store, digest) / UPLOAD_FILES[1]).stat().st_size
    except OSError:
        return None
