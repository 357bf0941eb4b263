"""What the batched backend computes by other code than torch's own."""

import functools

import pytest
import torch

from psfast.objectives.batched import arithmetic

SHAPES = [(64, 192), (256, 64), (300, 33), (17, 16), (128, 10), (8, 1), (1, 3), (1024, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width, out", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 250])  # of a trial point
def test_linear_is_a_product_and_the_same_in_every_block(
    dtype, width, out, with_bias, is_transposed, rows
):
    torch.manual_seed(0)
    x = torch.randn(80 * rows, width, dtype=dtype)
    weight = torch.randn(width, out, dtype=dtype)
    weight = weight.t().contiguous().t() if is_transposed else weight
    bias = torch.randn(out, dtype=dtype) if with_bias else None
    found = arithmetic.linear(x, weight, bias, points=80)
    exact = x.double() @ weight.double() + (bias.double() if with_bias else 0.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    for start, points in ((0, 1), (79, 1), (1, 2), (5, 3), (8, 16), (3, 47)):
        block = slice(start * rows, (start + points) * rows)
        assert torch.equal(arithmetic.linear(x[block], weight, bias, points), found[block])


def _by_place(x, weight, bias, *, rows, columns):
    """A product as of a library that has other code for rows left over of so many, and for all
    rows where columns are left over, by their place."""
    product = x @ weight if bias is None else torch.addmm(bias, x, weight)
    product[len(x) - len(x) % rows :] *= 1.000001
    if weight.shape[1] % columns:
        product[::2] *= 1.000001
    return product


@pytest.mark.parametrize("multiples", [(4, 1), (16, 1), (4, 16), (1, 2), (1, 3), (7, 1)])
@pytest.mark.parametrize("out", [1, 2, 16, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_have_the_same_bits_whatever_the_library_does(monkeypatch, out, with_bias, multiples):
    rows, columns = multiples
    library = functools.partial(_by_place, rows=rows, columns=columns)
    steady = arithmetic._steady_multiples.__wrapped__
    monkeypatch.setattr(arithmetic, "_product", library)
    monkeypatch.setattr(arithmetic, "_steady_multiples", functools.cache(steady))
    monkeypatch.setattr(arithmetic, "_has_onednn", lambda: False)
    x, weight = torch.randn(65, 9), torch.randn(9, out)
    bias = torch.randn(out) if with_bias else None
    together = arithmetic.linear(x, weight, bias)
    torch.testing.assert_close(together, torch.nn.functional.linear(x, weight.t(), bias))
    alone = [arithmetic.linear(row, weight, bias) for row in x.split(1)]
    assert all(row.shape == (1, out) and row.is_contiguous() for row in alone)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(torch.cat([arithmetic.linear(x[:8], weight, bias), *alone[8:]]), together)


def test_large_products_go_to_onednn_where_it_is():
    if not arithmetic._has_onednn():
        pytest.skip("this torch has no oneDNN product for this machine")
    with torch.profiler.profile() as profile:
        arithmetic.linear(torch.randn(2048, 64), torch.randn(64, 64), torch.randn(64))
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("without", ["_has_onednn", "_onednn_agrees", "_log_softmax_agrees"])
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


def test_linear_takes_weights_and_biases_of_any_form():
    x, number = torch.randn(3, 4), torch.randn(1)
    for weight in (
        torch.randn(4, 1).expand(4, 5),
        torch.randn(9)[:8].unfold(0, 5, 1),
        x[:, :0].t(),
    ):
        for bias in (None, number, torch.randn(3, 1), number[0]):
            expected = x[:, : len(weight)] @ weight + (0.0 if bias is None else bias)
            found = arithmetic.linear(x[:, : len(weight)], weight, bias)
            torch.testing.assert_close(found, expected)
