"""The small model's kernels compile for both chips without a GPU; `make kernels` does them all."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing compiles in the interpreter", allow_module_level=True)

from psfast.kernels import compile as ahead_of_time


def test_the_small_models_kernels(capsys):
    shared = {case.name: case for case in ahead_of_time.cases() if case.function != "evaluate"}
    chosen = list(shared.values())
    for capability in (8, 9):
        chosen.append(
            ahead_of_time.evaluate_case(capability, 64, 16, "fp16x3", cache=False, repair=False)
        )
    assert ahead_of_time.report(chosen) == []
    assert capsys.readouterr().out.count("sm_") == len(chosen)


def test_what_counts_as_a_fault():
    strict = ahead_of_time.evaluate_case(9, 64, 16, "fp16x3", cache=False, repair=False)
    repair = ahead_of_time.evaluate_case(9, 64, 16, "tf32x3", cache=False, repair=True)
    assert strict.strict and not repair.strict
    result = ahead_of_time.Result(255, 8, 300_000, True)
    assert [fault.split()[0] for fault in result.faults(strict)] == ["spills", "needs", "wgmma"]
    assert [fault.split()[0] for fault in result.faults(repair)] == ["needs", "wgmma"]
    assert ahead_of_time.Result(255, 0, 232_448, False).faults(strict) == []


def test_every_configuration_serves_its_shape():
    plan = ahead_of_time.plan
    for capability, width, positions in plan.CONFIGS:
        sizes = ahead_of_time.transformer_sizes(width, positions)
        config = plan.choose_config(sizes, capability, "fp16x3")
        constants = plan.constants(sizes, config, "fp16x3", cache=False, repair=False)
        assert constants["M"] % positions == 0
        assert constants["AP"] % (constants["HC"] * constants["DK"]) == 0
        assert constants["FP"] % constants["FC"] == 0 and constants["VP"] % constants["VC"] == 0
        assert constants["DP"] % constants["KC"] == 0
    assert plan.choose_config(ahead_of_time.transformer_sizes(64, 128), 9, "fp16x3") is None
