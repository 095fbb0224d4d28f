"""Where an adapter that a client names may be loaded from while the server runs."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Refusal:
    """Why a `lora_path` is refused: what was found and expected.

    `forbidden` says that the path may not be loaded from, rather than that it is none.
    """

    message: str
    forbidden: bool


@dataclass(frozen=True)
class AdapterPaths:
    """The rule: folders inside of `roots`, symbolic links followed, and names of the Hub if
    `remote`. A path means what it means to vLLM: `~` is the server's home, and a relative one that
    does not exist is a name of the Hub.
    """

    roots: tuple[str, ...] = ()
    remote: bool = False

    def refusal(self, lora_path: str) -> Refusal | None:
        """Why an adapter may not be loaded from `lora_path`; None: it may be.

        A folder inside of a root that does not exist may be: vLLM says that it is not there. Of one
        outside of the roots it is not told whether it exists.
        """
        if "\0" in lora_path:
            return Refusal(f"lora_path {lora_path!r}: found a NUL, expected a path", False)
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

    def _inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(os.path.realpath(root)) for root in self.roots)

    def _listed(self) -> str:
        return ", ".join(self.roots) or "one that --adapter-root names at the start (none is named)"
