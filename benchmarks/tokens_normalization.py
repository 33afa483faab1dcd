"""Which rows a tree is to be made of, raw or scaled to unit length: measured on a tokenizer of each kind.

    python benchmarks/tokens_normalization.py       -> tokens-normalization.json

Two small tokenizers of emoji scenes are trained, which differ in how codes are looked up: by direction (as LlamaGen's,
with latents and codes of unit length) and by distance (as VQGAN's). The rows of the first have no length that means
anything; they get random ones, log-normal, as a checkpoint may hold them. Then the semantic replacement test, under
trees of raw rows and of unit rows, for the members of both.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from hasten.bench.environment import environment
from hasten.io import write_atomically
from hasten.tokens import MemberSampler, SemanticTree, kmeans_map
from hasten.tokens.comparators import adjusted_rand
from hasten_zoo.emoji_tokens.data import HELD_OUT, TRAIN, images
from hasten_zoo.emoji_tokens.tokenizer import DECAY, RARE, TokenizerConfig, VQTokenizer
from torch import Tensor

OUT = Path(__file__).parent / "tokens-normalization.json"
PLAIN, BATCH, LR = 100, 32, 2e-3
SPREAD = 0.5  # of the logarithm of the random lengths


class DistanceTokenizer(VQTokenizer):
    """Looks codes up by distance; lengths are free."""

    def latents(self, images: Tensor) -> Tensor:
        """Vectors `[B, h, w, D]`."""
        return self.encoder(images * 2 - 1).permute(0, 2, 3, 1)

    def lookup(self, latents: Tensor) -> Tensor:
        """Nearest codes `[B, h, w]`."""
        return (latents @ self.codebook.T - self.codebook.square().sum(-1) / 2).argmax(-1)

    @torch.no_grad()
    def _move(self, tokens: Tensor, latents: Tensor) -> None:
        n, flat, index = self.config.codes, latents.flatten(0, 2), tokens.flatten()
        even = n / len(index)
        self.usage.lerp_(even * torch.bincount(index, minlength=n).float(), 1 - DECAY)
        self.sums.lerp_(even * torch.zeros_like(self.sums).index_add_(0, index, flat), 1 - DECAY)
        self.codebook.copy_(self.sums / self.usage.clamp_min(1e-6)[:, None])
        rare = torch.nonzero(self.usage < RARE).flatten()
        if len(rare):
            self._put(rare, flat[torch.randint(len(flat), (len(rare),))])


def trained(kind: type[VQTokenizer], codes: int, steps: int, seed: int) -> VQTokenizer:
    """A tokenizer after a short training."""
    torch.manual_seed(seed)
    tokenizer = kind(TokenizerConfig(codes=codes, channels=32)).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        if step == PLAIN:
            tokenizer.begin(images(64, TRAIN + step).pixels)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 50, max(0.02, (1 - step / steps) / 0.4))
        loss, _ = tokenizer.loss(images(BATCH, TRAIN + step).pixels, quantized=step >= PLAIN)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
    return tokenizer.eval().requires_grad_(False)


def measured(tokenizer: VQTokenizer, rows: Any, seeds: int) -> list[dict[str, Any]]:
    """PSNR in dB of held-out images with members for tokens, by clusters and rows."""
    pixels = images(256, HELD_OUT).pixels
    tokens = tokenizer.encode(pixels)
    seen = torch.cat([tokenizer.encode(images(256, TRAIN + 50_000 + i).pixels) for i in range(8)])
    used = np.bincount(seen.flatten().numpy(), minlength=tokenizer.config.codes)
    plain = psnr(tokenizer.decode(tokens), pixels)
    found: list[dict[str, Any]] = []
    for k in (int((used > 0).sum()) // 2, int((used > 0).sum()) // 4):
        maps = {n: SemanticTree.fit(rows, normalize=n, used=used).map(k) for n in ("none", "unit")}
        agreement = adjusted_rand(*(m.labels[used > 0] for m in maps.values()))
        for name, mapping in maps.items():
            means = kmeans_map(rows, k, normalize=name, used=used, runs=3)
            for how, one in (("masc", mapping), ("k-means", means)):
                values = [
                    psnr(
                        tokenizer.decode(torch.from_numpy(MemberSampler.make(one)(one(tokens.numpy()), seed))),
                        pixels,
                    )
                    for seed in range(seeds)
                ]
                row = {
                    "k": k,
                    "rows": name,
                    "clusters": how,
                    "psnr": float(np.mean(values)),
                    "plain": plain,
                }
                found.append(
                    row
                    | {
                        "used": int((used > 0).sum()),
                        "adjusted_rand_none_unit": agreement,
                    }
                )
    return found


def psnr(drawn: Tensor, target: Tensor) -> float:
    """In dB, over all images together."""
    return -10 * float((drawn - target).square().mean().log10())


def main(
    codes: Annotated[int, typer.Option(help="Of each tokenizer.")] = 512,
    steps: Annotated[int, typer.Option(help="Of the training.")] = 800,
    seeds: Annotated[int, typer.Option(help="Of the members.")] = 3,
) -> None:
    """Train both tokenizers, and measure."""
    result: dict[str, Any] = {}
    for name, kind in (("direction", VQTokenizer), ("distance", DistanceTokenizer)):
        tokenizer = trained(kind, codes, steps, seed=0)
        rows = tokenizer.codebook.numpy().copy()
        lengths = np.linalg.norm(rows, axis=1)
        if name == "direction":
            rows *= np.exp(SPREAD * np.random.default_rng(0).standard_normal((codes, 1)))
        else:
            result["length_spread"] = float(lengths.std() / lengths.mean())
        result[name] = measured(tokenizer, rows, seeds)
        print(json.dumps(result[name], indent=1), flush=True)
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    settings = {"codes": codes, "steps": steps, "seeds": seeds}
    write_atomically(OUT, json.dumps({**facts, **settings, **rounded}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
