"""`sqnr_db`: the fewest layers stay float with which the outputs keep a ratio of signal to quantisation noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.quantize import Quantize
from surgery_plugins.quantize.scheme import Grid, Scheme
from surgery_plugins.quantize.ties import distance, near_ties, untied, untied_sum
from surgery_plugins.quantize.weights import weight_scheme
from torch import nn

import surgery
from surgery import Context, Data, PassError, Registry
from surgery.testing import NETWORKS

REGISTRY = Registry.load()
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(outlier=None):
    """Four convolutions. In that at `outlier` one weight of every output channel is far larger than all others, at an
    input that is always zero."""
    torch.manual_seed(0)
    body = []
    for inputs in (3, 8, 8, 8):
        body += [nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(512, 5)).eval()
    if outlier is not None:
        with torch.no_grad():
            model[outlier - 2].weight[0], model[outlier - 2].bias[0] = 0, -1  # dead behind the ReLU
            model[outlier].weight[:, 0] = 300
    return model


def quantised(model, **options):
    captured = surgery.capture(model, X[:2])
    context = Context(captured, Data.of([X[:16], X[16:]]), registry=REGISTRY)
    return Quantize(vnni=True, **options)(captured, context)


def decibel(wanted, given):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - given).square().sum()))


@pytest.mark.parametrize("outlier", [2, 4])
def test_exactly_the_layer_with_outliers_stays_float(outlier):
    model = network(outlier)
    plain, _ = quantised(model)
    assert decibel(model(X), plain(X)) < 15
    after, report = quantised(model, sqnr_db=20)
    assert [skip.layer for skip in report.skips] == [str(outlier)]
    assert "rounded alone, it leaves them at" in report.skips[0].why
    assert decibel(model(X), after(X)) >= 20


def test_none_stays_float_where_all_are_good_enough():
    _, report = quantised(network(), sqnr_db=20)
    assert not report.skips
    assert len(report.edits) == 5
    assert all(edit.numbers["sqnr_alone_db"] > 20 for edit in report.edits)


def test_what_the_report_says_of_the_outputs_is_what_they_keep():
    model = network(2)
    after, report = quantised(model, sqnr_db=25, weight_bits=6)
    note = next(note for note in report.notes if note.startswith("outputs at"))
    assert float(note.split()[2]) == pytest.approx(decibel(model(X), after(X)), abs=0.06)
    assert float(note.split()[2]) >= 25


def test_a_higher_ratio_keeps_no_fewer_layers_float():
    counts = [len(quantised(network(), weight_bits=4, sqnr_db=bound)[1].skips) for bound in (10, 18, 26, 30)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_a_ratio_that_no_layer_leaves_is_an_error_with_the_best_there_is():
    with pytest.raises(PassError, match=r"even \d alone leaves them at \d+\.\d dB"):
        quantised(network(), sqnr_db=200)


@pytest.mark.parametrize("name", ["functional_conv", "attention", "two_inputs", "shared_module"])
def test_layers_of_every_form_are_measured(name):
    network = NETWORKS[name]
    model = network.captured()
    context = Context(model, Data.of(network.calibration()), registry=REGISTRY)
    _, report = Quantize(sqnr_db=15, vnni=True)(model, context)
    measured = [edit.numbers["sqnr_alone_db"] for edit in report.edits]
    assert measured
    assert all(15 <= db < 100 for db in measured)


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([4, 7, 8]), ratio=st.floats(0.05, 20), seed=st.integers(0, 2**16))
def test_a_scale_that_avoids_ties_is_hardly_larger_and_further_from_them(bits, ratio, seed):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
    scale = weight_scheme(weight, Grid.signed(bits)).scale / 100
    found = untied(scale, ratio)
    assert torch.equal(found, found.float().double())
    assert ((found / scale - 1 > -1e-6) & (found / scale < 1.005)).all()
    assert (distance(found, ratio) >= distance(scale.float().double(), ratio)).all()


@settings(max_examples=15, deadline=None)
@given(
    shares=st.tuples(st.integers(1, 128), st.integers(1, 128)),
    zeros=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
def test_a_sum_keeps_off_ties_though_its_terms_have_scales_in_simple_ratios(shares, zeros):
    grid, share = Grid.unsigned(8), 1 / 128
    terms = [Scheme(torch.tensor(s * share), torch.tensor(z), grid) for s, z in zip(shares, zeros, strict=True)]
    given = Scheme(torch.tensor(max(shares) * share, dtype=torch.float64), torch.tensor(100), grid)
    found = untied_sum(given, terms)
    first, second = ((torch.arange(256.0).double() - t.zero_point) * t.scale for t in terms)
    sums = first.unsqueeze(1) + second
    assert given.scale <= found.scale < 1.005 * given.scale
    assert torch.equal(found.zero_point, given.zero_point)
    assert near_ties(sums / found.scale) <= min(near_ties(sums / given.scale), 0.001 * sums.numel())
