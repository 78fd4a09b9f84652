"""Write layers as products of smaller ones.

    svd, channel_svd   W (O, I, *k) → reduce (r, I, *k), expand (O, r, 1)
    tucker             W (O, I, *k) → reduce (s, I, 1), core (p, s, *k), expand (O, p, 1)
    spatial_svd        W (O, I, k₁, k₂) → vertical (r, I, k₁, 1), horizontal (O, r, 1, k₂)
    cp                 W (O, I, k₁, k₂) → reduce (r, I, 1, 1), depthwise (r, 1, k₁, 1) and (r, 1, 1, k₂), expand
    tensor_train       W (O, I) → cores (o_n r_{n-1}, i_n r_n), O = Π o_n, I = Π i_n

Every method shares how ranks are chosen (`cost`, `allocation`), how calibration data decides what is near (`kernel`,
`fitting`) and how a layer is replaced (`chain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from surgery import Pass, hookimpl

from .engine import DESCRIPTION, Engine
from .options import LowRank, Rank

if TYPE_CHECKING:
    from .method import Method


@dataclass(frozen=True, kw_only=True)
class Svd(LowRank):
    """Write linear layers as products of two thin ones.

    Sainath et al. 2013 for a last layer; any linear layer here, attention's projections included. The truncated
    singular value decomposition is the best there is (Eckart and Young 1936), with calibration data that of the output.
    """

    @property
    def method(self) -> Method:
        from .svd import LinearSvd

        return LinearSvd()


@dataclass(frozen=True, kw_only=True)
class ChannelSvd(LowRank):
    """Write convolutions as one with fewer filters and a pointwise one.

    Zhang et al. 2015 (arXiv:1505.06798), section 3.1: the filters that are left span the principal components of the
    output, of the weights without data.
    """

    @property
    def method(self) -> Method:
        from .svd import ConvSvd

        return ConvSvd()


@dataclass(frozen=True, kw_only=True)
class Tucker(LowRank):
    """Put a convolution between two pointwise ones, with fewer input and output channels.

    Kim et al. 2016 (arXiv:1511.06530), section 3.1: a partial Tucker decomposition of the kernel, with calibration data
    towards the output. A pointwise convolution that would save nothing is left out.

    `engine: tensorly` has TensorLy's `partial_tucker` do the orthogonal iteration, from the same start to the same
    tolerance: a check of one's own, which takes eigenvectors of small matrices where TensorLy takes singular vectors of
    large ones.
    """

    engine: Annotated[Engine, Field(description=DESCRIPTION)] = "own"

    rank: Annotated[
        Rank | tuple[Rank, Rank] | Literal["vbmf"] | None,
        Field(description="ranks of every layer, of its outputs and inputs, or vbmf: judged from its weight"),
    ] = None  # type: ignore[assignment]

    @property
    def method(self) -> Method:
        from .tucker import Tucker2

        return Tucker2(self.engine)


@dataclass(frozen=True, kw_only=True)
class SpatialSvd(LowRank):
    """Write convolutions as a vertical and a horizontal one.

    Jaderberg et al. 2014 (arXiv:1405.3866), scheme 2, with the best factors in closed form of Tai et al. 2016
    (arXiv:1511.06067), theorem 1; with calibration data they go on towards the output.
    """

    batchnorm: Annotated[bool, Field(description="a BatchNorm between the two, for training; an identity at first")] = (
        False
    )

    @property
    def method(self) -> Method:
        from .spatial import SpatialSvd

        return SpatialSvd(self.batchnorm)


@dataclass(frozen=True, kw_only=True)
class Cp(LowRank):
    """Write convolutions as two pointwise ones with a depthwise one along every kernel axis between them.

    Lebedev et al. 2015 (arXiv:1412.6553), section 3: a canonical polyadic decomposition of the kernel, by regularised
    alternating least squares from orthogonal components; with calibration data it goes on towards the output. What
    comes out is checked: components that grow and cancel (Phan et al. 2020, arXiv:2008.05441) are an error.

    `engine: tensorly` has TensorLy's `parafac` do each round of least squares, from the same start, with the same
    regularisation and tolerance. One's own rounds take less time the larger the kernel is: they multiply by it twice
    and never form it unfolded beside Khatri-Rao products.
    """

    iterations: Annotated[int, Field(ge=1, description="most rounds of alternating least squares")] = 50
    restarts: Annotated[int, Field(ge=0, description="random starts that are tried where the first fails")] = 2
    regularisation: Annotated[
        float, Field(ge=0, description="strength of the pull to small components, relative to the weight")
    ] = 1e-3
    tolerance: Annotated[float, Field(ge=0, description="share of the loss that a round gains at least")] = 1e-4
    engine: Annotated[Engine, Field(description=DESCRIPTION)] = "own"

    @property
    def method(self) -> Method:
        from .cp import CpSum

        return CpSum(self.iterations, self.restarts, self.regularisation, self.tolerance, self.engine)


@dataclass(frozen=True, kw_only=True)
class TensorTrain(LowRank):
    """Write large linear layers as trains of small ones, each along one part of the features.

    Novikov et al. 2015 (arXiv:1509.06569), section 4: the weight as a matrix in the tensor train format, with
    calibration data towards the output. It saves parameters first of all: with a low rank they are few, while its MACs
    grow with the rank faster than those of `svd`.
    """

    cores: Annotated[int, Field(ge=2, description="number of layers in a train")] = 2
    min_features: Annotated[int, Field(ge=4, description="least inputs and outputs of a layer that is written so")] = (
        512
    )

    @property
    def method(self) -> Method:
        from .tensor_train import TensorTrain

        return TensorTrain(self.cores, self.min_features)


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Svd, ChannelSvd, Tucker, SpatialSvd, Cp, TensorTrain]
