"""Causal attention to a memory and, behind it, to the pass's own slots, without a mask of all their pairs.

A pass of T slots on S held entries needs a mask that is causal from the lower right. Written out, it takes T x (S + T)
elements, half of the own pairs are computed in vain, and on a GPU the flash kernel is lost. `LowerRight` stands in the
mask's place through the base's own forward and is understood where attention is computed: by torch's own causal bias on a
GPU; on a CPU by two calls of the flash kernel, one to the memory and one to the own slots, whose outputs are weighted by the
sums of their exponentials; or, where oneDNN multiplies faster than that kernel does (`matmul`), block by block of queries.
`Spans` are told likewise, of passes whose slots do not all see the whole memory or do not come one after another. Layers with a
sliding window tell the mask of it (`tell_layer`): then few entries are computed that no slot sees. All of it is exact, not an
approximation.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from activation_beacon import matmul
from activation_beacon.constants import sent

# B batch · H query heads · K kv heads · T slots of the pass · S held entries · D head dim

TOLD_WITH_GRADIENTS = ("cuda", "cpu")  # types of device on which a told mask is the faster one in training too

FEWEST_QUERIES = 192  # fewer are left to the flash kernel, where it needs no mask
FEWEST_IN_SPANS = 64  # likewise, where it would need one
MOST_QUERIES, MOST_ROWS = 192, 384  # of a block: of one head, and of all heads that share keys
LEAST_BAND = 256  # queries that attention within a window is computed for together, at least

# The public call does not return the sums of exponentials.
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextlib.contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """A block in which attention on a GPU is computed by other kernels than cuDNN's, in all threads.

    cuDNN makes a plan on the host for each number of keys, in milliseconds; in decoding each token has another number.
    """
    kernels = torch.backends.cuda
    others = (kernels.flash_sdp_enabled, kernels.mem_efficient_sdp_enabled, kernels.math_sdp_enabled)
    if device.type != "cuda" or not kernels.cudnn_sdp_enabled() or not any(is_enabled() for is_enabled in others):
        yield
        return
    kernels.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        kernels.enable_cudnn_sdp(True)


class ToldMask(torch.Tensor):
    """A mask (1, 1, 1, 1) that says which entries are seen, and computes attention itself; subclasses say how.

    Attributes:
        window: of the layer that is being computed: entries that a query sees, its own the last; None for all before it.
        is_cut: whether the layer computes the last query alone, where the base drops those before it (Gemma 4). That one may come
            as several, the heads that share keys.
    """

    window: int | None = None
    is_cut = False

    @classmethod
    def made(cls, device: torch.device) -> Any:
        """Such a mask; four dimensions, so that transformers takes it for one that the caller has prepared."""
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer for attention what the mask says; what else is made of it says the same."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            mask = kwargs["attn_mask"] if "attn_mask" in kwargs else args[3]
            return mask.attended(*args, **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, cls):
            vars(result).update(vars(next(arg for arg in args if isinstance(arg, cls))))
        return result

    def attended(self, *args: Any, **options: Any) -> torch.Tensor:
        """What `scaled_dot_product_attention` gives for its arguments, of which this mask is one."""
        raise NotImplementedError


class LowerRight(ToldMask):
    """A mask that says "causal from the lower right", whatever the number of queries and keys is.

    Attributes:
        num_copies: 0 if products are torch's; if they are to go through oneDNN, how many heads in a row of the keys and values
            given are copies of one, as transformers makes them.
    """

    num_copies = 0

    @classmethod
    def on(cls, device: torch.device, *, num_copies: int = 0) -> "LowerRight":
        """Such a mask."""
        mask: LowerRight = cls.made(device)
        mask.num_copies = num_copies
        return mask

    def attended(self, *args: Any, **options: Any) -> torch.Tensor:
        """Attention (B, H, T, D) of the last slots to all up to themselves."""
        if self.is_cut:
            query, key, value = args[:3]
            seen = slice(None if self.window is None else -self.window, None)
            options["attn_mask"] = None
            return nn.functional.scaled_dot_product_attention(query, key[:, :, seen], value[:, :, seen], **options)
        return attend(*args, **options, num_copies=self.num_copies, window=self.window)


class Spans(ToldMask):
    """A mask that says which entries each query sees: from the first of its text's on, up to a last of its own.

    Attributes:
        firsts: for each text, or once for all, the first entry that its queries see.
        stops: (1 or B, T); for each query, the entry behind the last that it sees.
        least: none of them is less.
        num_copies: as in `LowerRight`.
        num_slots: entries that are counted; where fewer are given, as of layers with a window, they are the last of these. None: as
            many as are given.
        written: the mask as it is written out, for each number of entries, window and device.
    """

    firsts: Sequence[int]
    stops: torch.Tensor
    least: int
    num_copies: int
    num_slots: int | None
    written: dict[tuple[int, int | None, torch.device], torch.Tensor]

    @classmethod
    def on(
        cls,
        device: torch.device,
        firsts: Sequence[int],
        stops: torch.Tensor,
        *,
        num_copies: int,
        least: int = 0,
        num_slots: int | None = None,
    ) -> "Spans":
        """Such a mask."""
        mask: Spans = cls.made(device)
        mask.firsts, mask.stops, mask.least, mask.num_copies = firsts, stops, least, num_copies
        mask.num_slots, mask.written = num_slots, {}
        return mask

    def attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,  # noqa: ARG002 - this one
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """Attention (B, H, T, D) of queries (B, H, T, D) to keys and values (B, K, S + T, D)."""
        if self.num_copies and not self.is_cut and can_be_split(query, key, value, dropout_p):
            once = _each_head_once(query, key, value, self.num_copies)
            if matmul.can_be_served(query, once[0][0, 0]):
                firsts, stops = self._of_given(key.shape[-2])
                return _in_blocks(query, *once, options.get("scale"), firsts, stops, self.window)
        begin = 0 if self.window is None else max(0, self.least - self._num_dropped(key.shape[-2]) - self.window)
        mask = self.written_out(key.shape[-2], key.device)[..., begin:]
        if self.is_cut:
            mask = mask[:, :, -1:]
        return nn.functional.scaled_dot_product_attention(
            query, key[:, :, begin:], value[:, :, begin:], mask, dropout_p, is_causal, **options
        )

    def written_out(self, num_entries: int, device: torch.device | None = None) -> torch.Tensor:
        """The mask (1 or B, 1, T, S + T) of so many entries, in the layer's window; on the layer's device, or where it was told."""
        kind = (num_entries, self.window, device or self.stops.device)
        if kind not in self.written:
            firsts, all_stops = self._of_given(num_entries)
            stops = all_stops.to(kind[2])[..., None]
            entries = torch.arange(num_entries, device=stops.device)
            seen: torch.Tensor = entries < stops
            if any(firsts):
                seen = seen & (entries >= sent(firsts, entries.device)[:, None, None])
            if self.window is not None:
                seen = seen & (entries >= stops - self.window)
            self.written[kind] = seen[:, None]
        return self.written[kind]

    def _num_dropped(self, num_entries: int) -> int:
        """Slots before so many entries, if these are not all."""
        return 0 if self.num_slots is None else self.num_slots - num_entries

    def _of_given(self, num_entries: int) -> tuple[Sequence[int], torch.Tensor]:
        """`firsts` and `stops`, counted from the first of so many entries."""
        dropped = self._num_dropped(num_entries)
        if not dropped:
            return self.firsts, self.stops
        return [max(0, first - dropped) for first in self.firsts], self.stops - dropped


class ToldEntries(ToldMask):
    """A mask that says "not the keys and values given, but these"; subclasses say which query sees which.

    Attributes:
        entries: of the layer that is being computed, in the subclass's form; the layer's cache sets them.
        of_layer: those that have been set so far, where others attend to them once more.
    """

    entries: list[Any]
    of_layer: dict[int, Sequence[Any]]

    @classmethod
    def on(cls, device: torch.device) -> Any:
        """Such a mask, without entries yet."""
        mask = cls.made(device)
        mask.entries, mask.of_layer = [], {}
        return mask

    def told(self, entries: Sequence[Any], layer: int | None = None) -> None:
        """Set the entries, in place: what has been made of the mask meanwhile, on another device, shares the list.

        Args:
            entries: in the subclass's form.
            layer: whose they are, where others may attend to them once more.
        """
        self.entries[:] = entries
        if layer is not None:
            self.of_layer[layer] = list(entries)

    def attended(self, query: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        """Attention (B, H, T, D) of queries (B, H, T, D) to the entries, as the subclass has it."""
        return self.attended_to(query, self.entries, scale=options.get("scale"))

    def attended_to(self, query: torch.Tensor, entries: Sequence[Any], *, scale: float | None) -> torch.Tensor:
        """Attention (B, H, T, D) of queries (B, H, T, D) to the entries."""
        raise NotImplementedError


def tell_layer(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module, whose hidden states are (B, T, M): a mask is told of the layer.

    Of its window; whether it computes one query alone; and again of the entries that another layer lends it.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, ToldMask):
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mask.window, mask.is_cut = attention.beacon_window, hidden.shape[1] == 1  # type: ignore[assignment]
    if isinstance(mask, ToldEntries) and attention.beacon_lender is not None:
        mask.told(_moved(mask.of_layer[attention.beacon_lender], hidden.device))  # type: ignore[index]


def _moved(entries: Any, device: torch.device) -> Any:
    """What a mask has been told, on another device."""
    if isinstance(entries, torch.Tensor):
        return entries.to(device)
    return type(entries)(_moved(each, device) for each in entries) if isinstance(entries, (list, tuple)) else entries


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,  # noqa: ARG001 - it is what brought us here
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    num_copies: int = 0,
    window: int | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of the last T of S + T slots: queries (B, H, T, D), keys and values (B, K, S + T, D).

    Args:
        num_copies: as in `LowerRight`.
        window: entries that a query sees, its own the last; None for all before it.
    """
    assert not is_causal, "a mask is given"
    size, total = query.shape[-2], key.shape[-2]
    if window is not None and total <= window:
        window = None
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    if num_copies and size >= FEWEST_QUERIES and can_be_split(query, key, value, dropout_p):
        once = _each_head_once(query, key, value, num_copies)
        if matmul.can_be_served(query, once[0][0, 0]):
            stops = torch.arange(total - size, total, device=query.device)[None] + 1
            return _in_blocks(query, *once, scale, [0], stops, window)
    if window is not None:
        return _in_bands(query, key, value, window, options)
    if size == total:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    if can_be_split(query, key, value, dropout_p):
        output: torch.Tensor = _InTwoParts.apply(query, key, value, scale)
        return output
    if query.device.type == "cuda" and query.dtype == key.dtype == value.dtype:
        mask: torch.Tensor = causal_lower_right(size, total)
    else:
        mask = torch.ones(size, total, dtype=torch.bool, device=query.device).tril(diagonal=total - size)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def can_be_split(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float) -> bool:
    """Whether the flash kernel for CPUs computes this."""
    tensors = (query, key, value)
    return (
        query.device.type == "cpu"
        and torch.backends.cuda.flash_sdp_enabled()  # `sdpa_kernel` sets it for every device
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.dtype
        == key.dtype
        == value.dtype  # under autocast they may differ, and the public call makes them alike
        and query.shape[-1] == value.shape[-1]
        and dropout_p == 0
        and all(tensor.stride(-1) == 1 for tensor in tensors)
    )


