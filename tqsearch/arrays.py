"""What users give: arrays, numpy or torch, to checked tensors, and results back to that kind; ids; devices."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tqsearch.errors import BackendError, InvalidInputError

ArrayLike = Tensor | npt.NDArray[np.generic]
IdsLike = ArrayLike | Sequence[int]


def as_matrix(
    values: ArrayLike, dim: int, name: str, device: torch.device | None = None, *, one: bool = False
) -> Tensor:
    """Rows of numbers as a float32 tensor.

    Args:
        values: (n, dim) numpy or torch, real floating point or integer; (dim,) too if `one`.
        dim: the width wanted.
        name: what the caller calls the argument, for the message.
        device: where the tensor goes; None for where the values are.
        one: whether a single row may come as a 1-d array.

    Returns:
        (n, dim) float32; shares memory with `values` where it can.

    Raises:
        InvalidInputError: wrong type, shape or dtype, or a value that is not finite in float32 (the first row is
            named).
    """
    tensor = as_rows(values, dim, name, one=one)
    tensor = tensor.to(device=device or tensor.device, dtype=torch.float32)
    check_finite(tensor, name)
    return tensor


def as_rows(values: ArrayLike, dim: int, name: str, *, one: bool = False) -> Tensor:
    """What `as_matrix` does, but for the device, the dtype and the finiteness of the numbers: nothing is copied."""
    tensor = _as_tensor(values, name)
    if one and tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or tensor.shape[1] != dim:
        wanted = f"(n, {dim}) or ({dim},)" if one else f"(n, {dim})"
        raise InvalidInputError(f"{name} must have shape {wanted}, got {tuple(values.shape)}")
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InvalidInputError(f"{name} must be real numbers, got dtype {tensor.dtype}; convert them to float32")
    return tensor


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuses (n, dim) float32 that holds a NaN or an infinity; the message names the first such row."""
    # One reduction finds a bad value: nan and inf survive a sum in float64, in which float32 cannot overflow.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        bad = ~torch.isfinite(tensor).all(dim=1)
        row = int(bad.nonzero()[0])
        raise InvalidInputError(
            f"{name} must be finite in float32, got a NaN, an infinity or an overflow in row {row}; "
            f"{int(bad.sum())} such rows of {len(tensor)}"
        )


def as_numpy(values: IdsLike, name: str) -> npt.NDArray[np.generic]:
    """Ids, or a mask of them, as a numpy array of whatever shape and dtype they have."""
    _check_unmasked(values, name)
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise InvalidInputError(f"{name} must be a 1-d array of integers, got rows of several lengths") from error


def as_ids(values: IdsLike, name: str) -> npt.NDArray[np.int64]:
    """Ids as a 1-d int64 numpy array; integers only, in the range of int64."""
    array = as_numpy(values, name)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype == object and all(type(value) is int or isinstance(value, np.integer) for value in array.flat):
        try:
            array = array.astype(np.int64)
        except OverflowError as error:
            raise InvalidInputError(f"{name} must fit in int64, got {max(array.flat, key=abs)}") from error
    if array.ndim != 1:
        raise InvalidInputError(f"{name} must be a 1-d array of integers, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise InvalidInputError(f"{name} must be integers, got dtype {array.dtype}; convert them to int64")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidInputError(f"{name} must fit in int64, got {array.max()}")
    return array.astype(np.int64)


def _as_tensor(values: ArrayLike, name: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_quantized or values.device.type == "meta":
            kind = "a meta tensor" if values.device.type == "meta" else values.layout
            raise InvalidInputError(f"{name} must be a dense tensor with values, got {kind}; convert it to float32")
        return values.detach()
    _check_unmasked(values, name)
    if not isinstance(values, np.ndarray):
        raise InvalidInputError(
            f"{name} must be a numpy array or a torch tensor, got {type(values).__name__}; wrap it in numpy.asarray"
        )
    if values.dtype.kind not in "fiu":
        raise InvalidInputError(f"{name} must be real numbers, got dtype {values.dtype}; convert them to float32")
    array: npt.NDArray[np.generic] = values
    unknown = array.dtype.kind == "u" and array.dtype.itemsize > 1
    if unknown or not array.dtype.isnative or array.dtype.itemsize > 8:
        array = array.astype(np.float32)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array if array.flags.writeable else _unmarked(array))


def _unmarked(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The same memory without the mark that it is read-only, of which torch warns: nothing here writes to it, and a
    copy of a file that is mapped would be the whole file.
    """
    held = SimpleNamespace(__array_interface__={**values.__array_interface__, "data": (values.ctypes.data, False)})
    held.values = values  # lives as long as what is made of it
    return np.asarray(held)


def _check_unmasked(values: object, name: str) -> None:
    """Refuses numpy's masked arrays: what they hide would count."""
    if isinstance(values, np.ma.MaskedArray):
        raise InvalidInputError(f"{name} must be a plain array, got a masked one; call its .filled() or .compressed()")


def as_device(device: str | torch.device | None) -> torch.device:
    """A device of this machine; None for the CPU.

    Raises:
        InvalidInputError: no device of torch.
        BackendError: a GPU that torch does not see here.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"device must be one of torch's, such as 'cpu' or 'cuda', got {device!r}") from error
    there = torch.cuda.device_count() if place.type == "cuda" else 1
    if place.type == "cuda" and (place.index or 0) >= there:
        raise BackendError(
            f"device must be there, got {str(place)!r} where torch sees {there} GPUs; use 'cpu', or a torch with CUDA "
            "on a machine with a GPU"
        )
    return place


def like(result: Tensor, given: ArrayLike) -> ArrayLike:
    """A result as the caller's kind: numpy for numpy, else torch on the same device."""
    if isinstance(given, Tensor):
        return result.to(given.device)
    return result.cpu().numpy()
