"""What the batched backend computes by other code than torch's own."""

import pytest
import torch

from psfast.objectives.batched import arithmetic

SHAPES = [(64, 192), (256, 64), (300, 33), (17, 16), (128, 10), (8, 1)]


@pytest.mark.parametrize("width, out", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rows", [16, 64, 250])  # of a trial point
def test_linear_is_a_product_and_the_same_in_every_block(
    width, out, with_bias, is_transposed, rows
):
    torch.manual_seed(0)
    x = torch.randn(80 * rows, width)
    weight = torch.randn(out, width).t() if is_transposed else torch.randn(width, out)
    bias = torch.randn(out) if with_bias else None
    found = arithmetic.linear(x, weight, bias, points=80)
    exact = x.double() @ weight.double() + (bias.double() if with_bias else 0.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    if out < 16:  # torch's own alone, whose bits here depend on the number of rows
        return
    for start, points in ((0, 1), (79, 1), (1, 2), (8, 16), (3, 47)):
        block = slice(start * rows, (start + points) * rows)
        assert torch.equal(arithmetic.linear(x[block], weight, bias, points), found[block])


def test_large_products_go_to_onednn_where_it_is():
    if not arithmetic._has_onednn():
        pytest.skip("this torch has no oneDNN product for this machine")
    with torch.profiler.profile() as profile:
        arithmetic.linear(torch.randn(2048, 64), torch.randn(64, 64), torch.randn(64))
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("without", ["_has_onednn", "_products_agree", "_log_softmax_agrees"])
def test_without_the_faster_code_the_values_are_the_same(monkeypatch, without):
    monkeypatch.setattr(arithmetic, without, lambda *shape: False)
    x, weight, bias = torch.randn(512, 64), torch.randn(64, 192), torch.randn(192)
    torch.testing.assert_close(arithmetic.linear(x, weight, bias), torch.addmm(bias, x, weight))
    rows = torch.randn(512, 7)
    found = arithmetic.log_softmax(rows, 1, False)
    torch.testing.assert_close(found, torch.log_softmax(rows, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 1), (64, 2), (4, 16, 10), (8, 16, 15), (5, 10), (64, 40)])
def test_log_softmax_has_the_bits_of_torchs(dtype, shape):
    x = torch.randn(shape, dtype=dtype) * 5
    expected = torch.log_softmax(x, -1)
    assert torch.equal(arithmetic.log_softmax(x, len(shape) - 1, False), expected)
    assert torch.equal(arithmetic.log_softmax(x, -1, False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_right_everywhere(dtype):
    x = torch.cat([torch.randn(999, dtype=dtype) * s for s in (1e-30, 1e-4, 0.3, 3.0, 300.0)])
    found, exact = arithmetic.tanh(x), torch.tanh(x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=4 * eps, atol=0.0)
    ends = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    torch.testing.assert_close(arithmetic.tanh(ends), torch.tanh(ends), equal_nan=True)
    alone = torch.cat([arithmetic.tanh(piece) for piece in x.split(7)])
    assert torch.equal(alone, found)
