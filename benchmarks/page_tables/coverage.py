"""Tables of what works where, on `docs/matrix.md`."""

from __future__ import annotations

from typing import Any

from page_tables.common import table_row

_PEERS = {"dbcache": "cache-dit", "first-block": "diffusers, first block"}
_COLUMNS = {
    "transformer": {"hidden": "hidden", "output": "output", "module": "module", **_PEERS},
    "unet": {"output": "output", "deep": "deep"},
}


def matrix_table(result: dict[str, Any]) -> str:
    """Markdown of `matrix.json`: linear layers that ran, as a share of the plain run's."""
    methods = list(next(iter(result["cells"].values())))
    lines = [table_row(["transformer", *methods]), "|---" + "|--:" * len(methods) + "|"]
    for family, cells in result["cells"].items():
        texts = []
        for cell in (cells[m] for m in methods):
            texts.append(f"{cell['linears']:.2f}" if cell["exact"] and not cell["traces"] else "**fails**")
        lines.append(table_row([family.replace("Transformer2DModel", "").replace("Transformer3DModel", ""), *texts]))
    environment = result["environment"]
    lines += [
        "",
        f"torch {environment['torch']}, diffusers {environment['diffusers']}, {result['steps']} steps, "
        "about half of them computed.",
    ]
    return "\n".join(lines)


def _denoisers(result: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: row["cells"] for name, row in result["denoisers"].items() if row["kind"] == kind}


def denoisers_table(result: dict[str, Any], kind: str) -> str:
    """Markdown of `denoisers.json`: the layers that a skipped step runs, as a share of a computed one's."""
    columns = _COLUMNS[kind]
    lines = [table_row([kind.replace("unet", "UNet"), *columns.values()]), "|---" + "|--:" * len(columns) + "|"]
    rows = _denoisers(result, kind)
    for name, cells in rows.items():
        lines.append(table_row([name, *(_verdict(cells[column]) for column in columns)]))
    totals = [f"{sum(cells[c]['status'] == 'right' for cells in rows.values())} of {len(rows)}" for c in columns]
    environment = result["environment"]
    lines += [
        table_row(["**right**", *totals]),
        "",
        f"torch {environment['torch']}, diffusers {environment['diffusers']}; tiny models, whose embeddings and "
        "refiners are a large part of them.",
    ]
    return "\n".join(lines)


def _verdict(cell: dict[str, Any]) -> str:
    if cell["status"] == "right":
        return f"{cell['share']:.2f}"
    return {"refused": "-", "an output is lost": "differs"}.get(cell["status"], cell["status"])


def coverage(result: dict[str, Any]) -> str:
    """How many denoisers are right, in two sentences."""

    def count(kind: str, *sites: str) -> int:
        rows = _denoisers(result, kind).values()
        return sum(any(cells[site]["status"] == "right" for site in sites) for cells in rows)

    transformers, unets = (len(_denoisers(result, kind)) for kind in ("transformer", "unet"))
    version = result["environment"]["diffusers"]
    right, hidden = count("transformer", "hidden", "output"), count("transformer", "hidden")
    dbcache, first_block = count("transformer", "dbcache"), count("transformer", "first-block")
    return (
        f"Of the {transformers} transformers that diffusers {version} ships, {right} are right at some site and "
        f"{hidden} at the hidden one (cache-dit {dbcache}, diffusers' first-block cache {first_block}). "
        f"Of its {unets} UNets {count('unet', 'output')} are right at the output, and {count('unet', 'deep')} with "
        "their inner levels forecast as DeepCache does."
    )
