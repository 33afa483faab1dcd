"""Train the VQ tokenizer, and write the token shards (CPU is enough; resumable).

    python -m hasten.zoo.emoji_tokens.train_tokenizer --out runs/emoji-tokens --minutes 30

Run it again to go on. After the last step, or with `--export`, the folder holds `tokenizer.safetensors`,
`codebook.npy`, `fine/` (training pictures, eight variants of each) and `held_out/`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from hasten.tokens.shards import write_shards
from hasten.zoo.emoji_tokens.data import load_token_set, varied
from hasten.zoo.emoji_tokens.tokenizer import TokenizerConfig, VQTokenizer

VARIANTS = 8


def train(out: Path, steps: int, minutes: float, batch: int, config: TokenizerConfig, every: int = 100) -> bool:
    """Go on training in the folder for some minutes; whether the last step is done."""
    torch.manual_seed(0)
    data, tokenizer = load_token_set(), VQTokenizer(config).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint, done, started = out / "tokenizer.pt", 0, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tokenizer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["steps"]
    while done < steps:
        generator = torch.Generator().manual_seed(done)
        pick = torch.randint(len(data.train), (batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (done + 1) / 100, 0.02 + 2 * (1 - done / steps))
        loss, squared = tokenizer.loss(varied(data.train[pick], generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        done += 1
        if done % every == 0 or done == steps:
            psnr = -10 * float(squared.detach().log10())
            with (out / "tokenizer_log.jsonl").open("a") as log:
                log.write(
                    json.dumps({"step": done, "loss": round(float(loss.detach()), 5), "psnr": round(psnr, 3)}) + "\n"
                )
            state = {"model": tokenizer.state_dict(), "optimizer": optimizer.state_dict(), "steps": done}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            if time.monotonic() - started > 60 * minutes:
                break
    if done >= steps:
        export(out, tokenizer.eval())
    return done >= steps


@torch.no_grad()
def export(out: Path, tokenizer: VQTokenizer, variants: int = VARIANTS) -> None:
    """Write tokenizer, codebook and the two sets of tokens."""
    data = load_token_set()
    generator = torch.Generator().manual_seed(1)
    tokenizer.save(out / "tokenizer.safetensors")
    np.save(out / "codebook.npy", normalize(tokenizer.codebook, dim=-1).numpy())
    sets = [data.train, *(varied(data.train, generator) for _ in range(variants - 1))]
    tokens = torch.cat([tokenizer.encode(part) for pictures in sets for part in pictures.split(64)])
    codes = tokenizer.config.codes
    write_shards(out / "fine", tokens.numpy(), codes, data.train_classes.repeat(variants).numpy())
    held_out = torch.cat([tokenizer.encode(part) for part in data.test.split(64)])
    write_shards(out / "held_out", held_out.numpy(), codes, data.test_classes.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--codes", type=int, default=1024)
    args = parser.parse_args()
    done = train(args.out, args.steps, args.minutes, args.batch, TokenizerConfig(codes=args.codes))
    print("done" if done else "stopped for time; the same command goes on")


if __name__ == "__main__":
    main()
