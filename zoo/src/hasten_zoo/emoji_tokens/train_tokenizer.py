"""Train the VQ tokenizer (CPU is enough; resumable).

    python -m hasten_zoo.emoji_tokens.train_tokenizer --out runs/emoji-tokens --minutes 30

Run it again to go on; `--minutes` limits one call. After the last step the folder holds `tokenizer.safetensors`, in
half precision as it is shipped. `tokenizer_log.jsonl` has a line for every 100 steps: the loss, PSNR of the batch (dB)
and the perplexity of the codes, the number of evenly used codes that would be as uncertain as the running usage.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from hasten.io import add_line, write_atomically

from hasten_zoo.command import told
from hasten_zoo.emoji_tokens.data import TRAIN, images
from hasten_zoo.emoji_tokens.tokenizer import TokenizerConfig, VQTokenizer

__all__ = ["train"]

LR, WARMUP, DECAY_SHARE, LEAST = 2e-3, 100, 0.4, 0.02
PLAIN = 200  # steps without a codebook
BEGIN = 256  # images whose latents the first codes are


def train(out: Path, steps: int, minutes: float, batch: int, config: TokenizerConfig, every: int = 100) -> bool:
    """Go on training in the folder for some minutes; whether the last step is done."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoint, done, started = out / "tokenizer.pt", 0, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tokenizer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tokenizer.sums, tokenizer.usage = state["sums"], state["usage"]
        done = state["steps"]
    while done < steps:
        torch.manual_seed(done)  # which latents rare codes are put onto
        if done == PLAIN:
            tokenizer.begin(images(BEGIN, TRAIN + done).pixels)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (done + 1) / WARMUP, max(LEAST, (1 - done / steps) / DECAY_SHARE))
        loss, squared = tokenizer.loss(images(batch, TRAIN + done).pixels, quantized=done >= PLAIN)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        done += 1
        if done % every == 0 or done == steps:
            row = {
                "step": done,
                "loss": round(float(loss.detach()), 5),
                "psnr": round(-10 * float(squared.detach().log10()), 3),
                "perplexity": round(tokenizer.perplexity(), 1),
                "seconds": round(time.monotonic() - started, 1),
            }
            add_line(out / "tokenizer_log.jsonl", json.dumps(row))
            state = {
                "model": tokenizer.state_dict(),
                "sums": tokenizer.sums,
                "usage": tokenizer.usage,
                "optimizer": optimizer.state_dict(),
                "steps": done,
            }
            write_atomically(checkpoint, partial(torch.save, state))
            if time.monotonic() - started > 60 * minutes:
                break
    if done >= steps:
        tokenizer.eval().save(out / "tokenizer.safetensors")
    return done >= steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--steps", type=int, default=3100)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=96)
    args = parser.parse_args()
    config = TokenizerConfig(codes=args.codes, channels=args.channels)
    done = train(args.out, args.steps, args.minutes, args.batch, config)
    print("done" if done else "stopped for time; the same command goes on")


if __name__ == "__main__":
    told(main)
