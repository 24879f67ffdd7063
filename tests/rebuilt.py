"""What every recipe's test asks of its report."""

from __future__ import annotations

from pathlib import Path

from align_cbrl.cli import main


def report_is_rebuilt(out: Path) -> bool:
    """Whether `align-cbrl report` writes the run's own page again, from the folder alone."""
    page = (out / "report.html").read_bytes()
    for file in (out / "report.html", *out.glob("*.png")):
        file.unlink()
    return main(["report", str(out)]) == 0 and (out / "report.html").read_bytes() == page
