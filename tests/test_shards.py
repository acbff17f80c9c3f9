"""The text embeddings of records: made again alone, or taken from the dataset."""

import numpy as np
import pytest
from encode_toys import IDENTITY, OtherTextEncoder, TextEncoder, assert_same, encode, episode

from data_pipelines.records import RecordDataset
from data_pipelines.shards import StoredTexts, encode_texts


def test_texts_alone_are_made_again(tmp_path):
    episodes, other = [episode(i) for i in range(5)], {**IDENTITY, "text_encoder": "other"}
    before = encode(episodes, tmp_path)
    texts_before = [before.text(i) for i in range(len(before.instructions))]
    bytes_before = {path: path.read_bytes() for path in tmp_path.glob("shard_*")}
    with pytest.raises(ValueError, match=r"identity.*toy.*other.*--only=text"):
        encode(episodes, tmp_path, identity=other)
    after = encode_texts(tmp_path, OtherTextEncoder(), "other")
    assert after.fingerprint != before.fingerprint and after.settings["identity"] == other
    for index, text in enumerate(texts_before):
        np.testing.assert_array_equal(after.text(index), 2 * text)
    assert bytes_before == {path: path.read_bytes() for path in tmp_path.glob("shard_*")}
    assert_same(after, encode(episodes, tmp_path, identity=other))
    assert_same(after, encode_texts(tmp_path, None, "other"))  # nothing is left to do
    # The same as encoding everything with it.
    whole = encode(episodes, tmp_path / "whole", text_encoder=OtherTextEncoder(), identity=other)
    assert whole.fingerprint == after.fingerprint


def test_texts_killed_on_the_way_are_finished_by_either_command(tmp_path):
    class Killed(TextEncoder):
        def encode(self, texts):
            raise KeyboardInterrupt

    episodes, other = [episode(i) for i in range(3)], {**IDENTITY, "text_encoder": "other"}
    for name, finish in (
        ("a", lambda path: encode_texts(path, OtherTextEncoder(), "other")),
        (
            "b",
            lambda path: encode(episodes, path, text_encoder=OtherTextEncoder(), identity=other),
        ),
    ):
        path = tmp_path / name
        encode(episodes, path)
        with pytest.raises(KeyboardInterrupt):
            encode_texts(path, Killed(), "other")
        with pytest.raises(FileNotFoundError, match="is not finished"):
            RecordDataset(path)
        assert finish(path).settings["identity"] == other
    with pytest.raises(ValueError, match="is not finished; encode without --only"):
        encode_texts(tmp_path / "nothing", TextEncoder(), "other")


def test_embeddings_that_the_dataset_stores(tmp_path):
    rng, texts = np.random.default_rng(0), [f"task {i}" for i in range(3)]
    stored = {text: rng.normal(size=(2 + i, 4)).astype(np.float16) for i, text in enumerate(texts)}

    def with_embedding(i):
        text = texts[i % 3]
        return episode(i, instructions=(text,), embeddings={text: stored[text]})

    encoder = StoredTexts(length=8, dim=4)
    episodes = [with_embedding(i) for i in range(6)]
    options = dict(text_encoder=encoder, identity={**IDENTITY, "text_encoder": encoder.identity})
    dataset = encode(episodes, tmp_path / "a", **options)
    assert dataset.instructions == texts
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(dataset.text(i)[: 2 + i], stored[text].astype(np.float32))
        assert not dataset.text(i)[2 + i :].any()
    # The same from records that were made with an encoder.
    encode(episodes, tmp_path / "b")
    assert_same(dataset, encode_texts(tmp_path / "b", encoder, encoder.identity, episodes))
    # An episode without is bad, and named.
    lacking = [*episodes, episode(7)]
    dataset = encode(lacking, tmp_path / "c", max_bad_share=0.2, **options)
    assert dataset.skipped[0]["id"] == "episode 7" and len(dataset.instructions) == 3
    assert "stores no embedding of its instruction 'task x'" in dataset.skipped[0]["reason"]
    with pytest.raises(ValueError, match=r"shape \[2, 4\], but config.text has length 1"):
        StoredTexts(1, 4).embedding(episodes[0], texts[0])
