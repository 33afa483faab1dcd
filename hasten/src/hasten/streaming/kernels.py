"""Kernels that read a choice from a table or as sequences: flex attention, and flash attention of unequal lengths.

Shape legend: as in `current`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hasten.errors import ConfigError
from hasten.streaming.cache import FrameCache
from hasten.streaming.current import Current, gathered, visible
from hasten.streaming.selection import Selection

__all__ = ["BlockMask", "VarlenKernel", "flash_kernel", "flex", "varlen"]

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(q, k, v, starts of q, starts of k, longest q, longest k) of `[tokens, heads, D]` and int32 `[sequences + 1]`."""

BlockMask = tuple[tuple[int, int], Any]
"""Numbers of queries and keys, and the block mask for them."""


@remember
def _compiled(on_gpu: bool) -> tuple[Any, Any]:
    """The kernel and what makes its mask: compiled on a GPU, where that saves work; as they are elsewhere."""
    if not on_gpu:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def flex(
    current: Current, cache: FrameCache, selection: Selection, mask: BlockMask | None, scale: float | None
) -> tuple[Tensor, BlockMask]:
    """Flex attention, and the block mask, which serves all forwards with the same choice.

    Args:
        mask: of an earlier forward with this selection; None for the first.
    """
    B, q, L, H, D = current.queries.shape
    keys, values = current.after(cache)
    own = current.queries.permute(0, 3, 1, 2, 4).flatten(2, 3)
    kernel, make_mask = _compiled(own.is_cuda)
    sizes = (q * L, keys.shape[2])
    if mask is None or mask[0] != sizes:
        table = visible(current, cache, selection)

        def chosen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[b, query // L, h, key]

        mask = sizes, make_mask(chosen, B, H, *sizes, device=own.device)
    out: Tensor = kernel(own, keys, values, block_mask=mask[1], scale=scale)
    return out.view(B, H, q, L, D).permute(0, 2, 3, 1, 4), mask


def flash_kernel(queries: Tensor) -> VarlenKernel:
    """The flash kernel for sequences of unequal length.

    Raises:
        ConfigError: if it is not installed, or does not run on such queries.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            'the back-end "varlen" needs the package flash-attn, which is not installed; install it or take "grouped"'
        ) from error
    if not queries.is_cuda or queries.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f'the back-end "varlen" needs float16 or bfloat16 on a CUDA device, got {queries.dtype} on '
            f'{queries.device}; take "grouped"'
        )
    kernel: VarlenKernel = flash_attn_varlen_func
    return kernel


def varlen(
    current: Current, cache: FrameCache, selection: Selection, scale: float | None, kernel: VarlenKernel
) -> Tensor:
    """Every (batch, query frame, head) as a sequence of `L` queries, packed end to end with its keys.

    Args:
        kernel: as `flash_attn_varlen_func`: (q, k, v, starts of q, starts of k, longest q, longest k) of
            `[tokens, 1, D]` and int32 `[sequences + 1]`; it divides logits by `sqrt(D)`.
    """
    B, q, L, _, D = current.queries.shape
    queries: list[Tensor] = []
    history: tuple[list[Tensor], list[Tensor]] = ([], [])
    lengths: list[int] = []
    for group in selection.groups:
        n, heads = len(group.heads), list(group.heads)
        queries.append(current.queries.permute(0, 1, 3, 2, 4)[:, :, heads].reshape(-1, D))
        for part, chosen, now in zip(history, gathered(cache, group), current.by_head(), strict=True):
            attended = now[:, None, heads].expand(B, q, n, -1, D)
            part.append(torch.cat([chosen.expand(B, q, n, -1, D), attended], 3).reshape(-1, D))
        lengths += [group.history_tokens(L) + current.visible] * (B * q * n)
    starts_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=current.queries.device) * L
    starts_k = torch.tensor([0, *lengths], device=current.queries.device).cumsum(0).to(torch.int32)
    factor = 1.0 if scale is None else scale * D**0.5
    keys, values = (torch.cat(part)[:, None] for part in history)
    out = kernel(torch.cat(queries)[:, None] * factor, keys, values, starts_q, starts_k, L, max(lengths))
    return _unpacked(out[:, 0], selection, current.queries)


def _unpacked(out: Tensor, selection: Selection, like: Tensor) -> Tensor:
    """Sequences end to end back to `[B, q, L, H, D]`."""
    B, q, L, H, D = like.shape
    result, at = out.new_empty(B, q, H, L, D), 0
    for group in selection.groups:
        size = B * q * len(group.heads) * L
        result[:, :, list(group.heads)] = out[at : at + size].view(B, q, -1, L, D)
        at += size
    return result.transpose(2, 3)
