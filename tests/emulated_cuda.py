"""GPUs to try code on where there is none: tensors that say they are on "cuda", and compute on the CPU.

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
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    """A tensor that says it is on a GPU; its values are those of `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner, device=CUDA):
        told = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **told)

    def __init__(self, inner, device=CUDA):
        assert not isinstance(inner, OnCuda)
        self.inner = inner

    def __repr__(self, **_):
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        device = next(tensor.device for tensor in tensors(args, kwargs) if isinstance(tensor, OnCuda))
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs or {})), device)


class LowerRightBias(torch.Tensor):
    """Stands for torch's `causal_lower_right`, which cannot be made below a dispatch mode."""


def unwrapped(values):
    return tree_map_only(OnCuda, lambda tensor: tensor.inner, values)


def wrapped(values, device, known=()):
    """Results as tensors of a GPU; what an operation has returned of its arguments stays the same object."""
    own = {id(tensor.inner): tensor for tensor in known}

    def wrap(tensor):
        return own[id(tensor)] if id(tensor) in own else OnCuda(tensor, device)

    return tree_map_only(torch.Tensor, wrap, values)


def tensors(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def cuda_of(device):
    """The GPU that a device names, with its number; None if it is none."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else None


def check_same_device(func, given):
    """As CUDA does: tensors of several devices are refused, unless those of the host have no dimension."""
    devices = {tensor.device for tensor in given if isinstance(tensor, OnCuda) or tensor.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {devices}")


class EmulatedCuda:
    """What a GPU was asked for.

    Attributes:
        waits: where the host had to wait for it: (what for, line of code) and how often.
        masks: kinds of mask that attention was given, and how often: "none", "causal", "lower right", "written out".
        by_cudnn: how often cuDNN might have computed it.
    """

    def __init__(self):
        self.waits = Counter()
        self.masks = Counter()
        self.by_cudnn = 0

    @contextlib.contextmanager
    def on(self):
        """A block in which "cuda" is a device."""
        told = classmethod(lambda cls, device: torch.ones((1, 1, 1, 1), dtype=torch.bool).as_subclass(cls))
        with (
            mock.patch.object(torch.cuda, "_lazy_init"),
            mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
            mock.patch.object(torch.cuda, "synchronize"),
            mock.patch.object(torch.cuda, "reset_peak_memory_stats"),
            mock.patch.object(torch.cuda, "max_memory_allocated", return_value=0),
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
        self.by_cudnn = 0

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
        if not ours and cuda_of(device) is None:
            return func(*args, **kwargs)
        target = cuda_of(device) if device is not None else ours[0].device
        if device is not None:
            kwargs["device"] = "cpu"
        if func is aten.copy_.default:
            target = cuda_of(args[0].device)
            if len(ours) < len(given):
                self.emulated.wait("copy")
        elif func is aten._to_copy.default:
            if bool(ours) != (target is not None):
                self.emulated.wait("copy")
        elif func in INDEXING and len(ours) < len(given) and isinstance(args[0], OnCuda):
            self.emulated.wait("copy")  # indices may be on the host
            check_same_device(func, ours)
        else:
            check_same_device(func, given)
        if func is aten._local_scalar_dense.default:
            self.emulated.wait("value")
            target = None
        if func in SHAPES_FROM_VALUES or (func in INDEXING and any(t.dtype == torch.bool for t in tensors(args[1]))):
            self.emulated.wait("shape")
        result = func(*unwrapped(args), **unwrapped(kwargs))
        return result if target is None else wrapped(result, target, ours)


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
        if name in ("tensor", "as_tensor") and cuda_of(kwargs.get("device")) is not None:
            return self._made(func, args, kwargs)
        if name in ("to", "cuda") and first is not None:
            device, dtype = _target(args[1:], kwargs) if name == "to" else (CUDA, None)
            if device is None:
                device = first.device
            if cuda_of(device) is not None:
                return self._moved(first, cuda_of(device), dtype, is_awaited=not kwargs.get("non_blocking"))
        if name == "pin_memory" and first is not None:
            pinned = first.clone()
            pinned.is_pinned_here = True
            return pinned
        if isinstance(first, OnCuda):
            return self._of_ours(func, name, args, kwargs)
        return self._run(func, args, kwargs)

    def _of_ours(self, func, name, args, kwargs):
        first = args[0]
        if name in TO_PYTHON:
            self.emulated.wait("value")
            return func(first.inner, *args[1:])
        if name in ("__getitem__", "__setitem__"):
            return self._indexed(name, *args)
        if name == "data_ptr":
            return first.inner.data_ptr()
        if name == "contiguous":
            return first if first.inner.is_contiguous() else OnCuda(first.inner.contiguous(), first.device)
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
        check_same_device(func, given)
        ours = [tensor for tensor in given if isinstance(tensor, OnCuda)]
        return wrapped(func(*unwrapped(args), **unwrapped(kwargs)), ours[0].device, ours)

    def _made(self, func, args, kwargs):
        device = cuda_of(kwargs["device"])
        if isinstance(args[0], OnCuda):
            return self._moved(args[0], device, kwargs.get("dtype"))
        self.emulated.wait("copy")
        return OnCuda(func(*args, **{**kwargs, "device": "cpu"}), device)

    def _moved(self, tensor, device, dtype, *, is_awaited=True):
        if isinstance(tensor, ToldMask):
            return tensor  # has no values that would have to be anywhere
        if isinstance(tensor, OnCuda):
            if tensor.device == device:
                return tensor if dtype in (None, tensor.dtype) else aten._to_copy.default(tensor, dtype=dtype)
            return OnCuda(tensor.inner.to(dtype or tensor.dtype, copy=True), device)
        if is_awaited or not hasattr(tensor, "is_pinned_here"):
            self.emulated.wait("copy")
        return OnCuda(tensor.detach().to(dtype or tensor.dtype, copy=True), device)

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
        check_same_device(name, [tensor, *(part for part in parts if isinstance(part, OnCuda))])
        if name == "__getitem__":
            return OnCuda(tensor.inner[chosen], tensor.device)
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
            check_same_device("attention", [query, attn_mask])
            kind, attn_mask = "written out", attn_mask.inner
        self.emulated.masks[kind] += 1
        self.emulated.by_cudnn += torch.backends.cuda.cudnn_sdp_enabled()
        check_same_device("attention", [query, key, value])
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # of the CPU, whatever a GPU may use
            attended = functional.scaled_dot_product_attention(
                *unwrapped((query, key, value)), attn_mask, dropout_p, is_causal, **options
            )
        return OnCuda(attended, query.device)


def _target(args, kwargs):
    """Device and dtype that a call of `Tensor.to` names."""
    device = dtype = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, (torch.device, str)) or (isinstance(value, int) and not isinstance(value, bool)):
            device = value
    return device, dtype


def to_cuda(module, device=CUDA):
    """The module, whose parameters and buffers are on a GPU from now on; they take no gradients."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnCuda(plain(parameter), device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnCuda(plain(buffer), device)
    return module


def plain(tensor):
    return tensor.inner if isinstance(tensor, OnCuda) else tensor.detach()
