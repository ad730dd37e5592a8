"""A report of runs: one page of HTML with all that was measured of them, side by side. It measures nothing itself.

    python report.py icml/tiny/npo_kl_0.0008_forget10_5_0.0_None
    python report.py RUN_A RUN_B RUN_C --out report.html

The page opens from the disk and asks for nothing from anywhere; what was not measured, it says the command for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from app import arguments

USAGE = "report.py RUN [RUN ...] [--out FILE.html]"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError for what a user got wrong."""
    parser = arguments.parser(__doc__, USAGE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of an unlearning run")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="left out: report.html in the first run's folder")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix not in (".html", ".htm"):
        parser.error(f"--out={args.out}: needs to end in .html")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out={args.out}: is a folder")
    return args


def run(folders: list[str], out: Path | None = None) -> Path:
    """Write the report of these runs. Raises ValueError where one is none, or a table of it is not readable."""
    from app.reporting import find_runs
    from unlearn.reporting.report_page import write

    runs = find_runs(folders)
    file = out or runs[0].folder / "report.html"
    size = write(runs, file)
    print(f"{file} ({size / 1e6:.1f} MB)")
    return file


def main(argv: list[str]) -> int:
    """2 for what can be mended on the command line, 1 for what went wrong on the way."""

    def work() -> None:
        args = parse_args(argv)
        run(args.runs, args.out)

    return arguments.exit_code("report.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
