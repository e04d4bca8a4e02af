"""Settings that an nnU-Net plan gives a pre-training: its defaults, and where the run's own differ.

A run keeps its plan as RUN/plans.json, and continues with that copy, wherever the original is by then.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hyspark.config.pretrain import PretrainConfig
from hyspark.data.intensity import OF_CT
from hyspark.models.defaults import nearest_multiple
from hyspark.models.nnunet_plans import (
    CT_SCHEME,
    IMAGE_SCHEME,
    OWN_SETTINGS,
    PLANS_KEY,
    SCHEMES,
    NnunetPlan,
    ct_settings,
    intensity_of_scheme,
    is_plan,
    parse_plan,
    read_plan,
    shorten,
    split_plan_name,
)
from hyspark.utils.atomic import write_whole
from hyspark.utils.text import short_text

PLAN_FILE = "plans.json"
"""Copy of the plan in a run folder, and beside exported weights."""
OF_INTENSITY = ("hu_min", "hu_max", "input_mean", "input_std")
"""Settings that depend on the intensity."""


def names_plan(model: object) -> bool:
    """Return whether METHOD/BACKBONE has an nnU-Net plan as its backbone."""
    return isinstance(model, str) and is_plan(model.partition("/")[2])


def find_plan(model: str, run_folder: Path, resume_from: str = "") -> NnunetPlan:
    """Read the plan of a run: its own copy if the run has begun, else the file that the model names.

    Args:
        model: METHOD/nnunet/PLANS.json:CONFIGURATION.
        run_folder: Run folder.
        resume_from: Checkpoint of another run, whose copy is read if the file is missing.

    Raises:
        FileNotFoundError, ValueError: As `read_plan`.
    """
    file, configuration = split_plan_name(model.partition("/")[2])
    copy, earlier = run_folder / PLAN_FILE, Path(resume_from).with_name(PLAN_FILE) if resume_from else None
    if copy.is_file() and any(run_folder.glob("*.pth")):
        file = copy
    elif earlier and earlier.is_file() and not file.is_file():
        file = earlier
    return read_plan(file, configuration)


def plan_state(config: PretrainConfig) -> dict[str, Any]:
    """Return the plan of a run by its key in checkpoints, from its copy; empty without a plan."""
    if not names_plan(config.model):
        return {}
    configuration = split_plan_name(config.model.partition("/")[2])[1]
    return {PLANS_KEY: read_plan(config.run_folder / PLAN_FILE, configuration).content}


def plan_in_file(contents: object, source: str) -> NnunetPlan | None:
    """Return the plan that a file of weights holds; None if it holds none.

    It is that of a pre-training here, of `hyspark export --nnunet` or `--hf`, or of nnU-Net's own training, whose
    networks of this package have none.

    Args:
        contents: Contents of the file, or of a folder as on the Hub.
        source: The file, for messages.

    Raises:
        ValueError: The plan is damaged, or of no network of volumes.
    """
    if not isinstance(contents, Mapping):
        return None
    parts = {name: x for name in ("config", OWN_SETTINGS, "init_args") if isinstance(x := contents.get(name), Mapping)}
    held = (contents, PLANS_KEY), (parts.get("config", {}), PLANS_KEY), (parts.get(OWN_SETTINGS, {}), "plan")
    for part, key in held:
        if (plan := part.get(key)) is not None:
            names = plan.get("configurations") if isinstance(plan, Mapping) else None
            return parse_plan(plan, str(next(iter(names), "")) if isinstance(names, Mapping) else "", source)
    trained = parts.get("init_args", {})
    plan = trained.get("plans")
    if isinstance(plan, Mapping) and OWN_SETTINGS not in plan:
        return parse_plan(plan, str(trained.get("configuration")), source)
    return None


def keep_plan(plan: NnunetPlan, run_folder: Path) -> None:
    """Write the copy of a run's plan."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_whole(run_folder / PLAN_FILE, plan.text().encode())


