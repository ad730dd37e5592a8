"""The page of geffect.py."""

from __future__ import annotations

import math
from typing import Any

from geffect_ways import CASES, DERIVED, EXACT, PUBLISHED_BATCH, SWEEP
from pages import gib, matrix_line, page, span, table, target_table

RATIOS = {"of_c": "x c", "faster_than_e": "faster than e by", "faster_than_e_padded": "than e_padded by"}


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = f"| case | what | seconds | of it V | {' | '.join(RATIOS.values())} | TFLOPs | of matrix speed | peak GiB |"
    cases = [case_cells(name, results) for name in CASES if name in results["cases"]]
    notes = [
        "Medians over the rounds (smallest..largest). x c: seconds over those of c in the same round, and so on.",
        matrix_line(results["matrix_flops_per_second"]),
        "Peak memory is beside the loaded model, of the case alone in a process.",
        *padded_note(results),
        f"c x {len(SWEEP)} is computed from the seconds of c, not run.",
        *site_note(results),
    ]
    return page(
        "The speed of G-effects",
        results,
        [row_line(results)],
        table(head, [*cases, *(derived_cells(name, results) for name in DERIVED)]),
        notes,
        agreement_lines(results),
        target_table(results["targets"], DERIVED),
    )


def row_line(results: dict[str, Any]) -> str:
    def of(name: str) -> str:
        part = results["tokens"][name]
        padded = f"with padding {part['with_padding']}"
        return f"{results['rows'][name]} ({part['real']} tokens, {part['labels']} of them labels; {padded})"

    batches = f"batches of {results['batch_size']}, published {PUBLISHED_BATCH}"
    return f"Rows to forget: {of('forget')}; to keep: {of('retain')}; {batches}."


def case_cells(name: str, results: dict[str, Any]) -> list[str]:
    case = results["cases"][name]
    v = "" if case["seconds_of_v"] is None else f"{case['seconds_of_v']:.3g}"
    share = f"{case['share_of_matrix_speed']['median']:.0%}"
    own = [f"{case['flops'] / 1e12:.3g}", share, gib(case["peak_memory"])]
    return [name, CASES[name].text, *timed_cells(name, v, results), *own]


def derived_cells(name: str, results: dict[str, Any]) -> list[str]:
    return [DERIVED[name], f"plain, totals of {len(SWEEP)} objectives", *timed_cells(name, "", results), "", "", ""]


def timed_cells(name: str, v: str, results: dict[str, Any]) -> list[str]:
    ratios = [f"{results[key][name]['median']:.3g}" if results[key] else "" for key in RATIOS]
    return [span(results["seconds"][name]), v, *ratios]


def padded_note(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    if "e_padded" not in results["cases"] or rows["padded"] == rows["forget"]:
        return []
    return [f"e_padded ran on {rows['padded']} + {rows['padded']} rows; seconds and FLOPs are scaled to all rows."]


def site_note(results: dict[str, Any]) -> list[str]:
    seconds = results["seconds_to_find_sites"]
    return [] if seconds is None else [f"Finding the modules to tap, once for a model and not in a's seconds: {seconds:.3g} s."]


def agreement_lines(results: dict[str, Any]) -> list[str]:
    exact = [name for name in EXACT if name in results["cases"]]
    e = results["cases"]["c"]["effects"]
    lines = [
        f"e_u = {e[0]:.6g}, e_r = {e[1]:.6g} (c). {', '.join(exact)} agree:"
        f" the largest relative difference from c is {results['largest_difference']:.1e}."
    ]
    if "e" in results["cases"]:
        off, batches = results["differences"]["e"], math.ceil(results["rows"]["forget"] / PUBLISHED_BATCH)
        lines.append(
            f"The published moving average is off by {off[0]:.1%} (e_u) and {off[1]:.1%} (e_r) on the same rows,"
            f" in {batches} batches (e)."
        )
    return lines
