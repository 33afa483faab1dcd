"""The frames that a causal video model remembers, for one layer.

Frames are the unit: they are appended, chosen and evicted whole. Keys are stored as the layer attends to them, that is,
after the rotary embedding if the model has one; `unrotate`, or plain keys given along, lets a score compare frames
without their positions in time.

The buffers have room behind the last frame: the current chunk is written there, so that history and chunk are one
view. For attention the order of frames does not matter, so every head may store them in an order of its own: the
frames that it attends to are brought to the end, next to the current chunk, and are a view as well; frames to be
evicted are brought to the end and cut off. `_slots` tells where each frame is.

Shape legend: `B` batch, `F` frames held, `C` frames that there is room for, `L` tokens of a frame, `H` heads, `D` width
of a head. Callers hand in `[B, F, L, H, D]`; inside, heads come first, `[B, H, F, L, D]`, so that one head's frames are
read in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.parameters import accepted
from hasten.streaming.modes import of_our_own
from hasten.streaming.rotation import Unrotate, unrotated
from hasten.streaming.rows import check_alike, check_frames, exchanges, rising, row_starts, rows_at

__all__ = ["FrameCache"]

GROWTH = 1.0625  # of the buffers, when they are full
SHRINK = 1.125  # times too large at which they are made anew


class FrameCache:
    """Keys and values of the frames so far, and what frames are compared by.

    Args:
        rotated: whether the keys carry a rotary embedding along time.
        unrotate: undoes it; without it, plain keys must be given to `append` where a method asks for them.

    Attributes:
        frames: absolute numbers of the frames held, rising.
        next_frame: number of the next one.
        whole: frames that full attention would read: all so far, or those that the model still keeps.
        borrowed: whether the tensors are somebody else's, see `view`.
        moment: most bytes that the latest change held for a moment, while buffers were moved.
    """

    def __init__(self, *, rotated: bool = False, unrotate: Unrotate | None = None) -> None:
        accepted("FrameCache", "rotated", bool, rotated)
        accepted("FrameCache", "unrotate", Callable | None, unrotate)
        self.rotated = rotated or unrotate is not None
        self._unrotate = unrotate
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._keys: Tensor | None = None  # [B, H, C, L, D]
        self._values: Tensor | None = None
        self._plain: Tensor | None = None  # [B, H, F, L, D], in order
        self._means: Tensor | None = None  # [B, H, up to F, D] float32, in order
        self._slots: Tensor | None = None  # [B, H, F]: where each frame is; None where all are in order
        self.frames: list[int] = []
        self.next_frame = self.whole = self.moment = 0
        self._latest = 0  # frames of the latest chunk, for which there is room behind the history
        self.borrowed = False

    def __len__(self) -> int:
        return len(self.frames)

    # --- what is held

    @property
    def keys(self) -> Tensor:
        """`[B, H, F, L, D]`, as they are attended to, in order; a copy where heads have orders of their own."""
        return self._in_order(self._buffers()[0])

    @property
    def values(self) -> Tensor:
        """`[B, H, F, L, D]`, as `keys`."""
        return self._in_order(self._buffers()[1])

    @property
    def like(self) -> Tensor | None:
        """What a chunk's tensors have to agree with but in frames, `[B, C, L, H, D]`; None while empty."""
        return None if self._keys is None else self._keys.permute(0, 2, 3, 1, 4)

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, F, L, D]` in the order in which each head stores them: always views."""
        keys, values = self._buffers()
        return keys[:, :, : len(self)], values[:, :, : len(self)]

    @property
    @of_our_own
    def means(self) -> Tensor:
        """Mean key of each frame `[B, H, F, D]`, float32, without a gradient."""
        known = 0 if self._means is None else self._means.shape[2]
        if self._means is None or known < len(self):
            fresh = self._in_order(self._buffers()[0].detach(), known).sum(3, dtype=torch.float32) / self.tokens
            self._means = fresh if self._means is None else torch.cat([self._means, fresh], 2)
        return self._means

    @property
    def tokens(self) -> int:
        """Tokens of a frame; 0 while empty."""
        return 0 if self._keys is None else self._keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, plain keys, means, and the places of frames; what is borrowed counts, too."""
        held = (self._keys, self._values, self._plain, self._means, self._slots)
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's keys and values; 0 while empty."""
        if self._keys is None:
            return 0
        B, H, _, L, D = self._keys.shape
        return 2 * B * H * L * D * self._keys.element_size()

    def alike(self, other: FrameCache) -> bool:
        """Whether another cache holds frames in tensors of the same kind."""
        if not len(self) or not len(other):
            return False
        kinds = [(*c.stored[0].shape[:2], *c.stored[0].shape[3:], c._plain is None) for c in (self, other)]
        ours, theirs = self.stored[0], other.stored[0]
        return kinds[0] == kinds[1] and ours.dtype == theirs.dtype and ours.device == theirs.device

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the room behind them."""
        if self._keys is None or self._values is None:
            raise ConfigError("the cache holds no frame yet; append a chunk first")
        return self._keys, self._values

    def _in_order(self, buffer: Tensor, since: int = 0, step: int = 1) -> Tensor:
        """Frames of a buffer from position `since` on, in order, of every `step`-th token."""
        if self._slots is None:
            return buffer[:, :, since : len(self), ::step]
        slots = self._slots[:, :, since:]
        rows = row_starts(buffer, None)[..., None] + slots  # whole rows are copied ten times as fast as single numbers
        return buffer.flatten(0, 2)[:, ::step].index_select(0, rows.flatten()).unflatten(0, slots.shape)

    def in_storage_order(self, table: Tensor) -> Tensor:
        """A table `[B, Q, H, F * L]` over the tokens in order, as one over the tokens as each head stores them."""
        if self._slots is None:
            return table
        B, Q, H, _ = table.shape
        frames = table.view(B, Q, H, len(self), -1)
        slots = self._slots[:, None, :, :, None].expand_as(frames)
        return torch.empty_like(frames).scatter_(3, slots, frames).view_as(table)

    def frames_of(self, heads: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Q, n, b * L, D]` of the frames at positions `[B, Q, n, b]`, for these heads `[n]`."""
        frames = self._where(heads, frames)
        keys, values = (rows_at(t, heads, frames) for t in self._buffers())
        return keys.flatten(3, 4), values.flatten(3, 4)

    def tokens_of(self, heads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Q, n, T, D]` of the tokens at positions `[B, Q, n, T]` (frame times `L` plus token)."""
        L = self.tokens
        if self._slots is not None:
            tokens = self._where(heads, tokens // L) * L + tokens % L
        keys, values = (rows_at(t.flatten(2, 3), heads, tokens) for t in self._buffers())
        return keys, values

    def _where(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Slots of the frames at positions `[B, Q, n, b]`, for these heads `[n]`."""
        if self._slots is None:
            return positions
        slots = self._slots.index_select(1, heads)[:, None].expand(-1, positions.shape[1], -1, -1)
        return slots.gather(3, positions)

    def plain_keys(self, step: int = 1, others: Sequence[FrameCache] = ()) -> Tensor:
        """Keys without the rotary embedding along time, in order, of every `step`-th token, `[B, H, F, L / step, D]`.

        Args:
            step: of the tokens.
            others: caches of other layers like this one, whose frames follow.

        Raises:
            ConfigError: if the keys are rotated and there is no way back.
        """
        if not self.rotated:
            return self.stored_keys(step, others)
        if self._plain is not None:
            return _joined([c._plain[:, :, :, ::step] for c in (self, *others) if c._plain is not None])
        if self._unrotate is None:
            raise ConfigError(
                "frames were to be compared by keys without rotary embedding, but the cache has only rotated ones; "
                'give plain_keys to append, or unrotate to the policy, or choose diversity_on="cached"'
            )
        numbers = [number for cache in (self, *others) for number in cache.frames]
        return unrotated(self._unrotate, self.stored_keys(step, others), numbers)

    def stored_keys(self, step: int = 1, others: Sequence[FrameCache] = ()) -> Tensor:
        """As `plain_keys`, but keys as they are stored."""
        return _joined([c._in_order(c._buffers()[0], step=step) for c in (self, *others)])

    # --- more and fewer frames

    @of_our_own
    def append(self, keys: Tensor, values: Tensor, plain_keys: Tensor | None = None) -> None:
        """Remember the frames of a finished chunk.

        Args:
            keys: `[B, F, L, H, D]` as they are attended to.
            values: of the same shape.
            plain_keys: the keys without rotary embedding; costs half as much memory again.

        Raises:
            ConfigError: for another shape, dtype or device than before.
        """
        check_frames("keys", keys, self.like)
        check_alike(keys, values, plain_keys)
        if len(self) and (plain_keys is None) != (self._plain is None):
            raise ConfigError("plain keys came with some chunks and not with others; give them always or never")
        self.moment = 0
        held, added = len(self), keys.shape[1]
        self._latest = added
        if plain_keys is not None:
            plain = plain_keys.permute(0, 3, 1, 2, 4)
            before = [] if self._plain is None else [self._plain]
            self._plain = torch.cat([*before, plain], 2)  # a copy: the caller may write into its own again
        for name, new in (("_keys", keys), ("_values", values)):
            buffer = self._with_room(getattr(self, name), new, held + added)
            buffer[:, :, held : held + added] = new.permute(0, 3, 1, 2, 4)
            setattr(self, name, buffer)
        if self._slots is not None:
            fresh = torch.arange(held, held + added, device=keys.device)
            self._slots = torch.cat([self._slots, fresh.expand(*self._slots.shape[:2], added)], 2)
        self.borrowed = False
        self.frames += range(self.next_frame, self.next_frame + added)
        self.next_frame += added
        self.whole += added

    @of_our_own
    def reserve(self) -> None:
        """Make room behind the history for a chunk as long as the latest one; call it when what may go has gone."""
        self.moment, needed = 0, len(self) + self._latest
        if self._keys is None or self.borrowed or self._keys.shape[2] >= needed:
            return
        for name in ("_keys", "_values"):
            buffer = getattr(self, name)
            setattr(self, name, self._with_room(buffer, buffer.permute(0, 2, 3, 1, 4), needed))

    def _with_room(self, buffer: Tensor | None, like: Tensor, needed: int) -> Tensor:
        """A buffer for `needed` frames: the same, or a larger one with what was held.

        Where there are gradients, tensors that others have seen are left alone.
        """
        if buffer is not None and buffer.shape[2] >= needed and not (self.borrowed or torch.is_grad_enabled()):
            return buffer
        B, _, L, H, D = like.shape
        room = needed if buffer is None else max(needed, int(GROWTH * needed))
        grown = like.new_empty(B, H, room, L, D)
        if buffer is not None:
            grown[:, :, : len(self)] = buffer[:, :, : len(self)]
            self.moment = max(self.moment, self.nbytes + grown.untyped_storage().nbytes())
        return grown

    def view(self, keys: Tensor, values: Tensor, frames: Sequence[int], plain_keys: Tensor | None = None) -> None:
        """Look at a cache that somebody else keeps, without a copy; replaces what was held.

        The other side must leave these frames alone until the next `view`.

        Args:
            keys, values, plain_keys: `[B, F, L, H, D]`, as for `append`; may be strided.
            frames: absolute number of each frame, rising.
        """
        check_frames("keys", keys)
        check_alike(keys, values, plain_keys)
        frames = rising("frame numbers", frames)
        if len(frames) != keys.shape[1]:
            raise ConfigError(f"expected {keys.shape[1]} rising frame numbers, got {frames}")
        self.clear()
        self._keys, self._values = keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2, 4)
        self._plain = None if plain_keys is None else plain_keys.permute(0, 3, 1, 2, 4)
        self.frames, self.next_frame, self.whole = list(frames), frames[-1] + 1, len(frames)
        self.borrowed = True

    @of_our_own
    def keep(self, positions: Sequence[int]) -> None:
        """Evict all frames but those at these positions (0 is the oldest held).

        Their room serves the frames to come; it is freed where there would be far too much of it.

        Raises:
            ConfigError: for positions that do not exist or do not rise.
        """
        positions = rising(f"positions from 0 to {len(self) - 1}", positions)
        if positions and positions[-1] >= len(self):
            raise ConfigError(f"expected rising positions from 0 to {len(self) - 1}, got {positions}")
        if len(positions) == len(self):
            return
        if not positions:
            upcoming, whole = self.next_frame, self.whole
            self.clear()
            self.next_frame, self.whole = upcoming, whole
            return
        keys, _ = self._buffers()
        index = torch.tensor(positions, device=keys.device)
        self._plain = None if self._plain is None else self._plain.index_select(2, index)
        if self._means is not None:  # it covers the oldest frames, those that were there when it was last asked for
            self._means = self._means.index_select(2, index[index < self._means.shape[2]])
        needed = len(positions) + self._latest
        if self.borrowed or torch.is_grad_enabled() or keys.shape[2] > SHRINK * needed:
            self._keys, self._values = (self._copied(t, index, needed) for t in self._buffers())
            self._slots, self.borrowed = None, False
        else:
            gone = sorted(set(range(len(self))) - set(positions))
            self.bring_to_end(torch.tensor(gone, device=keys.device).expand(*keys.shape[:2], -1))
            assert self._slots is not None
            self._slots = self._slots.index_select(2, index)
        self.frames = [self.frames[position] for position in positions]

    def _copied(self, buffer: Tensor, index: Tensor, needed: int) -> Tensor:
        """Some frames, in order, in a buffer of their own with room for so many."""
        B, H, _, L, D = buffer.shape
        kept = buffer.new_empty(B, H, needed, L, D)
        kept[:, :, : len(index)] = self._in_order(buffer).index_select(2, index)
        return kept

    @of_our_own
    def bring_to_end(self, frames: Tensor, heads: Tensor | None = None) -> None:
        """Exchange frames in place, so that those at positions `[B, n, b]` are the last ones that a head stores.

        Args:
            frames: different ones for each head.
            heads: `[n]`; None for all.
        """
        held, B, b = len(self), frames.shape[0], frames.shape[2]
        if self._slots is None:
            H = self._buffers()[0].shape[1]
            self._slots = torch.arange(held, device=frames.device).expand(B, H, held).contiguous()
        slots = self._slots if heads is None else self._slots.index_select(1, heads)
        here, there = exchanges(slots.gather(2, frames), held - b)
        stored = torch.empty_like(slots).scatter_(2, slots, torch.arange(held, device=slots.device).expand_as(slots))
        first, second = stored.gather(2, here), stored.gather(2, there)
        slots = slots.scatter(2, first, there).scatter_(2, second, here)
        self._slots = slots if heads is None else self._slots.index_copy(1, heads, slots)
        self.moment = 0
        for buffer in self._buffers():
            rows = (row_starts(buffer, heads)[..., None] + places for places in (here, there))
            ours, theirs = (row.flatten() for row in rows)
            flat = buffer.view(-1, *buffer.shape[3:])
            moved, back = flat.index_select(0, ours), flat.index_select(0, theirs)
            flat.index_copy_(0, theirs, moved).index_copy_(0, ours, back)
            self.moment = max(self.moment, self.nbytes + moved.nbytes + back.nbytes)

    def end(self, frames: int, current: int) -> tuple[Tensor, Tensor]:
        """Views `[B, H, (frames + current) * L, D]`: the last frames that each head stores, and room behind them."""
        first, last = len(self) - frames, len(self) + current
        keys, values = (t[:, :, first:last].flatten(2, 3) for t in self._buffers())
        return keys, values

    def write_current(self, keys: Tensor, values: Tensor) -> bool:
        """Write a chunk `[B, F_q, L, H, D]` into the room behind the history; False where that cannot be."""
        if self._keys is None or self.borrowed or torch.is_grad_enabled():
            return False
        held, end = len(self), len(self) + keys.shape[1]
        if self._keys.shape[2] < end:
            return False
        for buffer, new in zip(self._buffers(), (keys, values), strict=True):
            buffer[:, :, held:end] = new.permute(0, 3, 1, 2, 4)
        return True

    def with_current(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored history and current chunk `[B, H, F + F_q, L, D]`; a view until the next call, where that fits."""
        if self.write_current(keys, values):
            end = len(self) + keys.shape[1]
            whole = self._buffers()
            return whole[0][:, :, :end], whole[1][:, :, :end]
        current = [t.permute(0, 3, 1, 2, 4) for t in (keys, values)]
        if self._keys is None:
            return current[0], current[1]
        stored = self.stored
        return torch.cat([stored[0], current[0]], 2), torch.cat([stored[1], current[1]], 2)


def _joined(parts: list[Tensor]) -> Tensor:
    """Frames one after another."""
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]
