"""The frames that a causal video model remembers, for one layer.

Frames are the unit: they are appended, chosen and evicted whole. Keys are stored as the layer attends to them, that is,
after the rotary embedding if the model has one; `unrotate`, or plain keys given along, lets a score compare frames
without their positions in time. What frames are compared by is measured when a method first asks, once per frame.

Shape legend: `B` batch, `F` frames held, `L` tokens of a frame, `H` heads, `D` width of a head. Callers hand in
`[B, F, L, H, D]`; inside, heads come first, `[B, H, F, L, D]`, so that one head's frames are read in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.streaming.scores import UnitKeys

__all__ = ["FrameCache", "Unrotate", "check_frames", "undo_rotation"]

EPOCHS = count()  # numbers for times in which frames only came, in any cache; others know by it what they measured

Unrotate = Callable[[Tensor, Tensor], Tensor]
"""Undoes the rotary embedding along time: keys `[B, H, F, L, D]` and absolute frame numbers `[F]` to keys."""


def check_frames(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse what is not `[B, F, L, H, D]`, or does not match another tensor but in its number of frames."""
    if tensor.ndim != 5 or 0 in tensor.shape:
        raise ConfigError(
            f"expected {name} of shape [B, F, L, H, D] (batch, frames, tokens of a frame, heads, width of a head), "
            f"none of them 0, got {list(tensor.shape)}; split the tokens into frames with unflatten"
        )
    if like is None:
        return
    same = [axis for axis in range(5) if axis != 1]
    if any(tensor.shape[axis] != like.shape[axis] for axis in same):
        raise ConfigError(
            f"expected {name} to agree in batch, tokens, heads and width with {list(like.shape)}, got "
            f"{list(tensor.shape)}; a cache serves one layer and one size of frame, so call reset() for another"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ConfigError(
            f"expected {name} in {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}; convert it first"
        )


def undo_rotation(keys: Tensor, rotations: Tensor) -> Tensor:
    """Undo a rotation along time that takes neighbouring channels for complex numbers.

    Args:
        keys: `[B, H, F, L, D]`.
        rotations: complex64 `[F, R]`, what the first `R` pairs of channels of each frame were multiplied by.

    Returns:
        float32, of the shape of `keys`.
    """
    plain = keys.to(torch.float32, copy=True)
    pairs = torch.view_as_complex(plain[..., : 2 * rotations.shape[1]].unflatten(-1, (-1, 2)))
    pairs *= rotations.conj()[:, None]
    return plain


class FrameCache:
    """Keys and values of the frames so far, and what frames are compared by.

    Args:
        rotated: whether the keys carry a rotary embedding along time.
        unrotate: undoes it; without it, plain keys must be given to `append` where a method asks for them.
    """

    def __init__(self, *, rotated: bool = False, unrotate: Unrotate | None = None) -> None:
        self.rotated = rotated or unrotate is not None
        self._unrotate = unrotate
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._keys: Tensor | None = None  # [B, H, F + room, L, D]; the room at the end is for the current chunk
        self._values: Tensor | None = None
        self._plain: Tensor | None = None  # [B, H, F, L, D]
        self._means: Tensor | None = None  # [B, H, up to F, D] float32
        self._units: dict[tuple[int, bool, tuple[int, ...]], UnitKeys] = {}  # see redundancy
        self._epoch = next(EPOCHS)
        self.frames: list[int] = []
        self.next_frame = 0
        self.whole = 0  # frames that full attention would read: all so far, or those that the model still keeps

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def keys(self) -> Tensor:
        """`[B, H, F, L, D]`, as they are attended to."""
        assert self._keys is not None
        return self._keys[:, :, : len(self)]

    @property
    def values(self) -> Tensor:
        """`[B, H, F, L, D]`."""
        assert self._values is not None
        return self._values[:, :, : len(self)]

    @property
    def means(self) -> Tensor:
        """Mean key of each frame `[B, H, F, D]`, float32, without a gradient."""
        known = 0 if self._means is None else self._means.shape[2]
        if self._means is None or known < len(self):
            fresh = self.keys.detach()[:, :, known:].sum(3, dtype=torch.float32) / self.tokens
            self._means = fresh if self._means is None else torch.cat([self._means, fresh], 2)
        return self._means

    @property
    def tokens(self) -> int:
        """Tokens of a frame; 0 while empty."""
        return 0 if self._keys is None else self._keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, plain keys, means, and what frames are compared by."""
        held = (self._keys, self._values, self._plain, self._means)
        units = sum(units.nbytes for units in self._units.values())
        return units + sum(t.untyped_storage().nbytes() for t in held if t is not None)

    def frames_of(self, heads: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Q, n, b * L, D]` of the frames at positions `[B, Q, n, b]`, for these heads `[n]`."""
        keys, values = (_rows(t, heads, frames) for t in self._buffers())
        return keys.flatten(3, 4), values.flatten(3, 4)

    def tokens_of(self, heads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Q, n, T, D]` of the tokens at positions `[B, Q, n, T]` (frame times `L` plus token)."""
        keys, values = (_rows(t.flatten(2, 3), heads, tokens) for t in self._buffers())
        return keys, values

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the room behind them."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def same_frames(self, other: FrameCache) -> bool:
        """Whether another cache holds the same frames, in tensors of the same kind."""
        kinds = [(c.keys.shape, c.keys.dtype, c.keys.device, c._plain is None) for c in (self, other) if len(c)]
        return self.frames == other.frames and len(set(kinds)) <= 1

    def plain_keys(self, step: int = 1, since: int = 0, others: Sequence[FrameCache] = ()) -> Tensor:
        """Keys without the rotary embedding along time, `[B, H, F - since, L / step, D]`.

        Args:
            step: of every `step`-th token.
            since: of the frames from this position on.
            others: caches like this one, whose keys follow along the batch.

        Raises:
            ConfigError: if the keys are rotated and there is no way back.
        """
        if not self.rotated:
            return self._stored_keys(step, since, others)
        if self._plain is not None:
            return _joined([c._plain[:, :, since:, ::step] for c in (self, *others) if c._plain is not None])
        if self._unrotate is None:
            raise ConfigError(
                "frames were to be compared by keys without rotary embedding, but the cache has only rotated ones; "
                'give plain_keys to append, or unrotate to the policy, or choose diversity_on="cached"'
            )
        numbers = torch.tensor(self.frames[since:], device=self.keys.device)
        return self._unrotate(self._stored_keys(step, since, others), numbers)

    def _stored_keys(self, step: int, since: int, others: Sequence[FrameCache]) -> Tensor:
        """As `plain_keys`, but keys as they are stored."""
        return _joined([c.keys[:, :, since:, ::step] for c in (self, *others)])

    def redundancy(self, step: int = 1, *, rotated: bool = False, others: Sequence[FrameCache] = ()) -> Tensor:
        """Similarity of each frame to the mean of all, see `UnitKeys`: `[1 + others, B, H, F]` float32.

        Args:
            step: compare by every `step`-th token. Those of a `step` above 1 are few and kept until frames are
                evicted, so that each rotation is undone and each frame measured once; all of them would take as much
                memory as the keys.
            rotated: compare keys as they are stored, with their rotation along time.
            others: caches like this one, measured along with it. With small frames nearly all of the time goes into
                starting the operations, of which there are no more for many layers than for one.
        """
        what = (step, rotated, tuple(other._epoch for other in others))
        units = self._units.get(what, UnitKeys())
        known = len(units)
        if known < len(self):
            units.extend(self._stored_keys(step, known, others) if rotated else self.plain_keys(step, known, others))
        if step > 1:
            self._units[what] = units
        return units.redundancy().unflatten(0, (1 + len(others), -1))

    def append(self, keys: Tensor, values: Tensor, plain_keys: Tensor | None = None) -> None:
        """Remember the frames of a finished chunk.

        Args:
            keys: `[B, F, L, H, D]` as they are attended to.
            values: of the same shape.
            plain_keys: the keys without rotary embedding; costs half as much memory again.

        Raises:
            ConfigError: for another shape, dtype or device than before.
        """
        old = None if self._keys is None else self.keys.permute(0, 2, 3, 1, 4)
        check_frames("keys", keys, old)
        check_frames("values", values, keys)
        if values.shape != keys.shape or (plain_keys is not None and plain_keys.shape != keys.shape):
            raise ConfigError(f"expected values and plain keys of the keys' shape {list(keys.shape)}")
        if len(self) and (plain_keys is None) != (self._plain is None):
            raise ConfigError("plain keys came with some chunks and not with others; give them always or never")
        added = keys.shape[1]
        if plain_keys is not None:
            plain = plain_keys.permute(0, 3, 1, 2, 4)
            self._plain = plain.contiguous() if self._plain is None else torch.cat([self._plain, plain], 2)
        self._keys = self._extended(self._keys, keys, room=added)
        self._values = self._extended(self._values, values, room=added)
        self.frames += range(self.next_frame, self.next_frame + added)
        self.next_frame += added
        self.whole += added

    def _extended(self, old: Tensor | None, new: Tensor, room: int) -> Tensor:
        """Old frames, new frames and room for the next chunk, in one tensor."""
        B, F, L, H, D = new.shape
        held = len(self)
        grown = new.new_empty(B, H, held + F + room, L, D)
        if old is not None:
            grown[:, :, :held] = old[:, :, :held]
        grown[:, :, held : held + F] = new.permute(0, 3, 1, 2, 4)
        return grown

    def view(self, keys: Tensor, values: Tensor, frames: Sequence[int], plain_keys: Tensor | None = None) -> None:
        """Look at a cache that somebody else keeps, without a copy; replaces what was held.

        The other side must leave these frames alone until the next `view`.

        Args:
            keys, values, plain_keys: `[B, F, L, H, D]`, as for `append`; may be strided.
            frames: absolute number of each frame, rising.
        """
        check_frames("keys", keys)
        check_frames("values", values, keys)
        if len(frames) != keys.shape[1] or list(frames) != sorted(set(frames)):
            raise ConfigError(f"expected {keys.shape[1]} rising frame numbers, got {list(frames)}")
        self.clear()
        self._keys, self._values = keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2, 4)
        self._plain = None if plain_keys is None else plain_keys.permute(0, 3, 1, 2, 4)
        self.frames, self.next_frame, self.whole = list(frames), frames[-1] + 1, len(frames)

    def keep(self, positions: Sequence[int]) -> None:
        """Evict all frames but those at these positions (0 is the oldest held); their memory is freed.

        Raises:
            ConfigError: for positions that do not exist or do not rise.
        """
        if list(positions) != sorted(set(positions)) or (
            positions and not 0 <= positions[0] <= positions[-1] < len(self)
        ):
            raise ConfigError(f"expected rising positions from 0 to {len(self) - 1}, got {list(positions)}")
        if len(positions) == len(self):
            return
        if not positions:
            upcoming, whole = self.next_frame, self.whole
            self.clear()
            self.next_frame, self.whole = upcoming, whole
            return
        room = self._keys.shape[2] - len(self) if self._keys is not None else 0
        index = torch.tensor(positions, device=self.keys.device)
        self._keys, self._values = (self._kept(t, index, room) for t in (self.keys, self.values))
        self._plain = None if self._plain is None else self._plain.index_select(2, index)
        if self._means is not None:  # it covers the oldest frames, those that were there when it was last asked for
            self._means = self._means.index_select(2, index[index < self._means.shape[2]])
        self._units.clear()  # their sum is of frames that have gone; the few that are left are measured again
        self._epoch = next(EPOCHS)
        self.frames = [self.frames[position] for position in positions]

    @staticmethod
    def _kept(frames: Tensor, index: Tensor, room: int) -> Tensor:
        B, H, _, L, D = frames.shape
        kept = frames.new_empty(B, H, len(index) + room, L, D)
        kept[:, :, : len(index)] = frames.index_select(2, index)
        return kept

    def with_current(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """History and current chunk `[B, H, F + F_q, L, D]`: written into the room behind the history if that fits.

        The result is valid until the next call.
        """
        current = [t.permute(0, 3, 1, 2, 4) for t in (keys, values)]
        if self._keys is None or self._values is None:
            return current[0], current[1]
        held, end = len(self), len(self) + keys.shape[1]
        if self._keys.shape[2] < end or torch.is_grad_enabled():
            return torch.cat([self.keys, current[0]], 2), torch.cat([self.values, current[1]], 2)
        for buffer, new in zip((self._keys, self._values), current, strict=True):
            buffer[:, :, held:end] = new
        return self._keys[:, :, :end], self._values[:, :, :end]


def _rows(held: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
    """`[B, Q, n, positions, ...]` of a tensor `[B, H, F, ...]`."""
    B, H, F = held.shape[:3]
    batch = torch.arange(B, device=held.device)[:, None, None, None]
    if not held.is_contiguous():  # somebody else's cache, of which a copy would cost more than is gained
        return held[batch, heads[:, None], positions]
    rows = (batch * H + heads[:, None]) * F + positions  # whole rows are copied three times as fast as single numbers
    return held.flatten(0, 2).index_select(0, rows.flatten()).view(*positions.shape, *held.shape[3:])


def _joined(parts: list[Tensor]) -> Tensor:
    """One after another along the batch."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
