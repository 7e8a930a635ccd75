"""Bi-WKV4: bidirectional WKV attention in linear time (Vision-RWKV, Duan et al., 2024), as one op."""

import ctypes

import torch
from torch import Tensor

from modules.biwkv4 import kernels as biwkv4_kernels
from modules.biwkv4.kernels import Call, Kernels


def biwkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For each position, the mean of v over the whole sequence, weighted by e^k and by distance.

    y_t = [Σ_{i≠t} e^{−(|t−i|−1)·w + k_i}·v_i + e^{u + k_t}·v_t] / [the same without v]

    w, u: (C,), the decay per position and the bonus of a position's own key, converted to float32 (float64 if k is).
    k, v: (B, T, C), of one dtype: float32, bfloat16, float16 or, on the CPU, float64. A view is copied only if its
    channels are not contiguous. Returns y (B, T, C), contiguous, of k's dtype. Only first derivatives are supported.
    Autocast does not cast the arguments: linear layers return k and v in its dtype already; w and u stay in float32.
    Raises TypeError or ValueError, with the argument's name, if a dtype, shape or device does not fit.
    """
    work = _work_dtype(k.dtype)
    if w.dtype != work or u.dtype != work:
        _check(w, u, k, v)
        w, u = w.to(work), u.to(work)
    y: Tensor = torch.ops.hpcm.biwkv4.default(w, u, k, v)
    return y


def biwkv4_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV4 in plain PyTorch, in O(T log T), for any float dtype and device and any magnitude of w, u and k.

    A set of positions is represented by the logarithm of its total weight and by its weighted mean of v. Neither
    overflows. w, u (C,); k, v (B, T, C); returns (B, T, C), of k's dtype. 16-bit types are computed in float32.
    """
    dtype = k.dtype
    w, u, k, v = (x.to(_work_dtype(dtype)) for x in (w, u, k, v))
    k = k - k.detach().amax(1, keepdim=True)  # leaves the mean as it is; added to a key of 1e30 the decay would be lost
    k = k.clamp(min=torch.finfo(k.dtype).min / 4)  # differences of −inf would be NaN
    before = _all_before(w, k, v)
    log, mean = _all_before(w, k.flip(1), v.flip(1))
    return _join(_join(before, (log.flip(1), mean.flip(1))), (u + k, v))[1].to(dtype)


LogMean = tuple[Tensor, Tensor]


def _join(a: LogMean, b: LogMean) -> LogMean:
    """Log-weight and mean, both (B, T, C), of the union of two sets of positions."""
    return torch.logaddexp(a[0], b[0]), torch.lerp(a[1], b[1], torch.sigmoid(b[0] - a[0]))


