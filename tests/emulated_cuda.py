"""A GPU to try code on where there is none: tensors that say they are on "cuda", and compute on the CPU.

What can go wrong only on a GPU shows here: tensors of two devices in one operation are refused as CUDA refuses them; counted
is whatever makes the host wait for the device (a value handed to Python, a shape that depends on values, a copy from memory
that is not pinned); and each call of attention is noted with the kind of mask that decides which kernel may run. Values are
those of the CPU, so that results can be compared. Nothing here tells how fast a GPU is. Gradients are not supported.
"""

import contextlib
import traceback
from collections import Counter
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from activation_beacon import causal
from activation_beacon.causal import ToldMask

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SHAPES_FROM_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
COUNTING = {"nonzero"}  # likewise, where Python's own binding is called
TO_PYTHON = {"__bool__", "__contains__", "__float__", "__index__", "__int__", "item", "tolist"}
UNLINKED = (
    "not linked with support for cuda"  # what a build for CPUs says where Python's bindings ask for a device's guard
)


class OnCuda(torch.Tensor):
    """A tensor that says it is on the GPU; its values are those of `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        told = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=CUDA, **told)

    def __init__(self, inner):
        assert not isinstance(inner, OnCuda)
        self.inner = inner

    def __repr__(self, **_):
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs or {})))


class LowerRightBias(torch.Tensor):
    """Stands for torch's `causal_lower_right`, which cannot be made below a dispatch mode."""


def unwrapped(values):
    return tree_map_only(OnCuda, lambda tensor: tensor.inner, values)


def wrapped(values, known=()):
    """Results as tensors of the GPU; what an operation has returned of its arguments stays the same object."""
    own = {id(tensor.inner): tensor for tensor in known}
    return tree_map_only(
        torch.Tensor, lambda tensor: own.get(id(tensor)) if id(tensor) in own else OnCuda(tensor), values
    )


