"""Read the settings of a training from the checkpoints of nnU-Net (v1 and v2) and nnssl.

Their arrays are (z, y, x), turned by a permutation of the plans (`transpose_forward`); spacings and patches of a
configuration are in the turned order. The settings here are in the order of this package, x y z.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hyspark.models.nnunet_plans import (
    CT_SCHEME,
    IMAGE_SCHEME,
    OWN_SETTINGS,
    ct_settings,
    intensity_of_scheme,
    resolve_configuration,
    to_volume_axes,
)
from hyspark.models.weights.objects import load_pickle

EARLIER_SCHEMES = {"CT": CT_SCHEME, "CT2": CT_SCHEME, "nonCT": IMAGE_SCHEME}
"""Names of nnU-Net v1, with the present ones."""
ALIAS = "another name of a tensor that is loaded"
"""Reason to ignore a key whose tensor has several: nnU-Net's decoders refer to their encoders."""
HU_WINDOWS = "hu_windows"
"""Key of the window of HU of each channel, where those of CT differ; None for a channel that is not CT."""
VOLUME_AXES = (0, 1, 2)
"""Axes x, y, z of a volume."""
PLANS_UNKNOWN = (AttributeError, KeyError, IndexError, RecursionError, TypeError, ValueError)
"""Errors of reading plans of another form."""
STAGE_ARGUMENT = 5
"""Position of the stage among the arguments of a trainer of nnU-Net v1."""


