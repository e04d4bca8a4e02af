"""Names of backbones: what is listed can be built, and computes masked."""

import re
from fnmatch import fnmatchcase

import pytest
import timm
import torch

from hyspark.models.backbones import MONAI_BACKBONES, TIMM_FAMILIES, build_backbone, list_backbones
from hyspark.models.defaults import grid_of
from hyspark.models.masking.mask import visible_at
from hyspark.models.spark import PyramidEncoder
from hyspark.models.spark_checks import packed_fault


def smallest(family):
    """The network of a family of timm with the fewest parameters, among the listed ones."""

    def size(name):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name.removeprefix("timm/")).parameters())

    listed = set(list_backbones("timm/*"))
    return min((f"timm/{name}" for name in timm.list_models(module=family) if f"timm/{name}" in listed), key=size)


def check_masked(name, size):
    """A forward pass under a mask, in which the values of hidden voxels change nothing; packed gives the same maps."""
    axes = 3 if name.startswith("monai/") else 2
    backbone = build_backbone(name, 3, axes)
    encoder = PyramidEncoder(backbone.network, (size,) * axes, 3, run=backbone.run, compute="masked").eval()
    images = torch.randn(1, 3, *(size,) * axes)
    visible = torch.zeros(1, 1, *grid_of(encoder.img_size, encoder.patch), dtype=torch.bool)
    visible.view(-1)[::2] = True
    changed = images.where(visible_at(visible, images.shape[2:]), torch.full_like(images, 1e3))
    with torch.no_grad():
        maps, others = encoder(images, visible), encoder(changed, visible)
    assert all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))
    assert not packed_fault(encoder)


def test_a_pattern_may_have_the_library_or_not():
    everywhere = list_backbones("resnet50")
    assert everywhere == ["timm/resnet50", "torchvision/resnet50", "monai/resnet50"]
    assert list_backbones("timm/resnet50") == ["timm/resnet50"]
    assert set(list_backbones("resnet*")) > set(list_backbones("timm/resnet*")) > {"timm/resnet18", "timm/resnet50"}
    assert list_backbones("monai/*") == [f"monai/{name}" for name in MONAI_BACKBONES]
    assert list_backbones("nosuchnet*") == []


def test_all_names_are_of_their_libraries_and_without_attention():
    names = list_backbones()
    assert len(set(names)) == len(names) > 500
    assert {name.split("/")[0] for name in names} == {"timm", "torchvision", "monai"}
    assert not [n for n in names if any(fnmatchcase(n, p) for p in ("*/vit_*", "*/swin*", "*/deit*", "*hybrid*"))]
    for tested in ("timm/convnextv2_tiny", "timm/efficientnet_b0", "torchvision/convnext_tiny", "monai/dynunet"):
        assert tested in names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/ResNet-50", "did you mean timm/resnet50?; `timm.list_models()` lists all"),
        ("timm/vit_tiny", "did you mean timm/vit_tiny_patch16_"),
        ("torchvision/ResNet50", "did you mean torchvision/resnet50?; `torchvision.models.list_models(torchvision."),
        ("monai/swin_unetr", f"expected one of {', '.join(MONAI_BACKBONES)}; for another network give a function"),
    ],
)
def test_an_unknown_name_is_answered_by_names_that_are_known(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_backbone(name, 3, 2)


def test_a_size_is_read_by_networks_that_are_built_for_one():
    assert build_backbone("timm/test_vit", 1, 2, (32, 48)).network.patch_embed.grid_size == (2, 3)
    assert build_backbone("timm/test_resnet", 1, 2, (32, 48)).network.num_features


def test_every_family_of_timm_exists():
    assert set(TIMM_FAMILIES) <= set(timm.list_modules())


@pytest.mark.parametrize("name", ["timm/rexnet_100", "timm/starnet_s1", "torchvision/mnasnet0_5", "monai/segresnet"])
def test_some_listed_backbones_compute_masked(name):
    check_masked(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMM_FAMILIES)
def test_the_smallest_of_each_family_of_timm_computes_masked(family):
    check_masked(smallest(family), 256 if family == "selecsls" else 224)  # its total stride is 64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", list_backbones("torchvision/*"))
def test_every_listed_backbone_of_torchvision_computes_masked(name):
    check_masked(name, 224)