class _InTwoParts(torch.autograd.Function):
    """Attention (B, H, T, D) to the memory and to the own slots, each by the flash kernel, weighted by their sums of exponentials.

    The gradients are the kernel's own of either part, which it computes from the output and the sum of both.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        held = key.shape[-2] - query.shape[-2]
        own, own_sums = _flash_on_cpu(query, key[:, :, held:], value[:, :, held:], is_causal=True, scale=scale)
        memory, memory_sums = _flash_on_cpu(query, key[:, :, :held], value[:, :, :held], scale=scale)
        share = torch.sigmoid(memory_sums - own_sums)[..., None]  # sums (B, H, T) are logarithms
        output = torch.lerp(own, memory, share.to(own.dtype))
        ctx.save_for_backward(query, key, value, output, torch.logaddexp(memory_sums, own_sums))
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, output, sums = ctx.saved_tensors
        held = key.shape[-2] - query.shape[-2]
        by_part = [
            _flash_on_cpu_backward(
                gradient, query, key[:, :, part], value[:, :, part], output, sums, 0.0, is_causal, scale=ctx.scale
            )
            for part, is_causal in ((slice(None, held), False), (slice(held, None), True))
        ]
        queries, keys, values = zip(*by_part, strict=True)
        return queries[0] + queries[1], torch.cat(keys, dim=2), torch.cat(values, dim=2), None


def _in_bands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, options: dict[str, Any]
) -> torch.Tensor:
    """`attend` within a window: some queries (B, H, t, D) after others, each time with the entries that any of them sees."""
    size, total = query.shape[-2], key.shape[-2]
    outputs = []
    for first in range(0, size, max(window, LEAST_BAND)):
        own = query[:, :, first : first + max(window, LEAST_BAND)]
        stop = total - size + first + own.shape[-2]
        begin = max(0, total - size + first + 1 - window)
        ahead = stop - begin - own.shape[-2]
        seen = torch.ones(own.shape[-2], stop - begin, dtype=torch.bool, device=query.device)
        mask = seen.tril(diagonal=ahead).triu(diagonal=ahead + 1 - window)
        keys, values = key[:, :, begin:stop], value[:, :, begin:stop]
        outputs.append(nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2)


def _each_head_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_copies: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, K, S + T, D) of which each head stands there once, if they were made as many as the queries' heads."""
    step = num_copies if key.shape[1] == query.shape[1] else 1
    return key[:, ::step], value[:, ::step]


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    firsts: Sequence[int],
    stops: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Block by block of queries, with the entries that any of the block sees; heads that share keys go together.

    Args:
        firsts: for each text, or once for all, the first entry that is seen.
        stops: (B, T) or (1, T), the entry behind the last that each query sees.
        window: entries that each query sees at most; None for all from the first on.
    """
    num_shared, dim = query.shape[1] // key.shape[1], query.shape[-1]
    most = min(MOST_QUERIES, max(1, MOST_ROWS // num_shared))
    query = query * (dim**-0.5 if scale is None else scale)
    turned = value.transpose(2, 3).contiguous()
    output = torch.empty_like(query)
    blocks_of = [_blocks(each, most, window) for each in stops]
    for row, head in itertools.product(range(key.shape[0]), range(key.shape[1])):
        first = firsts[row % len(firsts)]
        sharing = slice(head * num_shared, (head + 1) * num_shared)
        for block in blocks_of[row % len(blocks_of)]:
            begin = max(first, block.begin)
            keys, values = key[row, head, begin : block.stop], turned[row, head, :, begin : block.stop]
            earlier = block.earlier[:, begin - block.begin :]
            output[row, sharing, block.queries] = _block(
                query[row, sharing, block.queries], keys, values, earlier, block.later
            )
    return output


class _Block(NamedTuple):
    """Queries that are computed together, and what they see.

    Attributes:
        queries: which.
        begin, stop: the entries that any of them sees.
        earlier, later: (T, L), what is added to the first scores of each, and to the last: nothing to those that it sees.
    """

    queries: slice
    begin: int
    stop: int
    earlier: torch.Tensor
    later: torch.Tensor


def _blocks(stops: torch.Tensor, most: int, window: int | None) -> list[_Block]:
    """Queries (T,) in blocks of at most so many."""
    blocks = []
    for first in range(0, len(stops), most):
        own = stops[first : first + most, None]
        least, last = (int(each) for each in own.aminmax())
        begin = 0 if window is None else max(0, least - window)
        is_later = torch.arange(least, last, device=own.device) >= own
        is_earlier = is_later[:, :0]
        if window is not None:
            is_earlier = torch.arange(begin, max(begin, last - window), device=own.device) < own - window
        earlier, later = (
            torch.zeros(each.shape, device=own.device).masked_fill_(each, -torch.inf) for each in (is_earlier, is_later)
        )
        blocks.append(_Block(slice(first, first + len(own)), begin, last, earlier, later))
    return blocks


def _block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, earlier: torch.Tensor, later: torch.Tensor
) -> torch.Tensor:
    """Heads of queries (R, T, D) on the same keys (S, D) and values (D, S): (R, T, D)."""
    scores = matmul.linear(query.reshape(-1, query.shape[-1]), keys)
    by_head = scores.view(-1, query.shape[1], scores.shape[-1])
    if earlier.shape[1]:
        by_head[..., : earlier.shape[1]].add_(earlier)
    if later.shape[1]:
        by_head[..., -later.shape[1] :].add_(later)
    return matmul.linear(torch.softmax(scores, dim=-1), values.contiguous()).view(query.shape)