def nnunet_settings(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint of nnU-Net or nnssl names; empty for contents of other programs.

    Returns:
        Those of these that it names: `spacing` in mm and `crop_size` in x y z order; `intensity`, which is a name of
        nnU-Net where this package has no equal; for CT `hu_min`, `hu_max`, `input_mean`, `input_std`, and
        HU_WINDOWS where channels differ, of which `hu_min` and `hu_max` are the widest; `axis_order`,
        the axis of x, y, z (0, 1, 2) that is each axis of the network.
    """
    try:
        if isinstance(exported := contents.get(OWN_SETTINGS), Mapping):  # the file of `hyspark export --nnunet`
            return dict(exported["made_with"])
        plans, configuration = find_plans(contents)
        if isinstance(own := plans.get(OWN_SETTINGS), Mapping):
            return dict(own)
        return plan_settings(plans, configuration) if configuration else {}
    except PLANS_UNKNOWN:
        return {}


def find_plans(contents: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Find the plans in the contents of a checkpoint, and the configuration that was trained; empty if it has none."""
    arguments = contents.get("init_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    if isinstance(adaptation := contents.get("nnssl_adaptation_plan"), Mapping):
        plans = adaptation["pretrain_plan"]
        name = arguments.get("configuration_name", arguments.get("configuration"))
        known = plans["configurations"]
        return plans, known[name] if name in known else only_value(known)
    if isinstance(plans := arguments.get("plans"), Mapping):
        return plans, resolve_configuration(plans["configurations"], arguments["configuration"], "plans")
    if isinstance(plans := contents.get("plans"), Mapping) and "plans_per_stage" in plans:
        stages, given = plans["plans_per_stage"], contents.get("init", ())
        stage = given[STAGE_ARGUMENT] if len(given) > STAGE_ARGUMENT else None
        return plans, stages[stage] if stage in stages else only_value(stages)
    return {}, {}


def only_value(items: Mapping[Any, Any]) -> Mapping[str, Any]:
    """Return the value of a mapping with one item; an empty mapping for others."""
    return next(iter(items.values())) if len(items) == 1 else {}


def plan_settings(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Convert plans and one of their configurations to settings, see `nnunet_settings`."""
    found: dict[str, Any] = {}
    spacing = configuration.get("spacing", configuration.get("current_spacing"))
    patch = configuration.get("patch_size")
    # transpose_forward names, for each axis of the network, that of the array z, y, x which is read from a file.
    order = tuple(2 - int(axis) for axis in plain_numbers(plans.get("transpose_forward", VOLUME_AXES)))
    if sorted(order) != list(VOLUME_AXES):
        return intensity_of_plans(plans, configuration)
    found["axis_order"] = order
    for name, values, kind in (("spacing", spacing, float), ("crop_size", patch, int)):
        if values is not None and len(values) == len(order):
            found[name] = tuple(map(kind, to_volume_axes(plain_numbers(values), order)))
    return found | intensity_of_plans(plans, configuration)


def intensity_of_plans(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the normalisation of each channel to settings; see `nnunet_settings`."""
    schemes = configuration.get("normalization_schemes", plans.get("normalization_schemes", ()))
    schemes = [str(scheme) for scheme in (schemes.values() if isinstance(schemes, Mapping) else schemes)]
    if not schemes:
        return {}
    schemes = [EARLIER_SCHEMES.get(scheme, scheme) for scheme in schemes]
    masked = configuration.get("use_mask_for_norm", plans.get("use_mask_per_channel", ()))
    masked = [bool(one) for one in (masked.values() if isinstance(masked, Mapping) else masked)]
    masked = masked if len(masked) == len(schemes) else [False] * len(schemes)
    names = [intensity_of_scheme(scheme, one) or scheme for scheme, one in zip(schemes, masked, strict=True)]
    found: dict[str, Any] = {"intensity": tuple(names), "image_channels": tuple(range(len(names)))}
    dataset = plans.get("dataset_properties")
    values = plans.get("foreground_intensity_properties_per_channel")
    values = values or (dataset.get("intensityproperties") if isinstance(dataset, Mapping) else None) or {}
    given: list[Any] = [
        values.get(str(i), values.get(i)) if name == "ct-zscore" else {} for i, name in enumerate(names)
    ]
    if "ct-zscore" in names and all(isinstance(one, Mapping) for one in given):
        known = [present_names(one) for one in given]
        found |= ct_settings(known)
        windows = tuple((one["percentile_00_5"], one["percentile_99_5"]) if one else None for one in known)
        if len({window for window in windows if window}) > 1:
            found[HU_WINDOWS] = windows
    return found


def present_names(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the statistics of a channel by nnU-Net v2's names, of which v1 had `sd` for `std`; empty for none."""
    if not values:
        return {}
    names = {name: name for name in ("mean", "percentile_00_5", "percentile_99_5")}
    names["std"] = "sd" if "sd" in values else "std"
    return {name: float(values[given]) for name, given in names.items()}


def plain_numbers(values: Any) -> list[float]:
    """Return the numbers of a list, an array or a tensor."""
    return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def settings_beside_model(path: Path) -> dict[str, Any]:
    """Return the settings in the `.model.pkl` that nnU-Net v1 writes beside its weights; empty if there is none."""
    beside = path.with_name(f"{path.name}.pkl")
    if path.suffix != ".model" or not beside.is_file():
        return {}
    try:
        contents = load_pickle(beside)
    except (pickle.UnpicklingError, EOFError):
        return {}
    return nnunet_settings(contents) if isinstance(contents, Mapping) else {}


def check_no_plans(contents: object, name: str) -> None:
    """Raise ValueError if the contents of a file are the plans of nnU-Net v1, which hold no weights."""
    if not isinstance(contents, Mapping) or "state_dict" in contents:
        return
    plans = contents.get("plans", contents)
    if isinstance(plans, Mapping) and "plans_per_stage" in plans:
        shown = name.removesuffix(".pkl") if name.endswith(".model.pkl") else "the .model file"
        raise ValueError(
            f"{name}: no weights, but the plans of nnU-Net v1; give the weights that they belong to: {shown}"
        )


def split_decoder(contents: object, tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Split off what nnssl does not transfer to another network: all but the stem, the encoder and the positions.

    Returns:
        The tensors that are transferred; the reason by the key of each of the others.
    """
    plan = contents.get("nnssl_adaptation_plan") if isinstance(contents, Mapping) else None
    if not isinstance(plan, Mapping):
        return tensors, {}
    kept = tuple(str(plan[key]) for key in ("key_to_encoder", "key_to_stem", "key_to_lpe") if plan.get(key))
    used = {key: value for key, value in tensors.items() if key.startswith(kept)}
    if not used:
        return tensors, {}
    addresses = {value.data_ptr() for value in used.values()}
    return used, {
        key: ALIAS if value.data_ptr() in addresses else "decoder of pre-training"
        for key, value in tensors.items()
        if key not in used
    }
