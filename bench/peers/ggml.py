"""ggml's matrix products, by its C interface, from the libraries that llama-cpp-python installs.

In the extra `llama`, not in `peers`: installing it compiles it. To run what a CPU with AVX2 alone would, compile it so:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install --no-binary :all: llama-cpp-python
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .peer import Layer, Peer

_MODULE = "llama_cpp"
_F32 = 0  # of ggml_type
# Type of the weight -> its code in ggml_type, inputs of a block.
_TYPES = {"q4_0": (2, 32), "q4_K": (12, 256), "q8_0": (8, 32)}
_ROOM = 1 << 18  # bytes for the descriptions of the tensors and the graph of a layer
_ALIGNMENT = 32
# Types of memory that pack a weight for faster kernels, those that llama.cpp prefers first: the types that they have
# kernels for on x86, and what N must be a multiple of. ggml offers those that the CPU and its build can use.
_PACKING = {b"AMX": (("q4_0", "q4_K", "q8_0"), 32), b"CPU_REPACK": (("q4_0", "q4_K"), 8)}


class _Room(ctypes.Structure):
    """ggml_init_params. no_alloc: the memory of tensors is allocated apart."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENT = _Log(lambda *_: None)  # else it writes a line for each weight

# Function -> result and arguments; what they point to is opaque.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_init": (c_void_p, _Room),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_log_set": (None, _Log, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}


@lru_cache
def _library() -> Any:
    """ggml's functions without their prefix. Raises OSError if its libraries are not where they were installed."""
    spec = find_spec(_MODULE)
    folder = Path(((spec and spec.submodule_search_locations) or [""])[0]) / "lib"
    loaded = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")]
    found = SimpleNamespace()
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(next(one for one in loaded if hasattr(one, name)), name)
        function.restype, function.argtypes = result, arguments
        setattr(found, name.removeprefix("ggml_"), function)
    found.log_set(_SILENT, None)
    return found


@lru_cache
def _backend() -> Any:
    return _library().backend_cpu_init()


def _memory(n: int, kind: str) -> Any:
    """The type of memory that llama.cpp takes for a weight of N rows: one that packs it if there is one, else plain."""
    ggml = _library()
    for memory in _extra_memory():
        kinds, multiple = _PACKING.get(ggml.backend_buft_name(memory), ((), 1))
        if kind in kinds and n % multiple == 0:
            return memory
    return ggml.backend_cpu_buffer_type()


def _extra_memory() -> Iterator[Any]:
    """The types of memory besides the plain one."""
    ggml = _library()
    registry = ggml.backend_cpu_reg()
    address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return iter(())
    found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(ggml.backend_reg_dev_get(registry, 0))
    return takewhile(bool, (found[i] for i in range(16)))


class _Product:
    """One copy of a weight in ggml's memory; called with float32 activations (M, K), gives (M, N)."""

    def __init__(self, codes: Any, code: int, shape: tuple[int, int], memory: Any) -> None:
        ggml = _library()
        (n, k), room = shape, ggml.init(_Room(_ROOM, None, True))
        self._n, self._graphs = n, dict[tuple[int, int], tuple[Any, Tensor]]()
        self._weight = ggml.new_tensor_2d(room, code, k, n)
        held = ggml.backend_alloc_ctx_tensors_from_buft(room, memory)
        ggml.backend_tensor_set(self._weight, codes, 0, len(codes))
        weakref.finalize(self, _free, [held], [room])

    def __call__(self, x: Tensor) -> Tensor:
        ggml = _library()
        key = (x.data_ptr(), x.shape[0])
        if key not in self._graphs:
            self._graphs[key] = self._graph(x)
        graph, y = self._graphs[key]
        ggml.backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        if ggml.backend_graph_compute(_backend(), graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")
        return y

    def _graph(self, x: Tensor) -> tuple[Any, Tensor]:
        """The product of the activations where they lie, and its output."""
        ggml = _library()
        y = torch.empty(x.shape[0], self._n)
        if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT or y.data_ptr() % _ALIGNMENT:
            raise ValueError(f"x, y: must be contiguous, at a multiple of {_ALIGNMENT} bytes")
        room = ggml.init(_Room(_ROOM, None, True))
        rows = ggml.new_tensor_2d(room, _F32, x.shape[1], x.shape[0])
        product = ggml.mul_mat(room, self._weight, rows)
        held = [ggml.backend_cpu_buffer_from_ptr(one.data_ptr(), one.nbytes) for one in (x, y)]
        for buffer, tensor, place in zip(held, (rows, product), (x, y), strict=True):
            ggml.backend_tensor_alloc(buffer, tensor, place.data_ptr())
        graph = ggml.new_graph(room)
        ggml.build_forward_expand(graph, product)
        weakref.finalize(self, _free, held, [room])
        return graph, y


def _free(buffers: list[Any], rooms: list[Any]) -> None:
    for buffer in buffers:
        _library().backend_buffer_free(buffer)
    for room in rooms:
        _library().free(room)


def _make(weight: Tensor, dtype: torch.dtype, copies: int, kind: str) -> list[Layer]:
    ggml, (code, block) = _library(), _TYPES[kind]
    n, k = weight.shape
    if k % block:
        raise ValueError(f"K={k}: must be a multiple of the block size {block}")
    codes = ctypes.create_string_buffer(n * ggml.row_size(code, k))
    weight = weight.contiguous()
    ggml.quantize_chunk(code, weight.data_ptr(), codes, 0, n, k, None)
    memory = _memory(n, kind)
    return [_Product(codes, code, (n, k), memory) for _ in range(copies)]


def _peer(kind: str) -> Peer:
    make = partial(_make, kind=kind)
    bits = 8 if "8" in kind else 4
    return Peer(f"ggml {kind}", bits, "int8", (torch.float32,), make, needs=(_MODULE,), install="'nybble[llama]'")


PEERS = tuple(map(_peer, _TYPES))