def plan_defaults(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the settings that the plan of a pre-training gives.

    Args:
        values: Settings by name; `model` and the run folder are read. Others are read if given.
        given: Names of the settings that the user has set.

    Returns:
        Settings that were not given; empty if the model names no plan.

    Raises:
        FileNotFoundError, ValueError: As `read_plan` and `settings_of_plan`.
    """
    if not names_plan(values.get("model")):
        return {}
    folder = Path(values.get("out") or f"ckpt/{values.get('exp_name') or PretrainConfig.exp_name}")
    plan = find_plan(values["model"], folder, values.get("resume_from", ""))
    known = {name: values[name] for name in ("image_channels", "intensity") if name in given}
    return {name: value for name, value in settings_of_plan(plan, known).items() if name not in given}


def settings_of_plan(plan: NnunetPlan, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a plan describes.

    Args:
        plan: The plan.
        known: image_channels and intensity, if they are given; what the plan says of the intensity is omitted where
            another one is given.

    Raises:
        ValueError: A channel is none of the plan's, or has a normalisation without a counterpart here.
    """
    channels = tuple(known.get("image_channels", range(len(plan.schemes))))
    if beyond := [channel for channel in channels if not 0 <= channel < len(plan.schemes)]:
        raise ValueError(
            f"image_channels: expected some of the plan's {len(plan.schemes)} channels, from 0, got {beyond}"
        )
    settings: dict[str, Any] = {
        "spacing": plan.spacing,
        "crop_size": nearest_multiple(plan.patch_size, plan.stride),
        "axis_order": plan.axis_order,
        "image_channels": channels,
    }
    if set(known.get("intensity", ())) - {intensity_of_plan(plan, channel) for channel in channels}:
        return settings
    return settings | intensity_settings(plan, channels)


def intensity_of_plan(plan: NnunetPlan, channel: int) -> str:
    """Return the intensity that stands for the normalisation of a channel; empty if there is none."""
    return intensity_of_scheme(plan.schemes[channel], plan.are_masked[channel])


def intensity_settings(plan: NnunetPlan, channels: Collection[int]) -> dict[str, Any]:
    """Return intensity and, with CT, window, mean and deviation; errors as for `settings_of_plan`."""
    schemes = [plan.schemes[channel] for channel in channels]
    if unknown := sorted(set(schemes) - set(SCHEMES)):
        raise ValueError(
            f"normalization_schemes: expected {', '.join(SCHEMES)}, got {', '.join(unknown)}, which has no counterpart "
            "here; choose an --intensity, and expect other features in nnU-Net"
        )
    intensity = shorten([intensity_of_plan(plan, channel) for channel in channels])
    return {"intensity": intensity} | window_settings(plan, channels)


def window_settings(plan: NnunetPlan, channels: Collection[int]) -> dict[str, Any]:
    """Return hu_min, hu_max, input_mean and input_std of channels; empty without CT.

    Raises:
        ValueError: The plan has no such numbers of a channel of CT.
    """
    schemes = [plan.schemes[channel] for channel in channels]
    if CT_SCHEME not in schemes:
        return {}
    known = [plan.intensities(channel) if plan.schemes[channel] == CT_SCHEME else {} for channel in channels]
    of_ct = [one for one, scheme in zip(known, schemes, strict=True) if scheme == CT_SCHEME]
    wanted = {"mean", "std", "percentile_00_5", "percentile_99_5"}
    if any(not wanted <= one.keys() for one in of_ct):
        raise ValueError(
            f"foreground_intensity_properties_per_channel: expected {', '.join(sorted(wanted))} of each channel of "
            f"{CT_SCHEME}; plan the data set again"
        )
    return ct_settings(known)


def differing_settings(plan: NnunetPlan, config: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a run that are others than its plan's, each with its value and the plan's."""
    known = {"intensity": config.intensity} if set(plan.schemes) - set(SCHEMES) else {}
    wanted = settings_of_plan(plan, known)  # of all its channels
    pairs = {name: (getattr(config, name), value) for name, value in wanted.items()}
    found = {name: pair for name, pair in pairs.items() if full(pair[0], config.axes) != full(pair[1], config.axes)}
    unread = OF_INTENSITY if "intensity" in found else ()
    return {name: pair for name, pair in found.items() if name not in unread}


def full(value: Any, axes: int) -> Any:
    """Return a setting of one value for all as one per axis; others are as they are."""
    return value * axes if isinstance(value, tuple) and len(value) == 1 else value


def warnings_of_plan(plan: NnunetPlan, config: PretrainConfig, *, by_nnunet: bool = False) -> list[str]:
    """Say what of a run is not as in its plan, or in nnU-Net's own preparation of data.

    Args:
        plan: The plan.
        config: Settings.
        by_nnunet: Whether nnU-Net has prepared the volumes, whose values are then its own.
    """
    lines = []
    file, configuration = split_plan_name(config.model.partition("/")[2])
    copy = config.run_folder / PLAN_FILE
    try:
        is_changed = read_plan(file, configuration).content != plan.content
    except (FileNotFoundError, ValueError) as error:
        lines.append(f"{error}; the run continues with its own copy, {copy}")
    else:
        if is_changed:
            lines.append(f"{file}: changed since the run began, which continues with its own copy, {copy}")
    if (rounded := nearest_multiple(plan.patch_size, plan.stride)) != plan.patch_size:
        lines.append(
            f"patch_size {short_text(plan.patch_size)} of the plan: no multiple of the total stride "
            f"{short_text(plan.stride)}; crop_size is {short_text(rounded)} by default"
        )
    for name, (own, planned) in differing_settings(plan, config).items():
        lines.append(f"--{name} {short_text(own)}: overrides {short_text(planned)} of the plan {plan.name}")
    if any(plan.schemes[i] == IMAGE_SCHEME and plan.are_masked[i] for i in range(len(plan.schemes))) and (
        "mr" in config.intensity and not by_nnunet
    ):
        lines.append(
            f"intensity mr: z-scores by the clipped foreground, and background is the lowest value; nnU-Net's "
            f"{IMAGE_SCHEME} with a mask is by nonzero voxels, and background is 0, so the network sees other values"
        )
    windows = {
        (one.get("percentile_00_5"), one.get("percentile_99_5"))
        for channel, scheme in enumerate(plan.schemes)
        if scheme == CT_SCHEME and (one := plan.intensities(channel))
    }
    if len(windows) > 1 and set(config.intensity) & set(OF_CT):
        lines.append(
            f"--hu_min {config.hu_min:g} --hu_max {config.hu_max:g}: one window for all channels of CT; nnU-Net clips "
            "each by its own percentiles"
        )
    return lines


def describe_plan(plan: NnunetPlan, config: PretrainConfig) -> str:
    """Describe a plan in one line, with the settings of a run that are the plan's."""
    differing = differing_settings(plan, config)
    names = settings_of_plan(plan, {"intensity": config.intensity, "image_channels": config.image_channels})
    same = [f"{name} {short_text(getattr(config, name))}" for name in names if name not in differing]
    return f"{plan.name}, {plan.configuration} of {plan.dataset}; from it: {', '.join(same) or 'no setting'}"
