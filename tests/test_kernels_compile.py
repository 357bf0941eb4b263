"""The small model's kernels compile for both chips without a GPU; `make kernels` does them all."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing compiles in the interpreter", allow_module_level=True)

from psfast.kernels import compile as ahead_of_time


def test_the_small_models_kernels(capsys):
    transformers = ("blocks", "tail")
    chosen = [case for case in ahead_of_time.cases() if case.function not in transformers]
    kind = {"mode": "fp16x3", "cache": False, "repair": False}
    for capability in (8, 9):
        chosen.append(ahead_of_time.blocks_case(capability, 64, 16, **kind))
        chosen.append(ahead_of_time.tail_case(capability, 64, 102, **kind))
    assert ahead_of_time.report(chosen) == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:3] == "sm_"]
    assert len(lines) == len(chosen)
    assert {line[-1] for line in lines} == {"1"}  # no product is computed twice


def test_products_that_are_computed_twice_are_seen():
    layout = (
        "#mma1 = #ttg.nvidia_mma<{versionMajor = 3, warpsPerCTA = [8, 1], instrShape = [16, %d]}>"
    )
    product = "%1 = ttng.warp_group_dot %2, %3, %4 : x -> tensor<64x32xf32, #mma1> loc(#loc9)"
    for columns, expected in ((32, 2), (64, 4)):
        text = f"{layout % columns}\n{product}"
        assert ahead_of_time.most_repeated(text) == expected
    assert ahead_of_time.most_repeated(text.replace("64x32", "2x64x64")) == 1


def test_what_counts_as_a_fault():
    strict = ahead_of_time.blocks_case(9, 64, 16, "fp16x3", cache=False, repair=False)
    repair = ahead_of_time.tail_case(9, 64, 102, "tf32x3", cache=False, repair=True)
    assert strict.spills is not None and repair.spills is None
    result = ahead_of_time.Result(255, strict.spills + 8, 300_000, True)
    assert [fault.split()[0] for fault in result.faults(strict)] == ["spills", "needs", "wgmma"]
    assert [fault.split()[0] for fault in result.faults(repair)] == ["needs", "wgmma"]
    assert ahead_of_time.Result(255, strict.spills, 232_448, False).faults(strict) == []


@pytest.mark.parametrize("n_heads, vocabulary", [(4, 102), (2, 3), (16, 300)])
def test_every_configuration_serves_its_shape(n_heads, vocabulary):
    configs = ahead_of_time.configs
    for capability, width, positions in configs.BLOCKS:
        sizes = ahead_of_time.transformer_sizes(width, positions)
        sizes = sizes._replace(n_heads=n_heads, vocab_size=vocabulary)
        config = configs.choose_config(sizes, capability, 232_448, "fp16x3")
        kind = {"mode": "fp16x3", "cache": False, "repair": False}
        blocks = configs.blocks_constants(sizes, config, **kind)
        tail = configs.tail_constants(sizes, config, each=4, **kind)
        assert blocks["M"] % positions == 0
        assert blocks["AP"] % (blocks["HC"] * blocks["DK"]) == 0
        assert tail["M"] % tail["EACH"] == 0 and tail["VP"] % tail["VC"] == 0
        for c in (blocks, tail):
            assert c["FP"] % c["FC"] == 0 and c["DP"] % c["KC"] == 0
    sizes = ahead_of_time.transformer_sizes(64, 128)
    assert configs.choose_config(sizes, 9, 232_448, "fp16x3") is None


@pytest.mark.parametrize(
    ("n_heads", "capability", "shared_memory", "serves"),
    [
        (1, 9, 232_448, False),
        (2, 9, 232_448, True),
        (2, 8, 166_912, True),  # an A100
        (2, 8, 101_376, False),  # sm_86, sm_89
        (2, 12, 101_376, False),
        (4, 8, 101_376, True),
    ],
)
def test_heads_whose_weights_fill_the_shared_memory_are_refused(
    n_heads, capability, shared_memory, serves
):
    configs = ahead_of_time.configs
    sizes = ahead_of_time.transformer_sizes(256, 16)._replace(n_heads=n_heads)
    config = configs.choose_config(sizes, capability, shared_memory, "fp16x3")
    assert (config is not None) == serves


def test_wide_heads_are_among_the_cases():
    cases, every = list(ahead_of_time.wide_heads_cases()), list(ahead_of_time.cases())
    assert all(case in every for case in cases)
    wide = {(case.arch, case.constants["DP"], case.constants["DK"]) for case in cases}
    assert {(90, 256, 128), (90, 128, 128), (90, 64, 64), (80, 128, 128), (80, 256, 64)} <= wide
    assert (80, 256, 128) not in wide


def test_two_heads_of_64_fit_into_a_hopper_chip(capsys):
    (case,) = [
        case
        for case in ahead_of_time.wide_heads_cases()
        if case.name.endswith("d_model 128 T <= 16 heads of 64") and case.arch == 90
    ]
    assert ahead_of_time.report([case]) == []
