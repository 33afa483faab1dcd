"""Pictures of edits for the page of SpecEdit: source, target, the plain sampler and some arms of a bench result.

    python benchmarks/edit_pictures.py out/emoji-kontext.json docs/images/specedit.png

The JSON and its folder of pictures are those of `hasten bench --model emoji-kontext`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from hasten import zoo
from hasten.bench.sheet import contact_sheet, to_pil

ARMS = {
    "euler-50": "plain|50 steps",
    "euler-8": "plain|8 steps",
    "specedit:discrepancy=latent-20": "specedit|8 + 10 + 2",
    "specedit:discrepancy=latent:draft=6:mixed=4:final=2-12": "specedit|6 + 4 + 2",
    "bottleneck:stages=9/9-18": "bottleneck|9 + 9",
    "ralu:preset=18-18": "ralu|18",
}
EDITS = 8


def main(result_file: Path, out: Path) -> None:
    """Write the sheet."""
    result = json.loads(result_file.read_text())
    rows = {row["id"]: row for row in result["rows"]} | {"euler-50": result["baseline"]}
    edits = {edit.prompt: edit for edit in zoo.load("emoji-kontext").edits}
    prompts = result["settings"]["prompts"][:EDITS]
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for i, prompt in enumerate(prompts):
            own = [Path(folder) / f"{i}-{name}.png" for name in ("source", "target")]
            to_pil(edits[prompt].source).save(own[0])
            to_pil(edits[prompt].target).save(own[1])
            lines.append([*own, *(result_file.parent / rows[arm]["images"][i] for arm in ARMS)])
        contact_sheet(lines, prompts, ["source", "target", *ARMS.values()], side=96).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
