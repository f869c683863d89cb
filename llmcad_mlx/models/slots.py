"""Which slot of a KV cache holds which token, and what each new row may see: bookkeeping without MLX.

Slots are numbered in creation order. Committed slots are in position order, the k-th live slot being at
position k, because a parent always has a smaller slot than its child. A slot that is neither committed nor
waiting to be is dead; dead slots stay until their tail is dropped or the owner compacts.

A layer with a sliding window holds the slots from a `Front` on, which moves behind the window in steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

_STEP = 32
SPARE_SLOTS = 3  # the score kernel reads keys in fours and may touch three slots past the last

WINDOW_SLACK = 256
"""Tokens before its window that a layer still holds when its front has moved, so that a few can be taken back;
and by how many more it moves at least: a move copies the rest, which then costs little beside attending to it."""
FRONT_STEP = 16  # a front is a multiple: the CPU kernels add up scores by place modulo 16


def grown_capacity(num_slots: int, capacity: int) -> int:
    """Slots to make room for when `num_slots` are needed and there is room for `capacity`: a quarter more at
    least, so that all growing together copies no more than a few times what there is."""
    return -(-max(num_slots, capacity * 5 // 4) // _STEP) * _STEP


def most_capacity(num_slots: int) -> int:
    """What a cache of `num_slots` slots makes room for at most."""
    return grown_capacity(num_slots + SPARE_SLOTS, num_slots + SPARE_SLOTS)


def window_rows(window: int) -> int:
    """Committed tokens that a layer with this window holds at most when rows are appended."""
    return window + 2 * WINDOW_SLACK


def most_window_dead(window: int) -> int:
    """Dead slots behind the front that a commit leaves at most."""
    return window_rows(window) // 8


def most_window_capacity(window: int, num_appended: int) -> int:
    """What a layer with this window makes room for at most, with up to `num_appended` uncommitted slots."""
    slots = window_rows(window) + most_window_dead(window) + num_appended
    return -(-(slots + SPARE_SLOTS) // _STEP) * _STEP


class Front(NamedTuple):
    """Where the rows of layers with a window begin; those before it are gone."""

    tokens: int = 0
    """Committed tokens before it."""
    slot: int = 0
    """The first slot that is held, that of the next committed token."""

    def least_length(self, window: int) -> int:
        """The least committed tokens whose next row sees nothing that is gone, and that keep `slot`; or 0."""
        return self.tokens and self.tokens + max(window - 1, 1)


class AttentionPlan(NamedTuple):
    """Which slots the N rows of the present append see, for attention kernels that skip the mask.

    Row i sees the committed sequence from index ``first_visible[i]`` on, then its own slots: uncommitted
    ancestors and itself, in position order. All arrays are int32. All count from the window's `Front`: slots from
    its slot, positions and the committed sequence from its tokens.
    """

    positions: Ints
    """(N,) position of each row."""
    slots: Ints
    """(N,) slot of each row."""
    runs: Ints
    """(R, 2) first slot and length of the contiguous pieces of the committed sequence, in position order."""
    first_visible: Ints
    """(N,) index into the committed sequence; 0 unless a sliding window has moved past its start."""
    own: Ints
    """The rows' own slots, one row after the other; empty when ``causal``."""
    own_ends: Ints
    """(N,) where each row's part of ``own`` ends."""
    causal: bool
    """Nothing is dead and all slots are one chain: row i sees the slots from ``first_visible[i]`` to its own,
    where ``first_visible`` may point past the committed ones."""


