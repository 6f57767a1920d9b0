"""ggml's tensor in memory, as far as an evaluation callback must look into it.

The structure is ``struct ggml_tensor`` of ``ggml/include/ggml.h``. ggml exports functions for a tensor's name and
operation but none for its operands, so their place in the structure is taken from the header, and
``check_layout`` proves it against a product that the installed library itself builds.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from export.ggml import library
from pipeline.errors import MedcotError

PRODUCT = "MUL_MAT"  # ggml_op_desc of a product of a weight [columns, rows] with activations [columns, tokens]
F32 = 0  # enum ggml_type
_DIMENSIONS = 4  # GGML_MAX_DIMS


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor`` up to ``data``; sizes and strides (bytes) begin with the innermost dimension."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("sizes", ctypes.c_int64 * _DIMENSIONS),
    ("strides", ctypes.c_size_t * _DIMENSIONS),
    ("operation", ctypes.c_int),
    ("operation_parameters", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("operands", ctypes.POINTER(GgmlTensor) * 10),
    ("view_source", ctypes.c_void_p),
    ("view_offset", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
]


def at(address: int) -> GgmlTensor:
    """The tensor that an evaluation callback was given."""
    return GgmlTensor.from_address(address)


def is_product(address: int) -> bool:
    return bool(_functions().ggml_op_desc(address) == PRODUCT.encode())


def weight_name(product: GgmlTensor) -> str:
    """The name of a product's weight; a copy on a GPU is called ``CUDA0#blk.0.attn_k.weight#0``."""
    name: str = _functions().ggml_get_name(product.operands[0]).decode(errors="replace")
    return name.split("#")[1] if "#" in name else name


def matrix(tensor: GgmlTensor) -> npt.NDArray[np.float32]:
    """The values of a float32 tensor as [rows, columns], outer dimensions flattened.

    A view that is valid during the callback where the tensor lies in the computer's memory, else a copy.
    """
    if tensor.type != F32 or tensor.strides[0] != 4:
        raise ValueError(f"a tensor of ggml type {tensor.type} with {tensor.strides[0]} bytes a value")
    sizes = tuple(tensor.sizes)
    if _functions().ggml_backend_buffer_is_host(tensor.buffer):
        size = 4 + sum((count - 1) * stride for count, stride in zip(sizes, tensor.strides, strict=True))
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(tensor.data))
    else:
        size = _functions().ggml_nbytes(ctypes.addressof(tensor))
        raw = np.empty(size, dtype=np.uint8)
        _functions().ggml_backend_tensor_get(ctypes.addressof(tensor), raw.ctypes.data, 0, size)
    values: npt.NDArray[np.float32] = np.ndarray(
        sizes[::-1], np.float32, buffer=raw.data, strides=tuple(tensor.strides)[::-1]
    )
    return values.reshape(-1, sizes[0])


@cache
def check_layout() -> None:
    """Raise MedcotError unless the installed ggml's tensors read back as they were made."""
    if not _reads_back():
        raise MedcotError(
            "The installed llama-cpp-python lays its tensors out in another way than 0.3.36, so no importance matrix "
            "can be measured with it: install the pinned version, or pass --imatrix FILE or --imatrix none."
        )


def _reads_back() -> bool:
    functions = _functions()
    context = functions.ggml_init(_InitParameters(1 << 16, None, False))
    try:
        weight = functions.ggml_new_tensor_2d(context, F32, 5, 3)
        activations = functions.ggml_new_tensor_2d(context, F32, 5, 2)
        functions.ggml_set_name(weight, b"blk.7.weight")
        written = np.arange(10, dtype=np.float32)
        ctypes.memmove(functions.ggml_get_data(activations), written.ctypes.data, written.nbytes)
        address = functions.ggml_mul_mat(context, weight, activations)
        if not is_product(address):
            return False
        product = at(address)
        # Compared before anything is followed: a wrong place would hold no valid address.
        held = ctypes.cast(product.operands, ctypes.POINTER(ctypes.c_void_p))
        if (held[0], held[1], held[2]) != (weight, activations, None) or tuple(product.sizes) != (3, 2, 1, 1):
            return False
        read = at(activations)
        if (read.data, read.buffer) != (functions.ggml_get_data(activations), None):
            return False
        expected = (F32, (5, 2, 1, 1), (4, 20, 40, 40))
        if (read.type, tuple(read.sizes), tuple(read.strides)) != expected or weight_name(product) != "blk.7.weight":
            return False
        values = np.ctypeslib.as_array((ctypes.c_float * 10).from_address(read.data))
        return bool(np.array_equal(values, written))
    finally:
        functions.ggml_free(context)


class _InitParameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("memory_size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _functions() -> ctypes.CDLL:
    functions = library()
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParameters]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, number, number]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_backend_buffer_is_host", ctypes.c_bool, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions
