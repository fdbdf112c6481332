"""What a line of a drift report may say."""

from __future__ import annotations

import re

# Random weights may change all of a picture, or leave some of it to be measured.
TOLD = r"PSNR (inf|\d+\.\d) dB, SSIM (\d\.\d{3}|not measured) outside the \d{1,3}% edited|all edited"


def is_report(text: str, *labels: str) -> bool:
    """Whether a report has a line for each turn, by its number and label, and nothing else."""
    lines = [rf"{number}\. {re.escape(label)}: ({TOLD})" for number, label in enumerate(labels, 1)]
    return re.fullmatch("\n".join(lines), text) is not None
