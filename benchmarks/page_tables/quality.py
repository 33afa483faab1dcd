"""Tables of certificates, on `docs/quality.md`."""

from __future__ import annotations

from typing import Any

from page_tables.common import cell, made_on, table_row


def certificates_table(result: dict[str, Any]) -> str:
    """Markdown of `certificates.json`: how often certificates were wrong, and what their settings cost."""
    procedures = {"sequence": "sequence", "holm": "Holm", "no test": "no test"}
    heads = ["tolerance", "may be wrong", *(f"wrong, {title}" for title in procedures.values()), "none certified"]
    heads += ["computed steps, oracle", *(f"{title}" for title in list(procedures.values())[:2]), "over the oracle"]
    lines = [table_row(heads), "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in result["rows"]:
        cells = [row["name"], f"{row['allowed']:.0%}", *(f"{row[name]['violated']:.1%}" for name in procedures)]
        cells.append(f"{row['sequence']['nothing_certified']:.1%}")
        cells.append("-" if row["oracle"] is None else str(row["oracle"]["computed_steps"]))
        cells += [cell(row[name]["computed_steps_mean"], 2) for name in ("sequence", "holm")]
        over = row["sequence"]["cost_over_oracle"]
        lines.append(table_row([*cells, "-" if over is None else f"{over - 1:+.0%}"]))
    one = result["rows"][0]
    lines += [
        "",
        f"{result['model']}, {result['population']} requests as the population, {one['resamplings']} certifications "
        f"per row, each on {one['requests']} requests drawn with replacement; adverse: a tolerance that the setting "
        "misses by a hair (94 % keep it); no test: the cheapest setting that keeps the tolerance on the same requests; "
        f"{made_on(result)}.",
    ]
    return "\n".join(lines)
