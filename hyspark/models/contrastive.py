"""Pre-training by comparing views of one image: MoCo v2, BYOL and SwAV around any network.

The methods' heads and losses are lightly's. Two things differ from MoCo's paper:

- Keys are computed with statistics of earlier batches, not of their own. So they carry no trace of their batch, without
  shuffling between GPUs, which needs more than one.
- The head has BatchNorm, as in v3 (Chen et al., ICCV 2021). 2D slices of CTs are so alike that projections otherwise
  have one common direction, and its drift reveals the age of a key.

Shapes: b batch, c channels, f features of a projection, *size voxels per axis.
Sources: Chen et al., "Improved baselines with momentum contrastive learning", 2020; Grill et al., "Bootstrap your own
latent", NeurIPS 2020; Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments",
NeurIPS 2020.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyspark.models.defaults import CONTRASTIVE_METHODS
from hyspark.models.feature_maps import record_outputs, uses_only_itself
from hyspark.models.spark import PyramidEncoder
from hyspark.utils.install import extra_error

PROJECTION = {"moco": 128, "byol": 256, "swav": 128}
"""Features of a projection, as published."""
MOCO_TEMPERATURE = 0.2


@dataclass
class SiameseOutput:
    """Output of one forward pass.

    Attributes:
        loss: scalar.
        projections: (b, f) of the first views, of unit length; nearly equal for all images if the network has
            collapsed.
    """

    loss: Tensor
    projections: Tensor


class PooledEncoder(nn.Module):
    """Network up to its coarsest map, averaged over positions: (b, in_channels, *size) -> (b, width).

    Arguments and errors as for `PyramidEncoder`.
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
        self.crop_shape = (in_channels, *img_size)

    def forward(self, images: Tensor) -> Tensor:
        with record_outputs(self.backbone, [self.tap]) as seen:
            self.run(self.backbone, images)
        return seen[self.tap].flatten(2).mean(-1)

    def check_copies(self) -> None:
        """Raise ValueError if a copy of the network computes with the network's own weights."""
        crop = next(self.parameters()).new_zeros(1, *self.crop_shape)
        if not uses_only_itself(self.backbone, self.run, self.tap, crop):
            raise ValueError(
                f"{type(self.backbone).__name__}: a copy of it computes with the original's weights, so it can have no "
                "momentum encoder; define what it runs as a method, or return hyspark.Backbone(network, run) from the "
                "factory, with a run(network, x) that uses its own argument"
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to export: the network's own, by its own key names."""
        return self.backbone.state_dict()


class MomentumEncoder(nn.Module):
    """Momentum encoder, or target network: (b, in_channels, *size) -> (b, f), without gradients.

    Its weights are exponential moving averages of the network's. Its batch statistics are its own: those of the network
    do not fit weights that lag behind.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.module(images).float()
        return out

    def encode_keys(self, images: Tensor) -> Tensor:
        """Encode images by statistics of earlier batches, so that no key depends on the rest of its batch.

        In training the running statistics are updated afterwards. The first batch sets them: the initial ones of a norm
        fit no data.
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
    def update(self, network: nn.Module, momentum: float) -> None:
        """Move the weights towards the network's: momentum 1 changes nothing, 0 copies them, statistics included."""
        if momentum == 0:
            self.module.load_state_dict(network.state_dict())
        for own, other in zip(self.module.parameters(), network.parameters(), strict=True):
            own.lerp_(other, 1 - momentum)


class Siamese(nn.Module):
    """Base of the methods: views in, loss out."""

    def __init__(self, encoder: PooledEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def encoder_layers(self) -> dict[str, int | None]:
        """Return None for each parameter of the encoder and its copies: layers of a third-party network are unknown."""
        encoders = [f"{name}." for name, module in self.named_modules() if isinstance(module, PooledEncoder)]
        return {name: None for name, _ in self.named_parameters() if name.startswith(tuple(encoders))}

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        """Compute the loss of views, (b, in_channels, *size) each; the i-th sample of each is of the same image."""
        raise NotImplementedError

    def prepare_step(self, momentum: float) -> None:
        """Update weights that are not trained by gradients; called before each step."""


class MomentumSiamese(Siamese):
    """Base of the methods whose targets are projections by a momentum encoder."""

    def __init__(self, encoder: PooledEncoder, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__(encoder)
        self.project = head
        self.teacher = MomentumEncoder(nn.Sequential(encoder, head))  # its name is part of checkpoints' keys
        self.criterion = criterion

    def prepare_step(self, momentum: float) -> None:
        self.teacher.update(nn.Sequential(self.encoder, self.project), momentum)


class MoCo(MomentumSiamese):
    """MoCo v2: the projection of the first view is to match the key of the second, not keys of earlier images."""

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        query = self.project(self.encoder(views[0])).float()
        return SiameseOutput(self.criterion(query, self.teacher.encode_keys(views[1])), unit_length(query))


class BYOL(MomentumSiamese):
    """BYOL: from each view the momentum encoder's projection of the other view is predicted."""

    def __init__(self, encoder: PooledEncoder, head: nn.Module, criterion: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder, head, criterion)
        self.predict = predictor

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        found = [self.project(self.encoder(view)) for view in views[:2]]
        wanted = [self.teacher(view) for view in views[:2]]
        losses = [self.criterion(self.predict(a).float(), b) for a, b in zip(found, reversed(wanted), strict=True)]
        return SiameseOutput((losses[0] + losses[1]) / 2, unit_length(found[0]))


class SwAV(Siamese):
    """SwAV: from each view the cluster assignment of the other large view of its image is predicted."""

    def __init__(
        self, encoder: PooledEncoder, head: nn.Module, prototypes: nn.Module, criterion: nn.Module, is_distributed: bool
    ) -> None:
        super().__init__(encoder)
        self.is_distributed = is_distributed
        self.project = head
        self.prototypes: Any = prototypes
        self.criterion: Any = criterion

    def forward(self, views: Sequence[Tensor]) -> SiameseOutput:
        projections = [unit_length(self.project(self.encoder(view))) for view in views]
        scores = [self.prototypes(x).float() for x in projections]
        return SiameseOutput(self.criterion(scores[:2], scores[2:]).sum(), projections[0])  # sum of a single value

    def train(self, mode: bool = True) -> "SwAV":
        """Set the mode; outside training each process assigns only its own images, since it may run alone."""
        self.criterion.sinkhorn_gather_distributed = mode and self.is_distributed
        return super().train(mode)

    def prepare_step(self, momentum: float) -> None:
        """Normalise the prototypes to unit length."""
        self.prototypes.normalize()


def unit_length(x: Tensor) -> Tensor:
    """Scale vectors (b, f) to unit length."""
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
    """Build the pre-training network of a method around any backbone.

    Args:
        method: "moco", "byol" or "swav".
        backbone: the network.
        img_size: voxels per axis of a large view, one number or one per axis.
        in_channels: channels of a view.
        axes: number of spatial axes.
        head_width: hidden features of the heads.
        queue_size: number of keys in MoCo's queue, a multiple of the global batch.
        num_prototypes: number of SwAV's clusters.
        num_processes: number of processes; above 1, queue and clusters are those of the global batch.
        run: run(backbone, x) computes the maps, see `PyramidEncoder`.

    Raises:
        ValueError: the method is unknown.
        ModuleNotFoundError: lightly is not installed.
    """
    if method not in CONTRASTIVE_METHODS:
        raise ValueError(f"method: expected one of {', '.join(CONTRASTIVE_METHODS)}, got {method!r}")
    try:
        from lightly import loss
        from lightly.models.modules import heads
    except ImportError as error:
        raise extra_error(error, f"{method} needs lightly", "views", "lightly") from error
    size = (img_size,) * axes if isinstance(img_size, int) else tuple(img_size)
    encoder = PooledEncoder(backbone, size, in_channels, run)
    shape = (encoder.width, head_width, PROJECTION[method])
    is_distributed = num_processes > 1
    if method != "swav":
        encoder.check_copies()
    if method == "moco":
        bank = (queue_size, PROJECTION[method])
        criterion = loss.NTXentLoss(MOCO_TEMPERATURE, bank, gather_distributed=is_distributed)
        make_persistent(criterion.memory_bank)
        return MoCo(encoder, heads.MoCoProjectionHead(*shape, batch_norm=True), criterion)
    if method == "byol":
        predictor = heads.BYOLPredictionHead(PROJECTION[method], head_width, PROJECTION[method])
        return BYOL(encoder, heads.BYOLProjectionHead(*shape), loss.NegativeCosineSimilarity(), predictor)
    prototypes = heads.SwaVPrototypes(PROJECTION[method], num_prototypes)
    return SwAV(encoder, heads.SwaVProjectionHead(*shape), prototypes, loss.SwaVLoss(), is_distributed)


def make_persistent(bank: nn.Module) -> None:
    """Make the queue part of the state, so that a resumed run continues with it; lightly excludes it."""
    for name, buffer in list(bank.named_buffers()):
        bank.register_buffer(name, buffer, persistent=True)
