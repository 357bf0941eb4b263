"""Compiles every kernel and configuration ahead of time: ``python -m psfast.kernels.compile``.

Needs Triton and its ptxas, no GPU. Prints registers, spills and shared memory of each, and
exits with 1 if a configuration spills where it counts (trial points in the default mode), needs
more shared memory than the chip has, or makes ptxas serialise wgmma (C7512). "repeat": how often
the most repeated product of rows and weights is computed; 2 where the warps are so many that two
groups of them take the same rows.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from psfast.kernels import blocks, configs, losses, order, points, tail, weights
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from psfast import search

# The cuts for sm_80 are taken by consumer chips as well, which have less: sm_86, sm_89, sm_120.
SHARED_MEMORY = {80: 101_376, 90: 232_448}
DEFAULT_MODE = configs.MODES[0]
_KERNELS = {
    "blocks": blocks.run_blocks,
    "tail": tail.run_tail,
    "describe": points.describe,
    "draw": order.draw_kernel,
    "pack": weights.pack,
    "reduce_losses": losses.reduce_losses,
    "take_first": losses.take_first,
}
_TYPES = {
    "index_ptr": "*i64",
    "delta_ptr": "*fp32",
    "points_ptr": "*i32",
    "hi_ptr": "*fp16",
    "lo_ptr": "*fp16",
    "keys_ptr": "*i64",
    "span_ptr": "*i64",
    "table_ptr": "*i64",
    "rows_ptr": "*i32",
    "first_ptr": "*i32",
    "packed_ptr": "*i32",
    "reached_ptr": "*i8",
    "keep_ptr": "*i8",
    "map_ptr": "*i32",
    "incumbent_ptr": "*fp64",
    "loss_ptr": "*fp64",
    "losses_ptr": "*fp64",
    "places_ptr": "*i64",
    "incumbents_ptr": "*fp64",
    "state_ptr": "*i64",
    "margin_ptr": "*fp64",
    "place_ptr": "*i32",
    "summed_ptr": "*fp64",
    "eps": "fp32",
    "scale": "fp32",
    "inv_keep": "fp32",
}
_UNALIGNED = ("index_ptr", "change_ptr", "out_ptr")
_DIVISIBLE = ("R",)


class Case(NamedTuple):
    """One kernel to compile.

    options: of the launch
    spills: bytes that a thread may spill, None: any number
    may_serialise: whether ptxas may serialise wgmma
    """

    name: str
    function: str
    constants: dict
    options: dict
    arch: int
    spills: int | None = 0
    may_serialise: bool = False


class Result(NamedTuple):
    registers: int
    spill: int
    shared: int
    serialised: bool
    repeat: float = 1.0

    def faults(self, case: Case) -> list[str]:
        found = []
        if case.spills is not None and self.spill > case.spills:
            found = [f"spills {self.spill} B, more than {case.spills}"]
        if self.shared > SHARED_MEMORY[case.arch]:
            found.append(f"needs more than {SHARED_MEMORY[case.arch]} B of shared memory")
        is_slow = self.serialised and not case.may_serialise
        return found + (["wgmma serialised (C7512)"] if is_slow else [])


def transformer_sizes(width: int, positions: int) -> configs.Sizes:
    """The sizes that a configuration is compiled for: small, medium and large."""
    heads, layers = {64: (4, 2), 128: (8, 4), 256: (8, 6)}[width]
    return configs.Sizes(width, heads, 4 * width, 102, layers, positions, dropout=True)


def choose_config(sizes: configs.Sizes, capability: int, mode: str) -> configs.Config | None:
    """The configuration for these sizes on the smallest chip of a capability."""
    return configs.choose_config(sizes, capability, SHARED_MEMORY[capability * 10], mode)


def blocks_case(
    capability: int, width: int, positions: int, mode: str, *, cache: bool, repair: bool
) -> Case:
    sizes = transformer_sizes(width, positions)
    config = choose_config(sizes, capability, mode)
    constants = configs.blocks_constants(sizes, config, mode, cache=cache, repair=repair)
    what = f"blocks {_kind(cache, repair)}{mode} d_model {width} T <= {positions}"
    return _case(what, "blocks", config.blocks, constants, capability)


def wide_heads_cases() -> Iterator[Case]:
    """``blocks`` in the default mode for heads of 64 and 128, on the chips that can hold them. The
    cuts were chosen for narrower ones, and nobody has timed these: they spill, and with Triton 3.6
    ptxas serialises wgmma in two."""
    for head, (capability, width, positions) in itertools.product((64, 128), configs.BLOCKS):
        sizes = transformer_sizes(width, positions)._replace(n_heads=width // head)
        if width < head or not (config := choose_config(sizes, capability, DEFAULT_MODE)):
            continue
        kind = {"cache": False, "repair": False}
        constants = configs.blocks_constants(sizes, config, DEFAULT_MODE, **kind)
        what = f"blocks {DEFAULT_MODE} d_model {width} T <= {positions} heads of {head}"
        case = _case(what, "blocks", config.blocks, constants, capability)
        yield case._replace(spills=None, may_serialise=True)


def tail_case(
    capability: int, width: int, vocabulary: int, mode: str, *, cache: bool, repair: bool
) -> Case:
    sizes = transformer_sizes(width, 16)._replace(vocab_size=vocabulary)
    config = choose_config(sizes, capability, mode)
    each = config.tail.rows // 2
    constants = configs.tail_constants(sizes, config, mode, each, cache=cache, repair=repair)
    what = f"tail {_kind(cache, repair)}{mode} d_model {width} V = {vocabulary}"
    return _case(what, "tail", config.tail, constants, capability)


def _kind(cache: bool, repair: bool) -> str:
    return ("cache " if cache else "") + ("repair " if repair else "")


def _case(name: str, function: str, cut: configs.Cut, constants: dict, capability: int) -> Case:
    mode = constants["MODE"]
    # The cache is filled once an accept, by few programs: a spill there costs nothing.
    spills = cut.spills if mode == DEFAULT_MODE and not constants["CACHE"] else None
    return Case(name, function, constants, configs.options(cut, mode), capability * 10, spills)


def cases() -> Iterator[Case]:
    """All kernels that the default mode launches, and those of the CUDA cores.

    "tf32x3" itself is the repair without its test for what to repair.
    """
    usual = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    for arch in SHARED_MEMORY:
        yield Case("reduce", "reduce_losses", {"BLOCK": 128}, usual, arch)
        scale = {"SCALE": configs.WEIGHT_SCALE, "BLOCK": 1024}
        yield Case("pack", "pack", scale, usual, arch)
        rounds = {"ROUNDS": len(search.permutation(0, 0, 1)[0]), "BLOCK": order.BLOCK}
        yield Case("draw", "draw", rounds, usual, arch)
        sizes = transformer_sizes(64, 16)
        config = choose_config(sizes, arch // 10, DEFAULT_MODE)
        constants = configs.describe_constants(sizes, config)
        yield Case("describe", "describe", constants, usual, arch)
        for block in (32, 102):
            constants = configs.take_first_constants(sizes, config, block)
            warps = configs.take_first_options(constants)
            yield Case(f"take first of {block}", "take_first", constants, usual | warps, arch)
    tails = [(*key, V) for key in configs.TAILS for V in (102, 300)]  # at once, and in parts
    for case, keys in ((blocks_case, configs.BLOCKS), (tail_case, tails)):
        for key in keys:
            for cache in (False, True):
                yield case(*key, DEFAULT_MODE, cache=cache, repair=False)
                yield case(*key, configs.FALLBACK, cache=cache, repair=True)
            yield case(*key, "fp32", cache=False, repair=False)
    yield from wide_heads_cases()


def compile_case(case: Case) -> Result:
    """Compile as a launch would, then ask ptxas what came out."""
    function = _KERNELS[case.function]
    names = function.arg_names
    signature = {name: "constexpr" if name in case.constants else _type(name) for name in names}
    if case.constants.get("CACHE"):
        signature["out_ptr"] = "*fp64"
    if case.constants.get("MODE") == "fp16x3":
        signature["staged_ptr"] = "*fp16"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (name.endswith("_ptr") and name not in _UNALIGNED) or name in _DIVISIBLE
    }
    source = ASTSource(fn=function, signature=signature, constexprs=case.constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.arch, 32),
        options=case.options,
    )
    found = read_ptxas(compiled.asm["ptx"], case.arch, compiled.metadata.shared)
    return found._replace(repeat=most_repeated(compiled.asm["ttgir"]))


def read_ptxas(ptx: str, arch: int, shared: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", target, path, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.search(r"Used (\d+) registers", said)
    return Result(int(registers[1]), sum(map(int, spilled)), shared, "C7512" in said)


_LAYOUT = re.compile(
    r"(#mma\d*) = #ttg\.nvidia_mma<.*?warpsPerCTA = \[([\d, ]+)\].*?instrShape = \[([\d, ]+)\]"
)
_PRODUCT = re.compile(r"(?:warp_group_dot|tt\.dot) .*-> tensor<(\d+)x(\d+)xf32, (#mma\d*)>")


def most_repeated(ttgir: str) -> float:
    """How often the most repeated product of two matrices is computed: 1 where the warps' parts
    cover the tile once. (Attention's products, in three dimensions, are small.)"""
    parts = {}
    for name, warps, instruction in _LAYOUT.findall(ttgir):
        both = zip(warps.split(","), instruction.split(","), strict=False)
        parts[name] = [int(count) * int(size) for count, size in both]
    return max(
        (
            max(1.0, parts[name][0] / int(rows)) * max(1.0, parts[name][1] / int(columns))
            for rows, columns, name in _PRODUCT.findall(ttgir)
        ),
        default=1.0,
    )


def report(chosen: Iterable[Case]) -> list[str]:
    """Compile, print a line each; returns the faults."""
    print(f"triton {triton.__version__}; spill: bytes of spill stores and loads")
    heads = f"{'warps':>5} {'regs':>5} {'spill':>6} {'shared':>8} {'repeat':>6}"
    print(f"{'chip':5} {'kernel':46} {heads}")
    faults, chosen = [], list(chosen)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for case, result in zip(chosen, pool.map(compile_case, chosen), strict=True):
            found = result.faults(case)
            faults += [f"sm_{case.arch} {case.name}: {fault}" for fault in found]
            print(
                f"sm_{case.arch} {case.name:46} {case.options['num_warps']:5} {result.registers:5} "
                f"{result.spill:6} {result.shared:8} {result.repeat:6g} "
                f"{'; '.join(found)}".rstrip(),
                flush=True,
            )
    return faults


def _type(name: str) -> str:
    return _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")


if __name__ == "__main__":
    faults = report(cases())
    print("\n".join(faults) or "no faults")
    sys.exit(bool(faults))