def tensors(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


class EmulatedCuda:
    """What a GPU was asked for.

    Attributes:
        waits: where the host had to wait for it: (what for, line of code) and how often.
        masks: kinds of mask that attention was given, and how often: "none", "causal", "lower right", "written out".
    """

    def __init__(self):
        self.waits = Counter()
        self.masks = Counter()

    @contextlib.contextmanager
    def on(self):
        """A block in which "cuda" is a device."""
        told = classmethod(lambda cls, device: torch.ones((1, 1, 1, 1), dtype=torch.bool).as_subclass(cls))
        with (
            mock.patch.object(torch.cuda, "_lazy_init"),
            mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
            mock.patch.object(ToldMask, "made", told),
            mock.patch.object(causal, "causal_lower_right", lower_right_bias),
            _Functions(self),
            _Operations(self),
        ):
            yield self

    def clear(self):
        """Forget what was counted."""
        self.waits.clear()
        self.masks.clear()

    def wait(self, reason):
        """Count a place in the code where the host waits."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [frame for frame in frames if "activation_beacon" in frame.filename or "transformers" in frame.filename]
        place = f"{ours[-1].filename.rsplit('/', 1)[-1]}: {ours[-1].line}" if ours else "the test"
        self.waits[reason, place] += 1


def lower_right_bias(*size):
    return torch.ones(size, dtype=torch.bool).tril(size[1] - size[0]).as_subclass(LowerRightBias)


class _Operations(TorchDispatchMode):
    """Every operation below autograd, factories included."""

    def __init__(self, emulated):
        super().__init__()
        self.emulated = emulated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = tensors(args, kwargs)
        ours = [tensor for tensor in given if isinstance(tensor, OnCuda)]
        device = kwargs.get("device")
        if not ours and not is_cuda(device):
            return func(*args, **kwargs)
        is_result_ours = is_cuda(device) if device is not None else True
        if device is not None:
            kwargs["device"] = "cpu"
        if func is aten.copy_.default:
            is_result_ours = isinstance(args[0], OnCuda)
            if len(ours) < len(given):
                self.emulated.wait("copy")
        elif func is aten._to_copy.default:
            if bool(ours) != is_result_ours:
                self.emulated.wait("copy")
        elif len(ours) < len(given):
            self._check_same_device(func, args, given)
        if func is aten._local_scalar_dense.default:
            self.emulated.wait("value")
            is_result_ours = False
        if func in SHAPES_FROM_VALUES or (func in INDEXING and any(t.dtype == torch.bool for t in tensors(args[1]))):
            self.emulated.wait("shape")
        result = func(*unwrapped(args), **unwrapped(kwargs))
        return wrapped(result, ours) if is_result_ours else result

    def _check_same_device(self, func, args, given):
        """As CUDA does: tensors of other devices are refused, unless they have no dimension or are indices."""
        if func in INDEXING and isinstance(args[0], OnCuda):
            self.emulated.wait("copy")
        elif any(tensor.dim() for tensor in given if not isinstance(tensor, OnCuda)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got cuda:0 and cpu")


class _Functions(TorchFunctionMode):
    """What Python calls, where a build for CPUs would look for a GPU's own code."""

    def __init__(self, emulated):
        super().__init__()
        self.emulated = emulated

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if name in ("tensor", "as_tensor") and is_cuda(kwargs.get("device")):
            return self._made(func, name, args, kwargs)
        if name in ("to", "cuda") and first is not None:
            device, dtype = _target(args[1:], kwargs) if name == "to" else (CUDA, None)
            if is_cuda(device) or (isinstance(first, OnCuda) and device is None):
                return self._moved(first, dtype, is_awaited=not kwargs.get("non_blocking"))
        if name == "pin_memory" and first is not None:
            pinned = first.clone()
            pinned.is_pinned_here = True
            return pinned
        if isinstance(first, OnCuda):
            if name in TO_PYTHON:
                self.emulated.wait("value")
                return func(first.inner, *args[1:])
            if name in ("__getitem__", "__setitem__"):
                return self._indexed(name, *args)
            if name == "data_ptr":
                return first.inner.data_ptr()
            if name == "contiguous":
                return first if first.inner.is_contiguous() else OnCuda(first.inner.contiguous())
        return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if UNLINKED not in str(error):
                raise
        if getattr(func, "__name__", "") in COUNTING:
            self.emulated.wait("shape")
        given = tensors(args, kwargs)
        assert all(isinstance(tensor, OnCuda) or not tensor.dim() for tensor in given), f"{func}: two devices"
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs)), [t for t in given if isinstance(t, OnCuda)])

    def _made(self, func, name, args, kwargs):
        if isinstance(args[0], OnCuda):
            return self._moved(args[0], kwargs.get("dtype"))
        self.emulated.wait("copy")
        return OnCuda(func(*args, **{**kwargs, "device": "cpu"}))

    def _moved(self, tensor, dtype, *, is_awaited=True):
        if isinstance(tensor, ToldMask):
            return tensor  # has no values that would have to be anywhere
        if isinstance(tensor, OnCuda):
            return tensor if dtype in (None, tensor.dtype) else aten._to_copy.default(tensor, dtype=dtype)
        if is_awaited or not hasattr(tensor, "is_pinned_here"):
            self.emulated.wait("copy")
        return OnCuda(tensor.detach().clone() if dtype is None else tensor.detach().to(dtype, copy=True))

    def _indexed(self, name, tensor, key, value=None):
        parts = list(key) if isinstance(key, tuple) else [key]
        for number, part in enumerate(parts):
            if isinstance(part, slice):
                parts[number] = slice(*(self._bound(end) for end in (part.start, part.stop, part.step)))
            elif isinstance(part, list) or (isinstance(part, torch.Tensor) and not isinstance(part, OnCuda)):
                self.emulated.wait("copy")
            elif isinstance(part, OnCuda) and (part.dim() == 0 or part.dtype == torch.bool):
                self.emulated.wait("value" if part.dim() == 0 else "shape")
        chosen = unwrapped(tuple(parts)) if isinstance(key, tuple) else unwrapped(parts)[0]
        if name == "__getitem__":
            return OnCuda(tensor.inner[chosen])
        if isinstance(value, torch.Tensor) and value.dim() and not isinstance(value, OnCuda):
            self.emulated.wait("copy")
        tensor.inner[chosen] = unwrapped(value)
        return None

    def _bound(self, end):
        if not isinstance(end, torch.Tensor):
            return end
        self.emulated.wait("value")
        return int(unwrapped(end))

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if isinstance(attn_mask, ToldMask):
            with self:  # what it calls is looked at as well
                return attn_mask.attended(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if not isinstance(query, OnCuda):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, **options
            )
        kind = "causal" if is_causal else "none"
        if isinstance(attn_mask, LowerRightBias):
            kind, attn_mask = "lower right", attn_mask.as_subclass(torch.Tensor)
        elif attn_mask is not None:
            assert isinstance(attn_mask, OnCuda), "a mask on another device"
            kind, attn_mask = "written out", attn_mask.inner
        self.emulated.masks[kind] += 1
        inner = unwrapped((query, key, value))
        assert not any(isinstance(tensor, OnCuda) for tensor in inner)
        return OnCuda(functional.scaled_dot_product_attention(*inner, attn_mask, dropout_p, is_causal, **options))


def _target(args, kwargs):
    """Device and dtype that a call of `Tensor.to` names."""
    device = dtype = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, (torch.device, str)):
            device = torch.device(value)
    return device, dtype


def to_cuda(module):
    """The module, whose parameters and buffers are on the GPU from now on; they take no gradients."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnCuda(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnCuda(buffer)
    return module