def _all_before(w: Tensor, k: Tensor, v: Tensor) -> LogMean:
    """Log-weight and mean, both (B, T, C), of the positions i < t, weighted by e^{−(t−1−i)·w + k_i}."""
    log, mean, span = k, v, 1
    while span < k.shape[1]:  # each position covers the `span` positions that end at it; a pass doubles that
        earlier = log[:, :-span] - span * w, mean[:, :-span]
        more = _join(earlier, (log[:, span:], mean[:, span:]))
        log, mean = (torch.cat([x[:, :span], y], 1) for x, y in zip((log, mean), more, strict=True))
        span *= 2
    nothing = torch.full_like(k[:, :1], torch.finfo(k.dtype).min / 2)
    return torch.cat([nothing, log[:, :-1]], 1), torch.cat([torch.zeros_like(v[:, :1]), mean[:, :-1]], 1)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dtype not in biwkv4_kernels.TYPES or (k.dtype == torch.float64 and k.is_cuda):
        raise TypeError(f"biwkv4: k must be float32, bfloat16, float16 or (CPU only) float64, not {k.dtype}")
    if k.dim() != 3:
        raise ValueError(f"biwkv4: k must be (B, T, C), not {tuple(k.shape)}")
    if v.dtype != k.dtype:
        raise TypeError(f"biwkv4: v must be of k's dtype, {k.dtype}, not {v.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"biwkv4: v must be of k's shape, {tuple(k.shape)}, not {tuple(v.shape)}")
    for name, x in (("w", w), ("u", u)):
        if not x.is_floating_point():
            raise TypeError(f"biwkv4: {name} must be floating point, not {x.dtype}")
        if x.shape != k.shape[2:]:
            raise ValueError(f"biwkv4: {name} must be (C,) = ({k.shape[2]},), not {tuple(x.shape)}")
    for name, x in (("w", w), ("u", u), ("v", v)):
        if x.device != k.device:
            raise ValueError(f"biwkv4: {name} must be on k's device, {k.device}, not {x.device}")


def _check_op(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the op's own arguments: compiled graphs call the op without `biwkv4`."""
    _check(w, u, k, v)
    for name, x in (("w", w), ("u", u)):
        if x.dtype != _work_dtype(k.dtype):
            raise TypeError(f"hpcm::biwkv4: {name} must be {_work_dtype(k.dtype)}, not {x.dtype}")


_library = torch.library.Library("hpcm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("biwkv4(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor", tags=_tags)
_library.define(
    "biwkv4_backward(Tensor grad_y, Tensor w, Tensor u, Tensor k, Tensor v)"
    " -> (Tensor grad_w, Tensor grad_u, Tensor grad_k, Tensor grad_v)",
    tags=_tags,
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _kernels(k: Tensor) -> Kernels | None:
    return biwkv4_kernels.cuda_kernels() if k.is_cuda else biwkv4_kernels.cpu_kernels()


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous, else a contiguous copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _call(kernels: Kernels, backward: bool, w: Tensor, u: Tensor, k: Tensor, v: Tensor, **results: int) -> None:
    """Run a kernel. `results` are the pointers and strides that `Call` has besides those of the inputs."""
    call = Call(
        *k.shape, biwkv4_kernels.TYPES[k.dtype],
        w.data_ptr(), u.data_ptr(), k.data_ptr(), v.data_ptr(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), **results,
    )  # fmt: skip
    function = kernels.backward if backward else kernels.forward
    if kernels.workspace is None:
        call.runner = kernels.runner
        status = function(ctypes.byref(call))
    else:
        with torch.cuda.device(k.device):
            size = kernels.workspace(ctypes.byref(call), int(backward))
            memory = torch.empty(size, dtype=torch.uint8, device=k.device)
            call.workspace, call.runner = memory.data_ptr(), torch.cuda.current_stream().cuda_stream
            status = function(ctypes.byref(call))
    if status == 1:
        raise MemoryError("biwkv4: not enough memory for the kernel's partial sums; use smaller batches or images")
    if status:
        raise RuntimeError(f"biwkv4: {kernels.explain(status)}")


def _forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check_op(w, u, k, v)
    if (kernels := _kernels(k)) is None:
        with torch.no_grad():
            return biwkv4_reference(w.double(), u.double(), k.double(), v.double()).to(k.dtype)
    w, u, k, v = w.contiguous(), u.contiguous(), _rows(k), _rows(v)
    y = k.new_empty(k.shape)
    if y.numel():
        _call(kernels, False, w, u, k, v, y=y.data_ptr())
    return y


def _backward(grad_y: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    _check_op(w, u, k, v)
    if (kernels := _kernels(k)) is None:
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.detach().clone().double().requires_grad_() for x in (w, u, k, v)]
            exact = torch.autograd.grad(biwkv4_reference(*inputs), inputs, grad_y.double())
        dw, du, dk, dv = (x.to(y.dtype) for x, y in zip(exact, (w, u, k, v), strict=True))
        return dw, du, dk, dv
    w, u, k, v, grad_y = w.contiguous(), u.contiguous(), _rows(k), _rows(v), _rows(grad_y)
    if not k.numel():
        return torch.zeros_like(w), torch.zeros_like(u), torch.zeros_like(k), torch.zeros_like(v)
    gradients = _empty_gradients(w, k)
    pointers = zip(("grad_w", "grad_u", "grad_k", "grad_v"), (x.data_ptr() for x in gradients), strict=True)
    strides = {"grad_y_batch": grad_y.stride(0), "grad_y_time": grad_y.stride(1)}
    _call(kernels, True, w, u, k, v, grad_y=grad_y.data_ptr(), **strides, **dict(pointers))
    return gradients


def _empty_gradients(w: Tensor, k: Tensor) -> Gradients:
    return w.new_empty(w.shape), w.new_empty(w.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _forward_fake(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check_op(w, u, k, v)
    return k.new_empty(k.shape)


def _backward_fake(grad_y: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Gradients:
    return _empty_gradients(w, k)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor) -> Gradients:
    gradients: Gradients = torch.ops.hpcm.biwkv4_backward.default(grad_y, *ctx.saved_tensors)
    return gradients


def _differentiate_twice(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("biwkv4 has first derivatives only; for second derivatives use biwkv4_reference")


for _device in ("CPU", "CUDA"):
    _library.impl("biwkv4", _forward, _device)
    _library.impl("biwkv4_backward", _backward, _device)
torch.library.register_fake("hpcm::biwkv4", _forward_fake, lib=_library)
torch.library.register_fake("hpcm::biwkv4_backward", _backward_fake, lib=_library)
torch.library.register_autograd("hpcm::biwkv4", _differentiate, setup_context=_save_inputs, lib=_library)
torch.library.register_autograd("hpcm::biwkv4_backward", _differentiate_twice, lib=_library)
