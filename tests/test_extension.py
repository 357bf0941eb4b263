"""Finding and building the C++ extension."""

import os
import subprocess
import sys

import pytest
import torch

from psfast import extension

LOAD = "from psfast import extension; print(extension.load()); print(extension.status())"


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def test_the_import_loads_nothing():
    run("import psfast, sys, torch; assert not hasattr(torch.ops.psfast, 'fused_losses')")


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "_built_library", lambda: None)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    reason = extension.load.__wrapped__()
    assert "no-compiler' names no program here: install g++ or clang++" in reason
    ready, detail = extension.status()
    assert not ready and "--no-build-isolation" in detail


def test_without_a_place_to_keep_it_it_says_so(monkeypatch, tmp_path):
    if extension._compiler() is None:
        pytest.skip("no compiler")
    (tmp_path / "file").touch()
    monkeypatch.setattr(extension, "_built_library", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    reason = extension.load.__wrapped__()
    assert f"could not be kept in {tmp_path / 'file' / 'psfast'}" in reason
    assert "set XDG_CACHE_HOME" in reason
    assert extension.status() == (False, reason)


def test_the_compiler_may_have_arguments(monkeypatch):
    if extension._compiler() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("CXX", f"{sys.executable} 'an argument'")
    assert extension._compiler() == [sys.executable, "an argument"]
    monkeypatch.delenv("CXX")
    assert len(extension._compiler()) == 1


def test_a_broken_source_is_a_reason_with_the_compilers_words(monkeypatch, tmp_path):
    if extension._compiler() is None:
        pytest.skip("no compiler")
    (tmp_path / "ops.cpp").write_text("#error broken on purpose\n")
    monkeypatch.setattr(extension, "_built_library", lambda: None)
    monkeypatch.setattr(extension, "_sources", lambda: tmp_path)
    monkeypatch.setattr(extension, "_fingerprint", lambda: "test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "broken on purpose" in extension.load.__wrapped__()
    with pytest.raises(subprocess.CalledProcessError):
        extension.compile_library(tmp_path / "made.so")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_status_names_the_instruction_set():
    if extension.load() is not None:
        pytest.skip(extension.load())
    ready, detail = extension.status()
    assert ready and detail.startswith(torch.ops.psfast.instruction_set())


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_gives_the_same_losses(isa):
    """Another instruction set adds in another order at most: float64 agrees to rounding."""
    if extension.load() is not None:
        pytest.skip(extension.load())
    code = """
import torch
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives.fused import FusedObjective
torch.manual_seed(0)
model = DecoderOnlyTransformer(11, 12, 2, 3, 17, 9, 0.0).double()
tokens = torch.randint(11, (3, 7))
f = FusedObjective(model, MaskedCrossEntropy(), tokens, tokens)
index = torch.arange(f.flat.size)
losses = f.losses(index, torch.full((f.flat.size,), 0.1).double())
print(torch.ops.psfast.instruction_set(), *losses[::7].tolist())
"""
    name, *limited = run(code, PSFAST_ISA=isa).split()
    _, *best = run(code).split()
    assert name in ("portable", isa)
    limited, best = (
        torch.tensor(list(map(float, x)), dtype=torch.float64) for x in (limited, best)
    )
    torch.testing.assert_close(limited, best, rtol=1e-12, atol=0)
