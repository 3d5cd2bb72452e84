"""Reading tokens into a beacon cache: the one place that calls the base model.

A reading is planned in integers (`plan`), then executed in passes: one for each chunk that is closed, and a last one for
the tail. Every pass calls the base's own forward on a cache; no modeling code is copied.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from activation_beacon import grouped
from activation_beacon.batch import NewTokens
from activation_beacon.cache import BeaconCache
from activation_beacon.causal import FEWEST_IN_SPANS, TOLD_WITH_GRADIENTS, LowerRight, Spans, without_cudnn
from activation_beacon.chunk_inputs import ReadingModel, anchor_slots, anchors_of_all, interleave, laid_end_to_end
from activation_beacon.chunk_memory import joined_layer, memory_view
from activation_beacon.constants import constant, sent
from activation_beacon.entries import PassEnded
from activation_beacon.errors import UnsupportedError
from activation_beacon.grouped import ByChunk, GroupLayer
from activation_beacon.layouts import ChunkLayout, GroupLayout
from activation_beacon.plan import Row, RowReading, TextPlanner, closing_rounds
from activation_beacon.readout import OF_ONE_PASS, Readout, Wanted
from activation_beacon.recorded import recorded_step
from activation_beacon.resuming import ChunkRows
from activation_beacon.rope import KeyMover
from activation_beacon.rows import take
from activation_beacon.sites import DecoderSite, can_end_early, understands_told_masks

# B batch · N new tokens (columns) · T slots of a pass · S cache slots · M model dim · V vocabulary

Progress = Callable[[int, int], None]


def read(
    model: ReadingModel,
    site: DecoderSite,
    cache: BeaconCache,
    new: NewTokens,
    wanted: Wanted,
    *,
    progress: Progress | None = None,
) -> Readout:
    """Read new tokens into `cache`, closing chunks on the way. On an error the cache stays as it was.

    Args:
        model: the attached model.
        site: its layers and positions.
        cache: read on in place.
        new: the tokens.
        wanted: which logits and losses to return.
        progress: called with the chunks closed and to be closed, after each pass.

    Raises:
        RatioError, CapacityError: from the plan, before anything is read.
    """
    readings = [
        TextPlanner(cache.config, policy, site.max_positions).plan(row, count)
        for row, policy, count in zip(cache.rows, cache.policies, new.counts, strict=True)
    ]
    if site.is_recurrent and not _are_alike(site, cache, readings):
        return _read_in_turn(model, site, cache, new, wanted, readings, progress)
    reader = _Reader(model, site, cache, new, wanted, readings)
    if not any(reading.closings for reading in readings):
        if not reader.replay_step():
            reader.read_tail()
        return reader.readout
    reader.cache = cache.fork()
    reader.close_chunks(progress)
    reader.read_tail()
    cache.adopt(reader.cache)
    return reader.readout


def _are_alike(site: DecoderSite, cache: BeaconCache, readings: Sequence[RowReading]) -> bool:
    """Whether the rows of a batch are read in passes without padding that would leave traces in states.

    Before the first token it leaves none in most models: states are zero then, and stay so.
    """
    is_begun = cache.num_slots > 0 or any(reading.closings for reading in readings)
    passes = {(reading.restart, reading.closings, reading.stop - reading.raw_start) for reading in readings}
    return len(passes) == 1 or not (is_begun or site.padding_leaves_traces)


def _read_in_turn(
    model: ReadingModel,
    site: DecoderSite,
    cache: BeaconCache,
    new: NewTokens,
    wanted: Wanted,
    readings: Sequence[RowReading],
    progress: Progress | None,
) -> Readout:
    """`read`, row by row.

    Raises:
        UnsupportedError: where hidden states or attentions are asked for, which come of one pass over all rows.
    """
    for option in OF_ONE_PASS:
        if wanted.options.get(option):
            raise UnsupportedError(
                f"{option} needs rows that are read together; padding would change the states that this model's layers carry. "
                "Give texts of one length, or one at a time."
            )
    rows, readouts, done = [], [], 0
    for index, (start, count, reading) in enumerate(zip(new.starts, new.counts, readings, strict=True)):
        row, own = slice(index, index + 1), cache.row(index)
        labels = None if wanted.labels is None else wanted.labels[row]
        tokens, of_row = NewTokens(new.ids[row], [start], [count]), dataclasses.replace(wanted, labels=labels)
        readouts.append(read(model, site, own, tokens, of_row, progress=_of_all(progress, done, readings)))
        rows.append(own)
        done += len(reading.closings)
    seen = [row.tokens_seen for row in cache.rows]
    cache.adopt(BeaconCache.stack(rows))
    return Readout.of_rows(readouts, wanted, new, seen)


def _of_all(progress: Progress | None, before: int, readings: Sequence[RowReading]) -> Progress | None:
    """What one row tells of its chunks, told of those of all rows."""
    if progress is None:
        return None
    total = sum(len(reading.closings) for reading in readings)
    return lambda done, _of_row: progress(before + done, total)


class _Reader:
    """One reading in progress; lives for one call of `read`."""

    def __init__(
        self,
        model: ReadingModel,
        site: DecoderSite,
        cache: BeaconCache,
        new: NewTokens,
        wanted: Wanted,
        readings: Sequence[RowReading],
    ) -> None:
        self.model = model
        self.site = site
        self.cache = cache
        self.new = new
        self.wanted = wanted
        self.readings = readings
        self.ids = _appended_ids(cache, new)  # (B, longest text), right-aligned
        self.readout = Readout(wanted, new, [row.tokens_seen for row in cache.rows])

    # --- chunks ---

    def close_chunks(self, progress: Progress | None) -> None:
        """Close every chunk that the plan names, pass by pass."""
        rows = [Row(row.chunk_size) if reading.restart else row for row, reading in self._rows_and_readings()]
        self.cache.rows = tuple(rows)
        rounds = list(closing_rounds(self.readings))
        anchors = self._anchor_slots(rounds)
        done = 0
        while done < len(rounds):
            (members, layout), group = rounds[done], self._group(rounds[done:])
            stop = done + max(1, len(group.layouts))
            if len(group.layouts) > 1:
                self._close_together(members, group, anchors[done:stop])
            else:
                self._close(members, layout, anchors[done])
            done = stop
            if progress is not None:
                progress(done, len(rounds))

    def _group(self, rounds: Sequence[tuple[tuple[int, ...], ChunkLayout]]) -> GroupLayout:
        """The chunks that come next and can be closed in one pass; none where the next is better closed alone."""
        members, first = rounds[0]
        lengths = {self.cache.rows[row].memory_length for row in members}
        most = grouped.rows_together(self.ids.device) // len(members)
        is_begun = self.cache.config.placement == "append" and any(self.cache.rows[row].tail_length for row in members)
        is_alone = is_begun or len(lengths) > 1 or 2 * first.num_slots > most
        if is_alone or self.model.training or not self._understands_masks():  # in training attention may drop some
            return GroupLayout(())
        size, layouts, num_slots = self.cache.config.chunk_size, [], 0
        starts = [len(self.cache.rows[row].chunks) * size for row in members]
        for number, (others, layout) in enumerate(rounds):
            num_slots += layout.num_slots
            moved = [start + number * size for start in starts]
            is_wanted = self.readout.first_wanted(members, moved, size) is not None
            if others != members or num_slots > most or is_wanted:
                break
            layouts.append(layout)
        return GroupLayout(tuple(layouts))

    def _close_together(
        self, members: tuple[int, ...], group: GroupLayout, anchor_slots: Sequence[torch.Tensor]
    ) -> None:
        """Close several chunks of the same rows, whose memories are of one length, in one pass."""
        cache, size, device = self.cache, self.cache.config.chunk_size, self.ids.device
        starts = [len(cache.rows[row].chunks) * size for row in members]
        length = cache.rows[members[0]].memory_length
        pieces = [
            interleave(self.model, self._text(members, [start + number * size for start in starts], size), layout)
            for number, layout in enumerate(group.layouts)
        ]
        mover = KeyMover(self.site.ropes, constant(group.shifts, device))
        mask = ByChunk.on(device)
        layers = [
            GroupLayer(memory, group, mover, index, mask, site.attended, lent_as=self.site.lent_as(index))
            if site.has_entries
            else memory
            for index, (site, memory) in enumerate(
                zip(self.site.layers, memory_view(cache, members, length).layers, strict=True)
            )
        ]
        layers[self.site.last_kept].ends_pass = can_end_early(self.model.get_decoder(), self.site)
        self._call_base(
            None,
            (),
            position_ids=(constant(group.positions, device) + length)[None],
            attention_mask=mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            beacon_slots=constant(group.beacon_slots, device),
            beacon_anchor_slots=anchors_of_all(anchor_slots, group),
            beacon_runs=group.runs,
            **laid_end_to_end(pieces),
        )
        kept = ((layer.keys, layer.values) if layer.has_entries else None for layer in layers)
        self._keep(members, layers, kept, group.layouts)

    def _rows_and_readings(self) -> Any:
        return zip(self.cache.rows, self.readings, strict=True)

    def _anchor_slots(self, rounds: Sequence[tuple[tuple[int, ...], ChunkLayout]]) -> list[torch.Tensor]:
        """For each pass, slots (n,) or (B, n) of the tokens that its beacons begin as; copied to a GPU together."""
        config, device = self.cache.config, self.ids.device
        if not config.exact:
            return [constant(layout.anchor_slots, device) for _, layout in rounds]
        ids, chosen = self.ids.cpu(), []
        num_closed = [len(row.chunks) for row in self.cache.rows]
        for members, layout in rounds:
            starts = [num_closed[row] * config.chunk_size for row in members]
            chosen.append(anchor_slots(config, layout, self._text(members, starts, config.chunk_size, ids)))
            for row in members:
                num_closed[row] += 1
        parts = sent(torch.cat([each.flatten() for each in chosen]), device).split([each.numel() for each in chosen])
        return [part.view(each.shape) for each, part in zip(chosen, parts, strict=True)]

    def _close(self, members: tuple[int, ...], layout: ChunkLayout, anchor_slots: torch.Tensor) -> None:
        cache = self.cache
        starts = [len(cache.rows[row].chunks) * cache.config.chunk_size for row in members]
        ids = self._text(members, starts, cache.config.chunk_size)
        lengths = [cache.rows[row].memory_length for row in members]
        rows = self._rows_to_compute(members, layout, anchor_slots)
        memory = memory_view(cache, members, max(lengths), rows)
        wanted = self.readout.first_wanted(members, starts, cache.config.chunk_size)
        ends = wanted is None and can_end_early(self.model.get_decoder(), self.site)
        memory.layers[self.site.last_kept].ends_pass = ends
        given = interleave(self.model, ids, layout)
        if rows is None:
            slots = torch.arange(layout.num_slots, device=ids.device)
            inputs = {
                **given,
                "position_ids": _positions(lengths, slots),
                "attention_mask": self._mask(lengths, slots),
                "beacon_slots": constant(layout.beacon_slots, ids.device),
                "beacon_anchor_slots": anchor_slots,
                "beacon_runs": GroupLayout((layout,)).runs,
            }
        else:
            inputs = {
                **{name: rows.of(states) for name, states in given.items()},
                "position_ids": _positions(lengths, rows.slots),
                "attention_mask": self._mask(lengths, rows.slots, rows=rows),
                "beacon_slots": rows.beacon_rows,
                "beacon_anchor_slots": rows.repeated_rows,
            }
        row_of = layout.raw_slots if rows is None else [rows.row_of(slot) for slot in layout.raw_slots]
        output = self._call_base(wanted, row_of, past_key_values=memory, use_cache=True, **inputs)
        if output is not None:
            self.readout.collect(output, members, starts, cache.config.chunk_size)
        self._keep(members, memory.layers, self._kept(memory.layers, layout), (layout,))

    def _kept(self, passed: Sequence[Any], layout: ChunkLayout) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys, moved, and values (B, K, n, D) that a chunk leaves behind in each layer; None of those that keep none."""
        mover = KeyMover(self.site.ropes, constant(layout.shifts, self.ids.device))
        for index, layer in enumerate(passed):
            if not self.site.layers[index].has_entries:
                yield None
                continue
            keys, values = layer.chunk()
            kept = constant(layout.kept_slots, keys.device)
            yield mover.move_entries(keys.index_select(2, kept), values.index_select(2, kept), index)

    def _rows_to_compute(
        self, members: tuple[int, ...], layout: ChunkLayout, anchor_slots: torch.Tensor
    ) -> ChunkRows | None:
        """What is left to compute of a chunk whose first tokens stand in the tail; None where all of it is."""
        config = self.cache.config
        if config.placement != "append" or self.site.is_recurrent or not self._understands_masks():
            return None
        num_held = min(config.chunk_size, *(self.cache.rows[row].tail_length for row in members))
        repeated = anchor_slots if config.anchored else anchor_slots[:0]
        if num_held <= repeated.shape[-1]:
            return None
        return ChunkRows(layout.num_slots, num_held, len(layout.beacon_slots), repeated)

    def _keep(
        self,
        members: tuple[int, ...],
        passed: Sequence[Any],
        kept: Iterable[tuple[torch.Tensor, torch.Tensor] | None],
        layouts: Sequence[ChunkLayout],
    ) -> None:
        """Append what chunks leave behind, for each layer (B, K, n, D), to the memory of their rows, and drop the rest."""
        cache = self.cache
        others = {index: row for index, row in enumerate(cache.rows) if index not in members}
        for index, (chunk, entries) in enumerate(zip(passed, kept, strict=True)):
            if entries is None:
                assert not (others and chunk.number_of_states), "rows that differ are read in turn"
                cache.layers[index] = chunk.closed()
                continue
            chunk.forget()
            cache.layers[index] = joined_layer(cache.layers[index], chunk, *entries, members, others)
            chunk.held = None  # what was held is free before the next layer's is joined
        for layout in layouts:
            cache.rows = tuple(row.after_closing(layout) if b in members else row for b, row in enumerate(cache.rows))

    # --- the tail ---

    def replay_step(self) -> bool:
        """Append one token to each row by a recorded step, if steps are to be recorded and this is one."""
        cache, wanted = self.cache, self.wanted
        is_step = self.new.columns == 1 and cache.slots_held > 0
        is_plain = wanted.first_column == 0 and not wanted.needs_all and not any(wanted.options.values())
        if not (self.model.cuda_graphs and is_step and is_plain):
            return False
        step = recorded_step(self.model, self.site, cache)
        if step is None:
            return False
        num_slots = cache.num_slots
        self.readout.logits = step.run(cache, self.new.ids)
        self._settle([1] * cache.batch_size, num_slots, left=False)
        return True

    def read_tail(self) -> None:
        """Read each row's tokens after its last closed chunk, raw."""
        cache, readings = self.cache, self.readings
        counts = [reading.stop - reading.raw_start for reading in readings]
        starts = [reading.raw_start for reading in readings]
        num_slots, width = cache.slots_held, max(counts)
        lengths = [row.cache_length for row in cache.rows]
        left = num_slots == 0  # nothing held: padding may stand before the new tokens, as tokenizers put it
        offsets = [width - count if left else 0 for count in counts]
        first = [start - offset for start, offset in zip(starts, offsets, strict=True)]
        ids = self._text(range(len(counts)), first, width)
        slots = torch.arange(width, device=ids.device)
        wanted = self.readout.wanted_slots(starts, counts, offsets)
        if self._is_compressed():
            mask = self._mask(lengths, slots, counts)
        else:
            mask = _tail_mask(num_slots, lengths, counts, width, left, ids.device)
        held = cache.layers
        cache.layers = [layer.begun() for layer in held]
        last = cache.layers[self.site.last_kept]
        try:
            last.ends_pass = wanted is None and can_end_early(self.model.get_decoder(), self.site)
            output = self._call_base(
                wanted,
                range(width),
                input_ids=ids,
                position_ids=_positions([n - offset for n, offset in zip(lengths, offsets, strict=True)], slots),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **self.wanted.options,
            )
            if output is not None:
                self.readout.last = output
                self.readout.collect(
                    output, range(len(counts)), starts, width, offsets=offsets, counts=counts, slots=wanted
                )
                if self.wanted.first_column is not None and self.readout.logits is None:  # what was wanted is padding
                    shape = (len(counts), self.new.columns - self.wanted.first_column, output.logits.shape[-1])
                    self.readout.logits = output.logits.new_zeros(shape)
            self._settle(counts, num_slots, left)
        except BaseException:  # nothing of what was held but its slots has changed
            cache.layers = held
            cache.truncate(num_slots)
            raise
        finally:
            last.ends_pass = False

    def _settle(self, counts: list[int], num_slots: int, left: bool) -> None:
        """Note what the tail's pass has added, and align rows of different lengths at the right again: all of it or nothing."""
        cache = self.cache
        rows = tuple(row.after_reading(reading.stop - row.tokens_seen) for row, reading in self._rows_and_readings())
        if not left and len(set(counts)) > 1:
            cache.align(rows, [num_slots + count for count in counts])
        cache.token_ids, cache.rows = self.ids, rows

    # --- what both share ---

    def _mask(
        self,
        lengths: Sequence[int],
        slots: torch.Tensor,
        counts: Sequence[int] | None = None,
        *,
        rows: ChunkRows | None = None,
    ) -> torch.Tensor | None:
        """The mask of a pass on or into beacons: told where that is understood, else what padding there is.

        Where some texts hold less than others, or slots are left out, it is told to oneDNN, which takes each text and each block
        of slots by itself; others have it written out. With gradients nothing is told but causality; the base writes out
        the rest, once for all layers.

        Args:
            lengths: entries that each text holds.
            slots: (T,) or (B, T) of the pass, counted from what is held.
            counts: slots of each text, with padding behind them, which sees what it likes; None for T.
            rows: which slots of a chunk they are; None for all.
        """
        num_rows, longest = slots.shape[-1], max(lengths)
        if not self._understands_masks():
            if self._trains_on_told_masks() and rows is None and longest and len(set(lengths)) == 1 and num_rows > 1:
                return LowerRight.on(slots.device)
            return _padding_mask(lengths, counts or [num_rows] * len(lengths), num_rows, slots.device)
        is_by_onednn = self.model.is_by_onednn(num_rows)
        if rows is None and len(set(lengths)) == 1:
            if num_rows == 1 or not (longest or is_by_onednn or self.site.layers_differ):
                return None  # the base makes none either
            return LowerRight.on(slots.device, num_copies=self.site.num_copies if is_by_onednn else 0)
        firsts, stops = [longest - length for length in lengths], slots.view(-1, num_rows) + longest + 1
        num_copies = self.site.num_copies if is_by_onednn and num_rows >= FEWEST_IN_SPANS else 0
        num_slots = longest + (num_rows if rows is None else rows.num_slots)
        spans = Spans.on(slots.device, firsts, stops, num_copies=num_copies, least=longest + 1, num_slots=num_slots)
        return spans if num_copies or self.site.layers_differ else spans.written_out(num_slots)

    def _is_compressed(self) -> bool:
        """Whether a chunk of some row has been closed; until then outputs are the base's, to the bit."""
        return any(row.chunks for row in self.cache.rows)

    def _understands_masks(self) -> bool:
        """Whether a pass may be given a mask of ours, and is the better for it."""
        return not torch.is_grad_enabled() and understands_told_masks(self.model, self.site)

    def _trains_on_told_masks(self) -> bool:
        """Whether a pass that keeps gradients is the better for one that is causal from the lower right."""
        return self.ids.device.type in TOLD_WITH_GRADIENTS and understands_told_masks(self.model, self.site)

    def _text(
        self, members: Sequence[int], starts: Sequence[int], width: int, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids (B, width) of each member's text from its start on; padded where the text ends before or starts after."""
        ids = self.ids if ids is None else ids
        longest = ids.shape[1]
        ends = [longest - self.readings[row].stop + start + width for row, start in zip(members, starts, strict=True)]
        surplus = max(ends) - longest
        padded = torch.nn.functional.pad(ids, (0, surplus)) if surplus > 0 else ids
        return take(padded, members, ends, width, dim=1)

    def _call_base(self, wanted: list[int] | None, slots: Sequence[int], **inputs: Any) -> ModelOutput | None:
        """Run the base; with its head only at those of `slots` that are wanted."""
        is_closing = "beacon_slots" in inputs
        batch, width = inputs["inputs_embeds" if is_closing else "input_ids"].shape[:2]
        is_touched = is_closing or self._is_compressed()
        # Each pass that writing comes to has another number of entries: of one token, or of the beacons of a chunk read before.
        is_writing = width == 1 or (is_closing and width < self.cache.config.chunk_size)
        with (
            self.model.fast_products(batch * width) if is_touched else contextlib.nullcontext(),
            without_cudnn(self.ids.device) if is_writing else contextlib.nullcontext(),
        ):
            return self._call_for(wanted, slots, inputs)

    def _call_for(self, wanted: list[int] | None, slots: Sequence[int], inputs: dict[str, Any]) -> ModelOutput | None:
        if wanted is None:
            with contextlib.suppress(PassEnded):
                self.model.get_decoder()(**inputs)
            return None
        every = list(range(len(slots)))
        keep: int | torch.Tensor = 0 if wanted == every else 1
        if wanted not in (every, every[-1:]) or list(slots) != every or "beacon_slots" in inputs:
            keep = sent([slots[number] for number in wanted], self.ids.device)
        return self.model.base_forward(**inputs, logits_to_keep=keep)


def _appended_ids(cache: BeaconCache, new: NewTokens) -> torch.Tensor:
    """All ids of each text (B, longest), right-aligned: those seen and the new ones."""
    fresh = new.right_aligned()
    if cache.token_ids.shape[1] == 0:
        return fresh
    held = cache.token_ids.to(fresh.device)
    if len(set(new.counts)) == 1:
        return torch.cat((held, fresh), dim=1)
    totals = [row.tokens_seen + count for row, count in zip(cache.rows, new.counts, strict=True)]
    ends = [held.shape[1] + count for count in new.counts]
    left_aligned = take(
        torch.nn.functional.pad(fresh, (0, fresh.shape[1])),
        range(len(ends)),
        [2 * fresh.shape[1] - count for count in new.counts],
        fresh.shape[1],
        dim=1,
    )
    return take(torch.cat((held, left_aligned), dim=1), range(len(ends)), ends, max(totals), dim=1)


def _positions(first: Sequence[int], slots: torch.Tensor) -> torch.Tensor:
    """Position ids (1 or B, T): each row's slots (T,) or (B, T) counted from its first position; padding before it is at 0."""
    if len(set(first)) == 1:
        return (slots + first[0]).view(-1, slots.shape[-1])
    return (sent(first, slots.device)[:, None] + slots).clamp(min=0)


def _padding_mask(
    lengths: Sequence[int], counts: Sequence[int], width: int, device: torch.device
) -> torch.Tensor | None:
    """Which of memory and new slots hold something, (B, S + T); None where all do. Memory stands at the right of S."""
    longest = max(lengths)
    if all(length == longest for length in lengths) and all(count == width for count in counts):
        return None
    slots = torch.arange(longest + width, device=device)[None]
    first = sent([longest - length for length in lengths], device)[:, None]
    stop = sent([longest + count for count in counts], device)[:, None]
    return ((slots >= first) & (slots < stop)).long()


def _tail_mask(
    num_slots: int, lengths: Sequence[int], counts: Sequence[int], width: int, left: bool, device: torch.device
) -> torch.Tensor | None:
    """The mask of a tail's pass, with padding on the left while nothing is held and on the right afterwards."""
    if left:
        return _padding_mask(counts, [0] * len(counts), 0, device)
    assert max(lengths) == num_slots, "the longest row reaches to the first slot"
    return _padding_mask(lengths, counts, width, device)
