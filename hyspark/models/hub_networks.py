"""Encoder and segmentation network with all that describes them, for the Hugging Face Hub.

Their arguments are plain numbers, texts and lists, named as the settings; config.json holds them. Key names of the
weights are the released ones.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from hyspark.models.defaults import DEPTHS, EXPANSIONS, WIDTHS
from hyspark.models.encoder import HybridEncoder
from hyspark.models.segmentation import Hybird, LightHybird, build_hybird, decode_light
from hyspark.models.weights.export import export_metadata
from hyspark.models.weights.hub_address import local_path
from hyspark.models.weights.load import load_pretrained
from hyspark.models.weights.model_folder import CONFIG, LIBRARY, read_own_config, settings_of, write_model

HubT = TypeVar("HubT", bound="HubNetwork")
HUB_TAGS = ("medical-imaging", "3d", "hyspark")
CARD_TEMPLATE = """---
{{ card_data }}
---

A network of hyspark. `config.json` holds what it is built with, and the preprocessing of its input.

```python
import hyspark

network = hyspark.{{ network }}.from_pretrained("OWNER/NAME")
print(network.preprocessing)
```
"""
"""Model card of `save_pretrained` where the folder has none, a template of Jinja."""


class HubNetwork(PyTorchModelHubMixin, library_name="hyspark", tags=[*HUB_TAGS], model_card_template=CARD_TEMPLATE):
    """Loading and saving of the networks in this module; `push_to_hub` is that of huggingface_hub.

    Attributes:
        preprocessing: settings that make a network's input of a volume, such as spacing and intensity.
    """

    preprocessing: dict[str, Any]

    def describe(self, **arguments: Any) -> None:
        """Keep the arguments of a network as the content of its config.json.

        Raises:
            TypeError: one is not of plain numbers, texts, lists and mappings.
        """
        config = {name: to_plain(value, name) for name, value in arguments.items()}
        self._hub_mixin_config = {**LIBRARY, "network": type(self).__name__, **config}

    @classmethod
    def from_pretrained(
        cls: type[HubT],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        map_location: str = "cpu",
        **changed: Any,
    ) -> HubT:
        """Build the network that a folder describes, with its weights, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, OWNER/NAME on the Hub, or hf://OWNER/NAME[@REVISION].
            revision: branch, tag or commit of the repository.
            token: token of the Hub; by default that of `hf auth login`.
            cache_dir: cache of downloads; by default that of huggingface_hub.
            force_download: whether to download what the cache holds.
            local_files_only: whether to take the cache alone.
            map_location: device of the network.
            **changed: arguments of the class in the stead of those in config.json.

        Raises:
            FileNotFoundError: there is no such folder, repository or revision.
            OSError: the download failed.
            TypeError: an argument is unknown.
            ValueError: config.json is damaged or of another network, or the weights do not fit it.
        """
        source = pretrained_model_name_or_path
        is_repository = not Path(source).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source))
        options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        options |= {"revision": revision, "local_files_only": local_files_only}
        folder = local_path(f"hf://{source}" if is_repository else source, **options)
        if not folder.is_dir():
            raise FileNotFoundError(f"{source}: expected a folder, OWNER/NAME or hf://OWNER/NAME, and no such folder")
        config = read_own_config(folder, cls.__name__)
        arguments = {name: value for name, value in config.items() if name not in (*LIBRARY, "network")}
        try:
            network = cls(**arguments | changed)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if changed:
                raise
            raise ValueError(f"{folder / CONFIG}: does not describe a hyspark.{cls.__name__} ({error})") from error
        assert isinstance(network, nn.Module)
        report = load_pretrained(network, folder)
        if report.missing or report.adapted:
            lost = [*report.missing, *report.adapted]
            raise ValueError(
                f"{folder}: its weights do not fit the network that {CONFIG} describes; "
                f"{len(lost)} tensors differ or are missing ({', '.join(lost[:3])}, ...)"
            )
        network.to(map_location).eval()
        return network

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Write the model card; called by `save_pretrained` where the folder has none."""
        return super().generate_model_card(*args, network=type(self).__name__, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors; called by `save_pretrained` and `push_to_hub`."""
        assert isinstance(self, nn.Module)
        config = self._hub_mixin_config
        assert isinstance(config, dict)
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        write_model(save_directory, state, config, export_metadata(settings_of(config)))


class Encoder(HybridEncoder, HubNetwork, pipeline_tag="image-feature-extraction"):
    """Hybrid encoder with the preprocessing that it was trained with.

    It computes five feature maps of a crop, see `HybridEncoder`.

    Args:
        in_channels: channels of a crop.
        crop_size: voxels per axis in training, one number or one per axis. Others work too.
        encoder_widths: channels of the five stages.
        encoder_depths: blocks of the stages.
        expansions: expansion ratios of the stages.
        vit_depth: blocks of the transformer.
        num_heads: attention heads of the transformer.
        decoder_width: channels of the light decoder whose weights lie beside the encoder's in the file; 0: none do. A
            network for fine-tuning takes them, this one does not.
        axes: number of spatial axes.
        preprocessing: settings of preparation, by name: spacing, intensity, hu_min, hu_max, ...

    Raises:
        TypeError: an argument is not of plain numbers, texts, lists and mappings.
        ValueError: sizes or widths do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 1,
        crop_size: int | Sequence[int] = 96,
        *,
        encoder_widths: Sequence[int] = WIDTHS,
        encoder_depths: Sequence[int] = DEPTHS,
        expansions: Sequence[int] = EXPANSIONS,
        vit_depth: int = 3,
        num_heads: int = 12,
        decoder_width: int = 0,
        axes: int = 3,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(in_channels, crop_size, encoder_widths, encoder_depths, expansions, vit_depth, num_heads, axes)
        self.preprocessing = to_plain(preprocessing or {}, "preprocessing")
        self.describe(
            in_channels=in_channels,
            crop_size=self.img_size,
            encoder_widths=encoder_widths,
            encoder_depths=encoder_depths,
            expansions=expansions,
            vit_depth=vit_depth,
            num_heads=num_heads,
            decoder_width=decoder_width,
            axes=axes,
            preprocessing=self.preprocessing,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the encoder alone, which is what it holds."""
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config["decoder_width"] = 0
        super()._save_pretrained(save_directory)


class Segmenter(Hybird, HubNetwork, pipeline_tag="image-segmentation"):
    """Segmentation network with its classes and the preprocessing that it was trained with.

    Volumes (b, in_channels, *size) -> class scores (b, classes, *size), each axis a multiple of 16.

    Args:
        classes: names of the classes, background first.
        in_channels: channels of a crop.
        crop_size: voxels per axis in training, one number or one per axis.
        encoder_widths: channels of the encoder's five stages.
        encoder_depths: blocks of the stages.
        expansions: expansion ratios of the stages.
        vit_depth: blocks of the transformer.
        num_heads: attention heads of the transformer.
        decoder: "released" or "light", see `build_hybird`.
        decoder_width: channels of the light decoder's deepest level.
        decoder_min_width: minimum input channels of the light decoder's levels.
        preprocessing: settings of preparation, by name: spacing, intensity, hu_min, hu_max, ...
        prediction: settings of prediction, by name: infer_overlap, sw_batch_size, left_right, ...

    Raises:
        TypeError: an argument is not of plain numbers, texts, lists and mappings.
        ValueError: sizes or widths do not fit together.
    """

    def __init__(
        self,
        classes: Sequence[str],
        in_channels: int = 1,
        crop_size: int | Sequence[int] = 96,
        *,
        encoder_widths: Sequence[int] = WIDTHS,
        encoder_depths: Sequence[int] = DEPTHS,
        expansions: Sequence[int] = EXPANSIONS,
        vit_depth: int = 3,
        num_heads: int = 12,
        decoder: str = "released",
        decoder_width: int = 768,
        decoder_min_width: int = 0,
        preprocessing: Mapping[str, Any] | None = None,
        prediction: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes: expected a list of names, background first, got {classes!r}")
        built = build_hybird(
            in_channels,
            len(classes),
            crop_size,
            widths=encoder_widths,
            depths=encoder_depths,
            expansions=expansions,
            vit_depth=vit_depth,
            num_heads=num_heads,
            decoder=decoder,
            decoder_width=decoder_width,
            decoder_min_width=decoder_min_width,
        )
        super().__init__(built)
        self.reinitialised = built.reinitialised
        self.is_light = isinstance(built, LightHybird)
        if isinstance(built, LightHybird):
            self.densify = built.densify
        self.decoder = built.get_submodule("decoder")
        self.classes = list(classes)
        self.preprocessing = to_plain(preprocessing or {}, "preprocessing")
        self.prediction = to_plain(prediction or {}, "prediction")
        self.describe(
            classes=classes,
            in_channels=in_channels,
            crop_size=self.img_size,
            encoder_widths=encoder_widths,
            encoder_depths=encoder_depths,
            expansions=expansions,
            vit_depth=vit_depth,
            num_heads=num_heads,
            decoder=decoder,
            decoder_width=decoder_width,
            decoder_min_width=decoder_min_width,
            preprocessing=self.preprocessing,
            prediction=self.prediction,
        )

    def decode(self, features: list[Tensor]) -> Tensor:
        if self.is_light:
            return decode_light(self.densify, self.decoder, features)
        out: Tensor = self.decoder(features)
        return out


def to_plain(value: Any, name: str) -> Any:
    """Convert nested values to those of JSON: tuples to lists, numbers of NumPy to Python's.

    Raises:
        TypeError: a value is of another type.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{name}: {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: expected plain numbers, texts, lists and mappings, got {type(value).__name__}")
