"""The command ``lit-rlhf report``: a page with the charts and the responses of one or several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_rlhf.report.page import write_report


def main(args: Sequence[str]) -> None:
    """Run the command ``lit-rlhf report``.

    Args:
        args: The arguments that follow ``lit-rlhf report`` on the command line.

    Raises:
        UserError: if a folder is not a run's folder, if a run's samples or configuration cannot be parsed, if two
            folders are the same, or if the page cannot be written.
        SystemExit: if an argument is missing, unknown or wrong, or if it is ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lit-rlhf report",
        description="Write a page with the charts and the responses of a run, from the files in its folder alone, even "
        "while the run is in progress. With several runs, their curves are drawn in the same charts. The page is one "
        "file, which needs no network; each chart is also drawn as a PNG file, in a folder with the page's name.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run: runs/NAME")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="the page (default: report.html in the run's folder or, for several runs, beside the first run's folder)",
    )
    options = parser.parse_args(args)
    print(f"report: {write_report(options.runs, options.out)}")
