"""What an installation offers: a light import, the report of what is ready."""

import subprocess
import sys

import pytest

import psfast


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_the_import_is_light():
    heavy = ("triton", "lightning", "hydra", "wandb", "numpy.testing", "matplotlib", "psfast._C")
    code = f"import sys, psfast; print([m for m in {heavy} if m in sys.modules])"
    result = run("-W", "error::UserWarning:psfast", "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_public_name_is_there():
    for name in psfast.__all__:
        assert getattr(psfast, name).__doc__, name


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: psfast.DecoderOnlyTransformer(dropout="a"), "dropout must be a number, got 'a'"),
        (lambda: psfast.DecoderOnlyTransformer(dropout=1.0), "dropout must be .*< 1.0, got 1.0"),
        (lambda: psfast.MaskedCrossEntropy(None), "ignore_index must be an integer, got None"),
    ],
)
def test_bad_arguments_of_the_model_and_its_loss_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_info_names_versions_backends_and_packages():
    result = run("-m", "psfast.info")
    assert result.returncode == 0, result.stderr
    for word in ("psfast 0", "torch 2", "devices", "serial", "batched", "fused (CPU)", "triton"):
        assert word in result.stdout
    assert "needs a CUDA device" in result.stdout or "cuda:0" in result.stdout


def test_info_says_how_to_get_what_is_missing():
    code = (
        "import importlib.metadata as m, psfast.info as i\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "i.main()"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "not ready" in result.stdout and "pip install 'psfast[train]'" in result.stdout
