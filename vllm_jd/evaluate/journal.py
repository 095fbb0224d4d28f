"""What has been answered, kept as it comes, so that a stopped evaluation goes on."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_jd.evaluate.errors import EvaluateError
from vllm_jd.evaluate.questions import Answer, Question


def question_key(question: Question, served: Any) -> str:
    """What an answer depends on, as one number: a question of the same key need not be asked again.

    Args:
        question: what is asked.
        served: JSON of what answers it beside the adapter: model, store, options.
    """
    parts = [question.asked, question.prompt, question.completion, question.digest, served]
    if question.folder is None:
        parts.append(question.adapter)  # the store's; of a folder the digest says whose it is
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """Answers by the keys of their questions, a line of a file each; without a file, in memory.

    Args:
        file: where they are kept. What is there is read; what a killed writer left of a line is
            passed over.

    Raises:
        EvaluateError: the file cannot be read.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._answers: dict[str, Answer] = {}
        self._torn = False
        if file is None or not file.exists():
            return
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise EvaluateError(f"{file}: cannot be read: {error.strerror or error}") from None
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                said = json.loads(line)
                self._answers[said["key"]] = Answer(str(said["said"]), float(said["loss"]))
            except (ValueError, KeyError, TypeError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, found: Iterable[tuple[str, Answer]]) -> None:
        """Keep answers; those that failed only until the end of this run.

        Raises:
            EvaluateError: the file cannot be written.
        """
        lines = []
        for key, answer in found:
            self._answers[key] = answer
            if answer.failed is None:
                kept = {"key": key} | {k: v for k, v in asdict(answer).items() if k != "failed"}
                lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
        if self._file is None or not lines:
            return
        try:
            with self._file.open("a", encoding="utf-8", errors="replace", newline="") as out:
                out.write("\n" * self._torn + "".join(lines))
        except OSError as error:
            raise EvaluateError(
                f"{self._file}: cannot be written: {error.strerror or error}"
            ) from None
        self._torn = False
