"""What `fashion-dit` is made of: DiT-XL/2's classes at a seventh of the width, on pixels rearranged as its latents are.

An unmodified `DiTPipeline` runs it: `DiTTransformer2DModel` with adaLN-zero blocks, patches of 2x2 and noise prediction
on the linear schedule of 1,000 steps, `DDIMScheduler`, and an exact space-to-depth in place of the autoencoder, which
gives DiT's four channels. The label table has a thousand rows since the pipeline hard-codes 1000 for "no class".

Shapes: images `[B, 1, 32, 32]` in [-1, 1], latents `[B, 4, 16, 16]`, 64 tokens of width 160.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from hasten_zoo.emoji_flux.model import PixelVAE
from hasten_zoo.fashion_dit import CLASSES
from hasten_zoo.reading import reading

__all__ = ["NO_CLASS", "build_pipeline", "load_pipeline", "without_label_dropout"]

NO_CLASS = 1000
SCALE = 1.15  # gives the latents of the training images unit mean square


def build_pipeline(width: int = 160, blocks: int = 6) -> DiTPipeline:
    """A fresh, untrained pipeline."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    _silence(transformer)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    vae = PixelVAE(block_out_channels=(1, 4), latent_channels=4, scaling_factor=SCALE)
    return DiTPipeline(transformer, vae, scheduler, id2label=dict(enumerate(CLASSES)))


def load_pipeline(folder: Path) -> DiTPipeline:
    """Load a pipeline folder that the training script exported; only local files are read.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    with reading("fashion-dit", folder, "transformer"):
        return DiTPipeline(
            DiTTransformer2DModel.from_pretrained(folder / "transformer"),
            PixelVAE.from_pretrained(folder / "vae"),
            DDIMScheduler.from_pretrained(folder / "scheduler"),
            id2label=dict(enumerate(CLASSES)),
        )


def without_label_dropout(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Labels pass as given in training too: which are left out is drawn by the training script, reproducibly."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer


def _silence(transformer: DiTTransformer2DModel) -> None:
    """Gates and output start at zero, so that every block starts as the identity (adaLN-zero)."""
    last = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*last, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for block in transformer.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        with torch.no_grad():  # rows that no image has, and that nothing reads
            block.norm1.emb.class_embedder.embedding_table.weight[len(CLASSES) : NO_CLASS] = 0
