"""The fused kernels, interpreted on the CPU.

Triton decides at its import whether it interprets, so these tests run in a process of their
own; one that has imported Triton before could not.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import psfast
from psfast.objectives import _CLASSES
from psfast.objectives.fused_cuda import FusedCudaObjective

triton = pytest.importorskip("triton")

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
NEW_NUMPY = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2])) >= (2, 4)
interpreted = pytest.mark.skipif(
    OLD_TRITON and NEW_NUMPY, reason="Triton 3.6 cannot interpret with this NumPy"
)

SLOW = pytest.mark.timeout(900)  # 100 s by themselves, 300 beside three others on two cores


@interpreted
@SLOW
def test_interpreted():
    path = Path(__file__).with_name("kernels_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@interpreted
@SLOW
def test_the_gpu_benchmark_runs_dry(tmp_path):
    found = dry_run("gpu", tmp_path)
    assert [stage for stage in found["stages"] if not stage["ok"]] == []
    assert all(record["ok"] for record in found["gate"])
    starts = {row["backend"] for row in found["rows"] if row["regime"] == "start"}
    assert starts == {"fused fp16x3", "fused tf32x3", "fused fp32", "batched", "graph"}
    assert {row["backend"] for row in found["rows"] if row["regime"] == "rare"} == {
        "fused fp16x3",
        "fused tf32x3",
        "fused fp32",
    }
    assert {p["what"] for p in found["profiles"] if p["kernels"]} == {"complete poll", "start"}


@interpreted
def test_other_cuts_run_dry(tmp_path):
    cuts = dry_run("gpu_tiles", tmp_path)["cuts"]
    assert [(row["kernel"], row["cut"]["rows"]) for row in cuts] == [("blocks", 32), ("tail", 32)]


def dry_run(name, folder) -> dict:
    """What ``bench/NAME.py`` writes into the folder."""
    program = Path(__file__).parents[1] / "bench" / f"{name}.py"
    command = [sys.executable, str(program), "--dry-run", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / f"{name}.json").read_text())


LOST = """
import os, sys, time
sys.argv[1:] = ["--dry-run"]
import gpu
from pathlib import Path
out, again = Path(OUT), (Path(OUT) / "gpu.json").exists()
run = gpu.Run(out, time.time() + 100, again)
run.job("one", run.stage, "one", lambda: run.row("tiny", 1, "any", "serial loop", 1.0))
run.job("two", run.stage, "two", lambda: LAST_WORDS)
run.job("three", run.stage, "three", lambda: None)
"""


@pytest.mark.parametrize("last_words", ["os._exit(9)", "time.sleep(60)"])
def test_the_gpu_benchmark_goes_on_behind_a_stage_that_ended_its_process(tmp_path, last_words):
    code = LOST.replace("OUT", repr(str(tmp_path))).replace("LAST_WORDS", last_words)
    code = code.replace("import gpu\n", "import gpu\ngpu.Run.stage.__kwdefaults__['seconds'] = 1\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "bench")}
    run = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        for _ in range(2)
    ]
    assert run[0].returncode != 0 and run[1].returncode == 0, run[1].stderr.decode()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["one", "two", "three"]
    assert [stage["error"] for stage in found["stages"]] == ["", "the process ended in it", ""]
    assert (
        len(found["rows"]) == 1 and "two: the process ended" in (tmp_path / "gpu.txt").read_text()
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted here")
def test_needs_a_gpu():
    model = psfast.DecoderOnlyTransformer(d_model=16, n_heads=2, d_ff=16)
    inputs = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be on a CUDA device, got cpu"):
        FusedCudaObjective(model, psfast.MaskedCrossEntropy(), inputs, inputs)


def test_importing_psfast_imports_no_triton():
    code = (
        "import psfast.kernels, psfast.objectives.fused_cuda, sys; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_choosers_names_exist():
    for kind in _CLASSES.values():
        for module, name in kind.values():
            assert hasattr(import_module(f"psfast.objectives.{module}"), name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16x3", "tf32x3", "fp32"])
def test_on_a_gpu(precision):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer().cuda()
    criterion = psfast.MaskedCrossEntropy()
    inputs = torch.randint(102, (4, 16), device="cuda")
    targets = torch.randint(99, (4, 16), device="cuda")
    targets[:, :8] = 100
    model.eval()
    objective = FusedCudaObjective(model, criterion, inputs, targets, precision=precision)
    twin = psfast.DecoderOnlyTransformer().cuda().double()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    index = torch.randint(objective.flat.size, (200,), device="cuda")
    delta = torch.full((200,), 0.1, device="cuda")
    flat = torch.nn.utils.parameters_to_vector(twin.parameters()).detach()

    def loss(values):
        torch.nn.utils.vector_to_parameters(values, twin.parameters())
        with torch.no_grad():
            return criterion(twin(inputs), targets)

    expected = []
    for i in index.tolist():
        values = flat.clone()
        values[i] = (values[i].float() + 0.1).double()
        expected.append(loss(values) - loss(flat))
    got = objective.losses(index, delta) - objective()
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B", [4, 64])
def test_a_loss_does_not_depend_on_its_block(B):
    torch.manual_seed(0)
    model = psfast.DecoderOnlyTransformer().cuda()
    inputs = torch.randint(102, (B, 16), device="cuda")
    targets = torch.randint(99, (B, 16), device="cuda")
    targets[:, :8] = 100
    objective = FusedCudaObjective(model, psfast.MaskedCrossEntropy(), inputs, targets)
    index = torch.randint(objective.flat.size, (3000,), device="cuda")
    delta = torch.full((3000,), 0.1, device="cuda")
    together = objective.losses(index, delta)
    backwards = objective.losses(index.flip(0), delta).flip(0)
    assert torch.equal(together, backwards)
    for some in (slice(0, 1), slice(5, 12), slice(100, 900)):
        assert torch.equal(together[some], objective.losses(index[some], delta[some]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B", [4, 64])
def test_a_captured_descent_takes_the_serial_steps(B):
    runs = []
    for many in (1, 30):
        torch.manual_seed(0)
        model = psfast.DecoderOnlyTransformer(dropout=0.0).cuda()
        inputs = torch.randint(102, (B, 16), device="cuda")
        targets = torch.randint(99, (B, 16), device="cuda")
        objective = FusedCudaObjective(model, psfast.MaskedCrossEntropy(), inputs, targets)
        optimizer = psfast.PatternSearch(objective.params, radius=0.05, max_accepts=many)
        accepted = []
        while len(accepted) < 60:
            optimizer.step(objective)
            accepted += optimizer.last_poll.accepted
        state = optimizer.state_dict()["search"]
        del state["incumbent"]
        runs.append((accepted, state, objective().item()))
    assert runs[0] == runs[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B", [4, 64])
def test_a_poll_that_looks_ahead_takes_the_serial_steps(B):
    runs = []
    for looks_ahead in (False, True):
        torch.manual_seed(0)
        model = psfast.DecoderOnlyTransformer(dropout=0.0).cuda()
        inputs = torch.randint(102, (B, 16), device="cuda")
        targets = torch.randint(99, (B, 16), device="cuda")
        objective = FusedCudaObjective(model, psfast.MaskedCrossEntropy(), inputs, targets)
        objective.is_asynchronous = looks_ahead
        optimizer = psfast.PatternSearch(objective.params, decrease=0.05, block_size=64)
        state = optimizer.state_dict()
        state["search"]["mean_gap"] = 1e6  # as if hardly anything had improved
        optimizer.load_state_dict(state)
        reports = []
        for _ in range(8):
            optimizer.step(objective)
            reports.append(optimizer.last_poll)
        assert all((report.speculated >= 64) == looks_ahead for report in reports)
        accepted = [report.accepted for report in reports]
        runs.append((accepted, optimizer.state_dict()["search"], objective().item()))
    assert runs[0] == runs[1]
