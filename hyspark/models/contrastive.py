"""Pre-training by comparing views of one image: MoCo v2, BYOL and SwAV around any network.

The methods' heads and losses are lightly's. Shapes: b batch, c channels, f features of a projection, *size voxels per
axis. Sources: Chen et al., "Improved baselines with momentum contrastive learning", 2020; Grill et al., "Bootstrap your
own latent", NeurIPS 2020; Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
NeurIPS 2020. Two things differ from MoCo's paper. Keys are computed with statistics of earlier batches, not with those
of their own, so that they carry no trace of the batch they came in, without shuffling between GPUs, of which there may
be one. And the head has BatchNorm, as that of v3 (Chen et al., ICCV 2021): planes of CTs are so alike that projections
otherwise share one direction, and keys can be told by how far it has moved since.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.models.spark import PyramidEncoder, record_outputs

CONTRASTIVE_METHODS = ("moco", "byol", "swav")
PROJECTION = {"moco": 128, "byol": 256, "swav": 128}
"""Features of a projection, as published."""
MOCO_TEMPERATURE = 0.2


@dataclass
class SiameseOutput:
    """What one pass gives. loss: scalar. projections: (b, f) of the first views, of normalise length; alike for all images
    where the network has collapsed.
    """

    loss: Tensor
    projections: Tensor


class PooledEncoder(nn.Module):
    """A network up to its coarsest map, averaged over positions: (b, in_channels, *size) -> (b, width).

    Arguments and errors as for PyramidEncoder.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: Sequence[int],
        in_channels: int,
        run: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        taps = PyramidEncoder(backbone, img_size, in_channels, run=run).taps
        pyramid = PyramidEncoder(backbone, img_size, in_channels, taps[-1:], run)
        self.backbone = backbone
        self.run = pyramid.run
        self.tap = pyramid.taps[-1]
        self.width = pyramid.maps[0][0]

    def forward(self, images: Tensor) -> Tensor:
        with record_outputs(self.backbone, [self.tap]) as seen:
            self.run(self.backbone, images)
        return seen[self.tap].flatten(2).mean(-1)

    def weights(self) -> dict[str, Tensor]:
        """What is handed on: the network's own, in its own key names."""
        return self.backbone.state_dict()


class MomentumEncoder(nn.Module):
    """A slow copy of a network, (b, in_channels, *size) -> (b, f): its weights are moving averages of the network's,
    its batch statistics are its own, since those of the network do not fit weights that lag behind.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.module(images).float()
        return out

    def encode_keys(self, images: Tensor) -> Tensor:
        """What it gives each image whatever the others are: by statistics of earlier batches. In training this batch
        joins them afterwards; the first gives them whole, since those that norms begin with fit nothing.
        """
        is_training = self.training
        norms: list[Any] = [part for part in self.modules() if getattr(part, "num_batches_tracked", None) is not None]
        if is_training and norms and not norms[0].num_batches_tracked:
            usual = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            self(images)
            for norm, momentum in zip(norms, usual, strict=True):
                norm.momentum = momentum
        found: Tensor = self.eval()(images)
        if is_training:
            self.train()(images)
        return found

    @torch.no_grad()
    def follow(self, network: nn.Module, momentum: float) -> None:
        """Move towards the network: momentum 1 stays, 0 copies, statistics included."""
        if momentum == 0:
            self.module.load_state_dict(network.state_dict())
        for own, other in zip(self.module.parameters(), network.parameters(), strict=True):
            own.lerp_(other, 1 - momentum)


class Siamese(nn.Module):
    """What the methods share: views in, loss out; `follow` before a step, for what moves besides the gradient."""

    def __init__(self, encoder: PooledEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        """views: (b, in_channels, *size) each, the i-th sample of all from one image."""
        raise NotImplementedError

    def follow(self, momentum: float) -> None:
        """Called before each step."""


class MomentumSiamese(Siamese):
    """A method whose targets are projections by a slow copy of the network."""

    def __init__(self, encoder: PooledEncoder, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__(encoder)
        self.project = head
        self.teacher = MomentumEncoder(nn.Sequential(encoder, head))
        self.criterion = criterion

    def follow(self, momentum: float) -> None:
        self.teacher.follow(nn.Sequential(self.encoder, self.project), momentum)


class MoCo(MomentumSiamese):
    """MoCo v2: the first view must be found again, by its projection, between the second and keys of earlier images."""

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        query = self.project(self.encoder(views[0])).float()
        return SiameseOutput(self.criterion(query, self.teacher.encode_keys(views[1])), normalise(query))


class BYOL(MomentumSiamese):
    """BYOL: of each view the slow copy's projection of the other is predicted."""

    def __init__(self, encoder: PooledEncoder, head: nn.Module, criterion: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder, head, criterion)
        self.predict = predictor

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        found = [self.project(self.encoder(view)) for view in views[:2]]
        wanted = [self.teacher(view) for view in views[:2]]
        losses = [self.criterion(self.predict(a).float(), b) for a, b in zip(found, reversed(wanted), strict=True)]
        return SiameseOutput((losses[0] + losses[1]) / 2, normalise(found[0]))


