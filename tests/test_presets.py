"""The named sizes have the parameters of the released networks, to the last one."""

import dataclasses

import pytest

from mvjax.models import presets
from mvjax.models.action_decoder import ActionDecoder
from mvjax.models.lora import LoRA
from mvjax.models.network import Network
from mvjax.models.video_dit import VideoDiT


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("cosmos2b", 1_956_413_440),
        ("cosmos14b", 14_265_285_632),
        ("cosmos25_2b", 2_059_174_912),
        ("cosmos25_14b", 14_265_285_632 + 100_353 * 1024),
    ],
)
def test_video_dit_parameter_counts(preset, count):
    config = presets.VIDEO_DITS[preset]
    assert Network(lambda key: VideoDiT(config, key)).num_parameters == count


@pytest.mark.parametrize(("preset", "count"), [("bridge", 498_990_730), ("libero", 499_036_810)])
def test_action_decoder_parameter_counts(preset, count):
    config = presets.ACTION_DECODERS[preset]
    assert Network(lambda key: ActionDecoder(config, key)).num_parameters == count


def test_published_lora_parameter_count():
    lora = LoRA(rank=256, alpha=32, targets=presets.PUBLISHED_LORA_TARGETS)
    config = dataclasses.replace(presets.VIDEO_DITS["cosmos2b"], lora=lora)
    adapted = Network(lambda key: VideoDiT(config, key)).num_parameters
    assert adapted - 1_956_413_440 == 370_690_048