class SlotTable:
    """The slots of a sequence and of the token tree below it.

    linear: only chains may be appended. windows: those of layers that give up what none of their rows can see.
    """

    def __init__(self, linear: bool = False, windows: Iterable[int] = ()) -> None:
        self.linear = linear
        self._fronts = dict.fromkeys(windows, Front())
        self.length = 0
        """Number of committed tokens."""
        self.num_slots = 0
        self.first_appended = 0
        """First slot of the present append."""
        self.generation = 0
        """Counts appends."""
        self._first_pending = 0
        """Slots from here on are uncommitted, but for the dead ones that a commit left between those it kept."""
        self._gone: frozenset[int] = frozenset()
        """Those dead ones."""
        self._live = np.zeros(256, np.int32)
        self._parents = np.zeros(256, np.int32)
        self._positions = np.zeros(256, np.int32)
        self._chain = True
        self._own: tuple[Ints, ...] | None = None
        self._plans: dict[int | None, AttentionPlan] = {}

    def append(self, parents: Sequence[int] | None, n: int) -> range:
        """Announce the ``n`` tokens of the next forward; returns their slots.

        ``parents[i]``: slot of token i's parent: the last committed slot (-1 means the same), an uncommitted
        slot, or an earlier slot of this append. None: a chain that continues the committed sequence.
        Raises ValueError for any other parent, and for what is no chain where only chains may be appended.
        """
        if n < 1 or (parents is not None and len(parents) != n):
            raise ValueError(f"{n} tokens with {n if parents is None else len(parents)} parents")
        for window, front in self._fronts.items():
            if self.length - front.tokens >= window_rows(window):
                self._move_front(window)
        start = self.num_slots
        if start + n > len(self._live):
            room = np.zeros(max(start + n - len(self._live), len(self._live)), np.int32)
            self._live = np.concatenate([self._live, room])
            self._parents = np.concatenate([self._parents, room])
            self._positions = np.concatenate([self._positions, room])
        if parents is None:
            rows = np.arange(start - 1, start + n - 1, dtype=np.int32)
            rows[0] = self.last_slot
            depths = np.arange(self.length, self.length + n, dtype=np.int32)
        else:
            rows, depths = self._placed(parents, start)
        chain = self._chain and bool(np.array_equal(rows, np.arange(start - 1, start + n - 1)))
        if self.linear and not chain:
            raise ValueError("this model takes chains only, not trees")
        self._parents[start : start + n] = rows
        self._positions[start : start + n] = depths
        self._chain = chain
        self.num_slots = start + n
        self.first_appended = start
        self.generation += 1
        self._forget_append()
        return range(start, start + n)

    def commit(self, slots: Sequence[int], keep: Sequence[int] = ()) -> list[int]:
        """Make ``slots``, a path below the last committed slot, part of the sequence; other new ones die.

        ``keep``: uncommitted slots that live on uncommitted, each below the last committed slot (as it is then)
        or below another one of ``keep``. Returns where they lie from now on, in the order given.
        Raises ValueError, and changes nothing, when ``slots`` or ``keep`` are not of that shape.
        """
        path = np.asarray(slots, np.int32)
        if len(path):
            expected = np.concatenate([[self.last_slot], path[:-1]])
            if not self._is_pending(path, self.num_slots).all() or not np.array_equal(
                self._parents[path], expected
            ):
                raise ValueError("committed slots are not a path below the last committed slot")
        if keep:
            kept = np.asarray(keep, np.int32)
            last = int(path[-1]) if len(path) else self.last_slot
            pending = self._is_pending(kept, self.num_slots).all()
            if not pending or not {last, *keep}.issuperset(self._parents[kept].tolist()):
                raise ValueError("kept slots are not a tree below the last committed slot")
        self._live[self.length : self.length + len(path)] = path
        self.length += len(path)
        self._settle(keep)
        return list(keep)

    def rollback(self) -> None:
        """Back to the last commit: whatever is uncommitted is dropped, also what the commit kept."""
        if self.num_slots > self._first_pending:
            self._settle()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` committed tokens. Raises ValueError when fewer are committed, and for
        less than `least_length`, 0 excepted."""
        if not 0 <= length <= self.length or 0 < length < self.least_length:
            raise ValueError(f"cannot keep {length} of {self.length} tokens (least: {self.least_length}, or 0)")
        if not length:
            self._fronts = dict.fromkeys(self._fronts, Front())
        self.length = length
        self._settle()

    def drop_appended(self, n: int) -> None:
        """Drop the last ``n`` slots of the present append (rows forwarded only to fill a block)."""
        self.num_slots = max(self.num_slots - n, self.first_appended)
        self._forget_append()

    @property
    def last_slot(self) -> int:
        """Slot of the last committed token, -1 when there is none."""
        return int(self._live[self.length - 1]) if self.length else -1

    @property
    def num_appended(self) -> int:
        return self.num_slots - self.first_appended

    @property
    def num_dead(self) -> int:
        """Slots that hold neither a committed nor an uncommitted token."""
        return self._first_pending - self.length + len(self._gone)

    def front(self, window: int | None) -> Front:
        """From where on the layers with this window hold rows."""
        return self._fronts.get(window, Front()) if window is not None else Front()

    @property
    def least_length(self) -> int:
        """The least length that `truncate` can keep, 0 excepted."""
        return max((front.least_length(window) for window, front in self._fronts.items()), default=0)

    def _move_front(self, window: int) -> None:
        """Give up what lies more than the slack before the window of the next row."""
        tokens = (self.length - window - WINDOW_SLACK) // FRONT_STEP * FRONT_STEP
        self._fronts[window] = Front(tokens, int(self._live[tokens]))

    def live_slots(self) -> Ints:
        """(length,) slots of the committed tokens in position order."""
        return self._live[: self.length].copy()

    def appended_positions(self) -> Ints:
        """(N,) positions of the present append's rows."""
        return self._positions[self.first_appended : self.num_slots]

    def attention_plan(self, window: int | None = None) -> AttentionPlan:
        """What the rows of the present append see; built once per append and window."""
        if window not in self._plans:
            front = self.front(window)
            positions = self.appended_positions() - front.tokens
            length = self.length - front.tokens
            oldest = positions - (window - 1) if window is not None else np.zeros_like(positions)
            none = np.zeros(0, np.int32)
            own, ends = none, np.zeros(len(positions), np.int32)
            if not self._chain:
                hidden = np.maximum(oldest - length, 0).tolist()
                rows = [row[h:] for row, h in zip(self._own_slots(), hidden, strict=True)]
                own = np.concatenate([none, *rows]) - np.int32(front.slot)
                ends = np.cumsum([len(row) for row in rows], dtype=np.int32)
            runs = np.array([[0, length]], np.int32)
            if self.last_slot != self.length - 1:
                live = self._live[front.tokens : self.length] - front.slot
                starts = np.flatnonzero(np.diff(live, prepend=-2) != 1)
                lengths = np.diff(starts, append=length)
                runs = np.stack([live[starts], lengths], axis=1).astype(np.int32)
            self._plans[window] = AttentionPlan(
                positions=positions,
                slots=np.arange(self.first_appended - front.slot, self.num_slots - front.slot, dtype=np.int32),
                runs=runs,
                first_visible=np.maximum(oldest, 0).astype(np.int32),
                own=own,
                own_ends=ends,
                causal=self._chain,
            )
        return self._plans[window]

    def visible(self, window: int | None = None) -> npt.NDArray[np.bool_]:
        """(N, num_slots), True where a row of the present append may see a slot."""
        mask = np.zeros((self.num_appended, self.num_slots), bool)
        mask[:, self._live[: self.length]] = True
        own = self._own_slots()
        mask[np.repeat(np.arange(len(own)), [len(row) for row in own]), np.concatenate(own)] = True
        if window is not None:
            mask &= self.appended_positions()[:, None] - self._positions[None, : self.num_slots] < window
        return mask

    def _own_slots(self) -> tuple[Ints, ...]:
        """Per row: uncommitted ancestors and itself, in position order."""
        if self._own is None:
            first, end, last = self.first_appended, self.num_slots, self.last_slot
            if self._chain:
                line = np.arange(last + 1, end, dtype=np.int32)
                self._own = tuple(line[: slot - last] for slot in range(first, end))
            else:
                paths: dict[int, list[int]] = {last: []}
                for slot in range(first, end):
                    missing, above = [slot], int(self._parents[slot])
                    while above not in paths:
                        missing.append(above)
                        above = int(self._parents[above])
                    paths[slot] = [*paths[above], *reversed(missing)]
                self._own = tuple(np.array(paths[slot], np.int32) for slot in range(first, end))
        return self._own

    def _placed(self, parents: Sequence[int], start: int) -> tuple[Ints, Ints]:
        """Slots of the parents of the rows from slot `start` on, checked, and the rows' positions."""
        rows = np.asarray(parents, np.int32)
        rows = np.where(rows == -1, np.int32(self.last_slot), rows)
        pending = self._is_pending(rows, np.arange(start, start + len(rows)))
        if not np.all(pending | (rows == self.last_slot)):
            raise ValueError("a parent is neither the last committed slot nor an earlier uncommitted one")
        depths: list[int] = []
        for parent in rows.tolist():
            if parent >= start:
                depths.append(depths[parent - start] + 1)
            else:
                depths.append(int(self._positions[parent]) + 1 if parent >= 0 else 0)
        return rows, np.array(depths, np.int32)

    def _is_pending(self, slots: Ints, end: int | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of ``slots``, each before its ``end``, are uncommitted and not dead."""
        known = (slots >= self._first_pending) & (slots < end)
        return known & ~np.isin(slots, list(self._gone)) if self._gone else known

    def _settle(self, keep: Sequence[int] = ()) -> None:
        """Nothing but ``keep`` is uncommitted any more: drop the dead tail."""
        first = self.last_slot + 1
        self.num_slots = self.first_appended = max(keep, default=first - 1) + 1
        self._first_pending = first
        self._gone = frozenset(range(first, self.num_slots)).difference(keep)
        self._chain = first == self.length and not self._gone
        if self._chain and first < self.num_slots:
            kept = self._parents[first : self.num_slots]
            self._chain = np.array_equal(kept, np.arange(first - 1, self.num_slots - 1))
        self._forget_append()

    def _renumber(self, num_kept: int) -> None:
        """The owner has moved the live slots to [0, length), and the ``num_kept`` uncommitted ones behind them."""
        end = self.length + num_kept
        kept = np.setdiff1d(np.arange(self._first_pending, self.num_slots), list(self._gone))
        places = {self.last_slot: self.length - 1} | dict(zip(kept.tolist(), range(self.length, end), strict=True))
        parents = [places[parent] for parent in self._parents[kept].tolist()]
        self._positions[self.length : end] = self._positions[kept]
        self._parents[self.length : end] = parents
        order = np.arange(self.length, dtype=np.int32)
        self._live[: self.length] = self._positions[: self.length] = order
        self._parents[: self.length] = order - 1
        self._fronts = {window: Front(f.tokens, f.tokens) for window, f in self._fronts.items()}
        self._settle(range(self.length, end))

    def _forget_append(self) -> None:
        self._own = None
        self._plans = {}
