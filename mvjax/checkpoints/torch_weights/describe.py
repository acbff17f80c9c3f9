"""What a conversion will do, in words for the person who asked for it."""

from collections import Counter
from pathlib import Path

from mvjax.checkpoints.torch_weights.convert import Conversion
from mvjax.checkpoints.torch_weights.export import Export
from mvjax.checkpoints.torch_weights.kind import Config
from mvjax.checkpoints.torch_weights.match import collapse
from mvjax.checkpoints.torch_weights.tensors import Tensors

SHOWN = 8  # names of dropped entries
# Sections that a training run has; what is left describes its network.
_OF_A_RUN = {"recording", "evaluation", "study", "datasets", "sampler", "mesh", "rules"}
_OF_A_RUN |= {"optimizer", "training", "flow", "backbone"}


def describe_conversion(conversion: Conversion, destination: Path) -> str:
    """What is read and what is written."""
    source = conversion.source
    lines = [
        f"{source.path}: {source.kind.title} ({source.layout} names), "
        f"{conversion.num_parameters:,} parameters, {_tensors(source.tensors)}",
        *_settings(conversion.config),
        f"into {destination}: {conversion.nbytes / 1e9:.2f} GB",
    ]
    if source.dropped:
        names = collapse(source.dropped)
        more = f" and {len(names) - SHOWN} other names" if len(names) > SHOWN else ""
        lines.insert(2, f"not converted: {', '.join(names[:SHOWN])}{more}")
    return "\n".join(lines)


def describe_export(export: Export, source: Path, destination: Path) -> str:
    """What is read and what is written."""
    size = sum(tensor.nbytes for tensor in export.tensors.values())
    form = "folder" if export.folder else "file"
    return "\n".join(
        [
            f"{source}: {export.kind.title}",
            *_settings(export.config),
            f"into the {form} {destination} ({export.layout} names): {_tensors(export.tensors)}, "
            f"{size / 1e9:.2f} GB",
        ]
    )


def _tensors(tensors: Tensors) -> str:
    kinds = Counter(str(tensor.dtype) for tensor in tensors.values())
    return f"{len(tensors)} tensors ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"


def _settings(config: Config) -> list[str]:
    return [
        f"{section}: {', '.join(f'{name}={value}' for name, value in settings.items())}"
        for section, settings in config.items()
        if section != "lora" or settings["rank"]
        if isinstance(settings, dict) and section not in _OF_A_RUN
    ]
