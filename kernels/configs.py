"""How the transformer kernels are cut for a model and a chip: their compile-time arguments."""

import functools
from typing import NamedTuple

MODES = ("fp16x3", "tf32x3", "fp32")
FALLBACK = "tf32x3"  # fp16's range ends at 65,504; tf32 has that of fp32
WEIGHT_SCALE = 64.0  # keeps the low halves of small weights out of fp16's subnormal numbers
_REPAIR_POINTS = 32
_REPAIR_TILES = 8


class Cut(NamedTuple):
    """How a kernel is cut: rows and warps of a program, and what its inner loops take at a time.

    registers: the most that a thread may take, so that more programs share a multiprocessor; 0:
        as many as it would like to have
    spills: bytes that a thread spills and that a measurement has shown to be worth it
    """

    rows: int
    warps: int
    hidden: int
    queries: int = 16  # columns of whole heads, one head at least
    vocabulary: int = 16
    staged: int = 0  # normalised columns at a time, where they do not stay on chip
    stages: int = 2
    registers: int = 0
    spills: int = 0


class Config(NamedTuple):
    """How the two kernels are cut for one model."""

    blocks: Cut
    tail: Cut


class Sizes(NamedTuple):
    """A transformer's sizes; ``positions`` is the padded length of its sequences."""

    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    n_layers: int
    positions: int
    dropout: bool

    @property
    def padded_model(self) -> int:
        return power_of_two(self.d_model)

    @property
    def padded_head(self) -> int:
        return power_of_two(self.d_model // self.n_heads)

    @property
    def table_bits(self) -> int:
        return (12 * self.n_layers + 6).bit_length()


def padded_positions(T: int) -> int:
    """The positions that a sequence of T takes in a tile."""
    return power_of_two(T)


# (compute capability, padded d_model, positions) -> how ``blocks`` is cut, and without the
# positions ``tail``. Each fits into shared memory. Those of Hopper at (64, 16), (128, 32) and
# (256, 32) are the fastest of those that `bench/gpu_tiles.py` has timed on an H100
# (bench/results/gpu_tiles.json), though some of them spill; (128, 16) and (256, 16) are cut alike.
# The others were never timed: they are free of spills with the Triton that we pin.
# `python -m psfast.kernels.compile` checks all of them. Four warps a tile of 64 rows: eight would
# compute some products twice (which only the one for 64 positions bears; with four it spills).
BLOCKS = {
    (9, 64, 16): Cut(64, 4, hidden=32, queries=32, registers=168, spills=1900),
    (9, 64, 32): Cut(64, 4, hidden=64, queries=32),
    (9, 64, 64): Cut(64, 8, hidden=32, queries=32, staged=16),
    (9, 128, 16): Cut(64, 4, hidden=32, queries=32, spills=5100),
    (9, 128, 32): Cut(64, 4, hidden=32, queries=32, spills=5100),
    (9, 256, 16): Cut(32, 4, hidden=64, queries=64, staged=64, stages=3, spills=2700),
    (9, 256, 32): Cut(32, 4, hidden=64, queries=64, staged=64, stages=3, spills=2700),
    (8, 64, 16): Cut(64, 4, hidden=16, staged=32),
    (8, 64, 32): Cut(32, 4, hidden=32, queries=64),
    (8, 128, 16): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 128, 32): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 256, 16): Cut(32, 8, hidden=64, queries=64, staged=64),
    (8, 256, 32): Cut(32, 8, hidden=64, queries=64, staged=64),
}
TAILS = {
    (9, 64): Cut(64, 4, hidden=32, vocabulary=64, stages=3, registers=168, spills=16),
    (9, 128): Cut(128, 8, hidden=32, vocabulary=128, spills=280),
    (9, 256): Cut(32, 4, hidden=64, vocabulary=128, staged=64, spills=350),
    (8, 64): Cut(32, 4, hidden=64, vocabulary=128),
    (8, 128): Cut(32, 8, hidden=64, vocabulary=64, staged=64),
    (8, 256): Cut(32, 8, hidden=64, vocabulary=64, staged=64),
}


def choose_config(sizes: Sizes, capability: int, shared_memory: int, mode: str) -> Config | None:
    """The configuration for these sizes; None if there is none.

    shared_memory: of the chip, the most that a program may have, in bytes
    """
    # wgmma is Hopper's alone; what came after it has mma, as Ampere has.
    chip, width = 9 if capability == 9 else min(capability, 8), max(64, sizes.padded_model)
    chosen = BLOCKS.get((chip, width, sizes.positions))
    # One head's weights of `out` lie there at once.
    if chosen is None or 4 * sizes.padded_head * sizes.padded_model > shared_memory:
        return None
    if sizes.padded_head > chosen.queries and sizes.n_heads > 1 and not chosen.staged:
        chosen = chosen._replace(stages=1)  # the next head's weights do not fit beside this one's
    if mode == "fp32":
        # The CUDA cores take their operands from registers: the smallest tiles there are.
        small = Cut(16, 8, hidden=16, staged=16, stages=1)
        return Config(small._replace(rows=sizes.positions), small)
    return Config(chosen, TAILS[chip, width])


