"""The rule that predictions and references come in pairs."""

from collections.abc import Sequence


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse lists that are empty or do not belong together.

    Raises:
        ValueError: names both lengths.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; give one prediction "
            "for each reference, and at least one."
        )
