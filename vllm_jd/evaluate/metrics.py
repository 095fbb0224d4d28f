"""How well an answer does: Rouge, exact match, and the loss of what was to be said."""

from dataclasses import dataclass

from vllm_jd.evaluate.errors import EvaluateError

SCORES = ("rouge_l", "rouge_1", "exact", "loss")
"""The figures of a `Score`."""


@dataclass(frozen=True)
class Score:
    """Of one item: Rouge and exact match in 0 … 1, the loss of what was expected in nats a token,
    and what was answered."""

    rouge_l: float
    rouge_1: float
    exact: float
    loss: float
    said: str


class Scorer:
    """Compares answers with what was expected: Rouge-L and Rouge-1 as F-measures of stemmed words
    (of the letters a to z and digits; other scripts have none), as the paper's tables have them.

    Raises:
        EvaluateError: rouge-score is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "rouge_score":
                raise
            raise EvaluateError(
                "evaluating needs rouge-score, which is not installed: "
                "pip install 'vllm-jd[evaluate]'"
            ) from None
        self._rouge = RougeScorer(["rougeL", "rouge1"], use_stemmer=True)

    def score(self, expected: str, said: str, loss: float) -> Score:
        """The figures of an answer; space around it does not count."""
        said = said.strip()
        rouge = self._rouge.score(expected, said)
        return Score(
            rouge_l=rouge["rougeL"].fmeasure,
            rouge_1=rouge["rouge1"].fmeasure,
            exact=float(said == expected.strip()),
            loss=loss,
            said=said,
        )