def layout(sizes: Sizes, config: Config) -> dict:
    """How weights and cached columns lie, for all kernels."""
    DK = sizes.padded_head
    return {
        "DP": sizes.padded_model,
        "D_K": sizes.d_model // sizes.n_heads,
        "DK": DK,
        "AP": round_up(sizes.n_heads, _heads_at_a_time(sizes, config)) * DK,
        "FP": round_up(sizes.d_ff, max(cut.hidden for cut in config)),
    }


def tell_constants(sizes: Sizes, config: Config) -> dict:
    """The compile-time arguments of ``points.tell``."""
    return {**layout(sizes, config), "TABLE_BITS": sizes.table_bits}


@functools.cache
def describe_constants(sizes: Sizes, config: Config) -> dict:
    """The compile-time arguments of ``points.describe``."""
    return {**tell_constants(sizes, config), "BLOCK": 128}


@functools.cache
def take_first_constants(sizes: Sizes, config: Config, block: int) -> dict:
    """The compile-time arguments of ``losses.take_first`` for blocks of so many trial points."""
    size = 1 << (block - 1).bit_length()
    return {**tell_constants(sizes, config), "SCALE": WEIGHT_SCALE, "BLOCK": size}


def take_first_options(constants: dict) -> dict:
    """The launch options of ``losses.take_first``, compiled for these."""
    # From BLOCK: Triton takes powers of two alone, and a block is as long as its memory lets it.
    return {"num_warps": min(8, max(1, constants["BLOCK"] // 32))}


@functools.cache
def blocks_constants(sizes: Sizes, config: Config, mode: str, *, cache: bool, repair: bool) -> dict:
    """The compile-time arguments of ``blocks.run_blocks``."""
    return {
        **layout(sizes, config),
        **_of_cut(sizes, config.blocks, mode),
        "TP": sizes.positions,
        "HC": _heads_at_a_time(sizes, config),
        "CACHE": cache,
        "REPAIR": repair,
        "POINTS": _REPAIR_POINTS if repair and not cache else 1,
    }


@functools.cache
def tail_constants(
    sizes: Sizes, config: Config, mode: str, each: int, *, cache: bool, repair: bool
) -> dict:
    """The compile-time arguments of ``tail.run_tail``; each: rows of a trial point in a tile."""
    laid = layout(sizes, config)
    return {
        **{name: laid[name] for name in ("DP", "AP", "FP")},
        **_of_cut(sizes, config.tail, mode),
        "EACH": each,
        "V": sizes.vocab_size,
        "VP": padded_vocabulary(sizes, config),
        "VC": _vocabulary_at_a_time(sizes, config),
        "CACHE": cache,
        "REPAIR": repair,
        "TILES": _REPAIR_TILES if repair and not cache else 1,
    }


def padded_vocabulary(sizes: Sizes, config: Config) -> int:
    return round_up(sizes.vocab_size, _vocabulary_at_a_time(sizes, config))


def _heads_at_a_time(sizes: Sizes, config: Config) -> int:
    most = power_of_two(sizes.n_heads, least=1)
    return max(1, min(most, config.blocks.queries // sizes.padded_head))


def _vocabulary_at_a_time(sizes: Sizes, config: Config) -> int:
    return min(config.tail.vocabulary, power_of_two(sizes.vocab_size))


def _of_cut(sizes: Sizes, cut: Cut, mode: str) -> dict:
    return {
        "M": cut.rows,
        "D": sizes.d_model,
        "KC": min(cut.staged or sizes.padded_model, sizes.padded_model),
        "FC": cut.hidden,
        "SCALE": WEIGHT_SCALE,
        "MODE": mode,
        "DROPOUT": sizes.dropout,
    }


def options(cut: Cut, mode: str) -> dict:
    """The launch options of a kernel that is cut so."""
    found = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    # The other modes would spill: their products split both operands in registers.
    return found | ({"maxnreg": cut.registers} if cut.registers and mode == "fp16x3" else {})


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n; 16 is the least that tl.dot takes."""
    return max(least, 1 << max(0, n - 1).bit_length())


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to