class SwAV(Siamese):
    """SwAV: from each view the cluster is told that the other, large, view of the image is assigned to."""

    def __init__(
        self, encoder: PooledEncoder, head: nn.Module, prototypes: nn.Module, criterion: nn.Module, together: bool
    ) -> None:
        super().__init__(encoder)
        self.together = together
        self.project = head
        self.prototypes: Any = prototypes
        self.criterion: Any = criterion

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        projections = [normalise(self.project(self.encoder(view))) for view in views]
        scores = [self.prototypes(x).float() for x in projections]
        return SiameseOutput(self.criterion(scores[:2], scores[2:]).sum(), projections[0])  # of one number

    def train(self, mode: bool = True) -> "SwAV":
        """Outside training each process assigns its own images alone: there may be no others."""
        self.criterion.sinkhorn_gather_distributed = mode and self.together
        return super().train(mode)

    def follow(self, momentum: float) -> None:
        """Prototypes have normalise length."""
        self.prototypes.normalize()


def normalise(x: Tensor) -> Tensor:
    """(b, f) -> the same at normalise length."""
    return nn.functional.normalize(x.float(), dim=1)


def build_siamese(
    method: str,
    backbone: nn.Module,
    img_size: int | Sequence[int] = 224,
    *,
    in_channels: int = 3,
    axes: int = 2,
    head_width: int = 2048,
    queue_size: int = 4096,
    num_prototypes: int = 300,
    num_processes: int = 1,
    run: Callable[[nn.Module, Tensor], Any] | None = None,
) -> Siamese:
    """The pre-training network of a method around any backbone; run as for PyramidEncoder.

    method: moco, byol or swav. img_size: voxels per axis of a large view. head_width: hidden features of the heads.
    queue_size: keys that MoCo compares with; a multiple of the global batch. num_prototypes: SwAV's clusters.
    num_processes: above 1, queue and clusters are those of the global batch.

    Raises ValueError for an unknown method, ModuleNotFoundError where lightly is missing.
    """
    if method not in CONTRASTIVE_METHODS:
        raise ValueError(f"method must be one of {', '.join(CONTRASTIVE_METHODS)}, not {method!r}")
    try:
        from lightly import loss
        from lightly.models.modules import heads
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{method} needs lightly: pip install 'hyspark[views]' ({error})") from error
    size = (img_size,) * axes if isinstance(img_size, int) else tuple(img_size)
    encoder = PooledEncoder(backbone, size, in_channels, run)
    shape = (encoder.width, head_width, PROJECTION[method])
    together = num_processes > 1
    if method == "moco":
        bank = (queue_size, PROJECTION[method])
        criterion = loss.NTXentLoss(MOCO_TEMPERATURE, bank, gather_distributed=together)
        make_persistent(criterion.memory_bank)
        return MoCo(encoder, heads.MoCoProjectionHead(*shape, batch_norm=True), criterion)
    if method == "byol":
        predictor = heads.BYOLPredictionHead(PROJECTION[method], head_width, PROJECTION[method])
        return BYOL(encoder, heads.BYOLProjectionHead(*shape), loss.NegativeCosineSimilarity(), predictor)
    prototypes = heads.SwaVPrototypes(PROJECTION[method], num_prototypes)
    return SwAV(encoder, heads.SwaVProjectionHead(*shape), prototypes, loss.SwaVLoss(), together)


def make_persistent(bank: nn.Module) -> None:
    """Make the keys part of the state, so that a run continues with them; lightly leaves them out."""
    for name, buffer in list(bank.named_buffers()):
        bank.register_buffer(name, buffer, persistent=True)
