"""What many runs say together: the rate each method is compared at, what the G-effect foretells, whose tokens and rows.

    python study.py runs icml/smollm2-135m/* --out docs/results/study     lines, rates, seeds, attacks: added to what is there
    python study.py predict --out docs/results/study                      rank correlations, of the lines
    python study.py order RUN/geffect/sweep.csv --out docs/results/study  a sweep's points beside the finished runs
    python study.py words RUN --out docs/results/study                    tokens: facts and the rest
    python study.py rows RUN --out docs/results/study                     which rows to forget hurt those to keep

It measures nothing itself: forget.py and compute_geffect.py do (config/experiment has their settings).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from app import arguments

USAGE = "study.py runs RUN [RUN ...] | predict | order SWEEP.csv [...] | words RUN [...] | rows RUN [...]   --out FOLDER"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError for what a user got wrong."""
    parser = arguments.parser(__doc__, USAGE)
    parser.add_argument("part", choices=("runs", "predict", "order", "words", "rows"))
    parser.add_argument("given", nargs="*", metavar="RUN", help="folders of unlearning runs; of order a sweep's table")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where tables and figures are")
    args = parser.parse_args(argv)
    if args.part == "predict" and args.given:
        parser.error(f"predict: reads the tables in --out, and takes no {args.given[0]}")
    if args.part != "predict" and not args.given:
        parser.error(f"{args.part}: needs {'SWEEP.csv' if args.part == 'order' else 'RUN, the folder of a run'}")
    return args


def run(part: str, given: list[str], out: Path) -> None:
    """Write the part's tables and figures into `out`. Raises ValueError for what is not there or not readable."""
    from app import studying

    match part:
        case "runs":
            studying.runs(given, out)
        case "predict":
            studying.predict(out)
        case "order":
            studying.order(given, out)
        case "words":
            studying.tell_words(given, out)
        case _:
            studying.tell_rows(given, out)


def main(argv: list[str]) -> int:
    """2 for what can be mended on the command line, 1 for what went wrong on the way."""

    def work() -> None:
        args = parse_args(argv)
        run(args.part, args.given, args.out)

    return arguments.exit_code("study.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
