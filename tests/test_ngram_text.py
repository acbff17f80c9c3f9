"""The n-gram text encoder: the same numbers everywhere, similar words near each other."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvjax.models.stand_ins import NgramTextEncoder

TEXTS = ["open the drawer", "Close the door.", ""]
DIGEST = "69a9a07b3e11e46473a19f392bb35a2725f884a70d4bb611755aabd0af3b4a8a"


def digest(texts):
    return hashlib.sha256(NgramTextEncoder(8, 64).encode(texts).tobytes()).hexdigest()


def word(text):
    return NgramTextEncoder(1, 256).encode([text])[0, 0]


def cosine(a, b):
    a, b = word(a), word(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_numbers_are_recorded():
    """Records and checkpoints made on one machine are read on another."""
    assert digest(TEXTS) == DIGEST


def test_the_numbers_do_not_depend_on_the_process():
    program = "from test_ngram_text import TEXTS, digest; print(digest(TEXTS))"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == DIGEST


def test_zeros_past_the_end_and_cut_at_the_length():
    out = NgramTextEncoder(8, 64).encode(TEXTS)
    assert out.dtype == np.float32 and out.shape == (3, 8, 64)
    used = np.any(out != 0, axis=-1)
    np.testing.assert_array_equal(used.sum(axis=1), [3, 3, 0])
    assert used[:2, :3].all()
    short = NgramTextEncoder(2, 64).encode(TEXTS)
    np.testing.assert_array_equal(short, out[:, :2])


def test_a_text_does_not_depend_on_its_neighbours_case_or_punctuation():
    encoder = NgramTextEncoder(4, 64)
    alone, among = encoder.encode(["close the door"])[0], encoder.encode(TEXTS)[1]
    np.testing.assert_array_equal(alone, among)


def test_similar_words_are_nearer_than_different_ones():
    for close, far in (("drawers", "window"), ("draw", "button"), ("drawn", "faucet")):
        assert cosine("drawer", close) > cosine("drawer", far) + 0.2
    assert cosine("drawer", "drawer") == pytest.approx(1)
    assert abs(cosine("drawer", "pulley")) < 0.3


def test_entries_have_about_unit_size():
    """The network's text projection starts for inputs of order one."""
    assert 0.5 < np.std([word(w) for text in TEXTS for w in text.split()]) < 2


@pytest.mark.parametrize("dim", [0, 12, 520])
def test_impossible_widths_are_explained(dim):
    with pytest.raises(ValueError, match=f"multiple of 8 up to 512, got {dim}"):
        NgramTextEncoder(8, dim)
