"""Does decode attention cost less beside GEMMs than after them? One layer of Llama-3.1-8B, on a CUDA GPU.

    python benchmarks/overlap.py

Times a layer one part after the other, on two plain streams, and with the multiprocessors parted by green contexts
(cuBLAS is told how many it has): 4,096 prompt tokens with 1,000 decoding rows, and two half batches of decoding rows.
Prints ms a layer, and the power and clock that nvidia-smi shows meanwhile. The outcome on an H200 is in NOTES.md.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rayinfer.kernels.paged_decode import paged_decode

PROMPT_TOKENS, ROWS, CONTEXT, BLOCK = 4096, 1000, 576, 16
SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
NUM_LAYERS = 6  # of weights, so that no layer finds its own in the L2 cache
SM_RESOURCE = 1  # CU_DEV_RESOURCE_TYPE_SM
Layer = Callable[[int], None]


class _Resource(ctypes.Structure):
    """CUdevResource; the count of multiprocessors comes first in its union."""

    _fields_ = (
        ("type", ctypes.c_int), ("pad", ctypes.c_ubyte * 92), ("sm", ctypes.c_uint * 12), ("more", ctypes.c_ubyte * 64)
    )  # fmt: skip


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA error {code}")


def part(num: int) -> list[tuple[torch.cuda.Stream, int]]:
    """Two streams with multiprocessors of their own, about `num` and the rest; with how many each has."""
    cuda, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    whole, first, rest, groups = _Resource(), _Resource(), _Resource(), ctypes.c_uint(1)
    ref = ctypes.byref
    _check(cuda.cuDeviceGet(ref(device), 0), "cuDeviceGet")
    _check(cuda.cuDeviceGetDevResource(device, ref(whole), SM_RESOURCE), "cuDeviceGetDevResource")
    split = cuda.cuDevSmResourceSplitByCount(ref(first), ref(groups), ref(whole), ref(rest), 0, num)
    _check(split, "cuDevSmResourceSplitByCount")
    streams = []
    for resource in (first, rest):
        desc, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(cuda.cuDevResourceGenerateDesc(ref(desc), ref(resource), 1), "cuDevResourceGenerateDesc")
        _check(cuda.cuGreenCtxCreate(ref(context), desc, device, 1), "cuGreenCtxCreate")
        _check(cuda.cuGreenCtxStreamCreate(ref(stream), context, 1, 0), "cuGreenCtxStreamCreate")
        streams.append((torch.cuda.ExternalStream(stream.value), int(resource.sm[0])))
    return streams


def tell_cublas(num: int) -> None:
    """How many multiprocessors cuBLAS may count on in the current stream."""
    with open("/proc/self/maps") as maps:
        library = ctypes.CDLL(next(line.split()[-1] for line in maps if "libcublas.so" in line))
    library.cublasSetSmCountTarget.argtypes = [ctypes.c_void_p, ctypes.c_int]
    _check(library.cublasSetSmCountTarget(torch.cuda.current_blas_handle(), num), "cublasSetSmCountTarget")


class Bench:
    def __init__(self) -> None:
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.weights = [{k: torch.randn(s, **make) * 0.02 for k, s in SHAPES.items()} for _ in range(NUM_LAYERS)]
        sizes = (PROMPT_TOKENS, ROWS, PROMPT_TOKENS + ROWS, ROWS // 2)
        self.inputs = {(m, i): torch.randn(m, i, **make) for m in sizes for i in (4096, 14336)}
        self.outputs = {(m, o): torch.empty(m, o, **make) for m in sizes for o in (4096, 6144, 28672)}
        num_blocks = ROWS * CONTEXT // BLOCK
        self.k, self.v = (torch.randn(num_blocks, 8, BLOCK, 128, **make).transpose(1, 2) for _ in range(2))
        self.table = torch.randperm(num_blocks, device="cuda").int().view(ROWS, -1)
        self.lens = torch.full((ROWS,), CONTEXT, device="cuda", dtype=torch.int32)
        self.q = torch.randn(ROWS, 32, 128, **make)
        self.power: list[tuple[float, str]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits", "-lms", "50"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            self.power.append((time.time(), line))

    def gemms(self, layer: int, num_tokens: int) -> None:
        for name, (num_out, num_in) in SHAPES.items():
            weight = self.weights[layer % NUM_LAYERS][name]
            torch.mm(self.inputs[num_tokens, num_in], weight.t(), out=self.outputs[num_tokens, num_out])

    def attend(self, rows: slice = slice(None), num_programs: int | None = None) -> None:
        paged_decode(
            self.q[rows], self.k, self.v, self.table[rows], self.lens[rows], scale=0.088, num_programs=num_programs
        )

    def time(self, name: str, layer: Layer, seconds: float = 0.9) -> None:
        for i in range(8):
            layer(i)
        torch.cuda.synchronize()
        start, num = time.time(), 0
        while time.time() - start < seconds:
            for i in range(32):
                layer(i)
            torch.cuda.synchronize()
            num += 32
        each = (time.time() - start) / num
        seen = [tuple(map(float, line.split(","))) for at, line in self.power if at > start + 0.3 and "," in line]
        watt, mhz = (sum(values) / len(seen) for values in zip(*seen, strict=True)) if seen else (0.0, 0.0)
        print(f"{name:48}{each * 1e3:8.3f} ms{watt:6.0f} W{mhz:6.0f} MHz", flush=True)

    def beside(self, attention: torch.cuda.Stream, products: torch.cuda.Stream, programs: int | None) -> Layer:
        """The rows' attention beside the prompts' products of the layer."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()

        def layer(i: int) -> None:
            with torch.cuda.stream(products):
                self.gemms(i, ROWS)
                ready.record(products)
            with torch.cuda.stream(attention):
                attention.wait_event(ready)
                self.attend(num_programs=programs)
                done.record(attention)
            with torch.cuda.stream(products):
                self.gemms(i, PROMPT_TOKENS)
                products.wait_event(done)

        return layer

    def halves(self, attention: torch.cuda.Stream, products: torch.cuda.Stream, programs: int | None) -> Layer:
        """The attention of one half of the rows beside the products of the other."""
        attended, multiplied = torch.cuda.Event(), torch.cuda.Event()

        def layer(i: int) -> None:
            for half in (slice(ROWS // 2), slice(ROWS // 2, ROWS)):
                with torch.cuda.stream(attention):
                    self.attend(half, programs)
                    attended.record(attention)
                with torch.cuda.stream(products):
                    self.gemms(i, ROWS // 2)
                    multiplied.record(products)
                products.wait_event(attended)
                attention.wait_event(multiplied)

        return layer


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks/overlap.py: needs a CUDA GPU")
        return 2
    bench, whole = Bench(), PROMPT_TOKENS + ROWS
    print(torch.cuda.get_device_name(), torch.__version__)
    bench.time("products of prompts and rows", lambda i: bench.gemms(i, whole))
    bench.time("attention of the rows", lambda i: bench.attend())
    bench.time("prompts and rows, in turn", lambda i: (bench.gemms(i, whole), bench.attend())[0])
    bench.time("rows alone, in turn", lambda i: (bench.gemms(i, ROWS), bench.attend())[0])
    plain = torch.cuda.Stream(), torch.cuda.Stream()
    bench.time("prompts and rows, two streams", bench.beside(*plain, None))
    bench.time("two halves of the rows, two streams", bench.halves(*plain, None))
    for num in (8, 16, 24, 32, 48, 64):
        (attention, few), (products, many) = part(num)
        with torch.cuda.stream(products):
            tell_cublas(many)
        bench.time(f"prompts and rows, {few} + {many} SMs", bench.beside(attention, products, 6 * few))
        bench.time(f"two halves of the rows, {few} + {many} SMs", bench.halves(attention, products, 6 * few))
    return 0


if __name__ == "__main__":
    sys.exit(main())
