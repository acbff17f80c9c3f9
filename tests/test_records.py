"""The record codec, atomic writing, and choosing records."""

import json

import ml_dtypes
import numpy as np
import pytest

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.records import (
    RecordDataset,
    RecordWriter,
    decode_record,
    encode_record,
    write_texts,
)

RNG = np.random.default_rng(0)


def _folder(path, episodes, texts=("push", "pull")):
    """A records folder with the given (id, task, windows, split) episodes, two per shard."""
    rows, shards, first = [], [], 0
    for start in range(0, len(episodes), 2):
        shard = path / f"shard_{start:05d}.arrayrecord"
        shards.append(shard.name)
        columns = {"actions": [], "anchor": []}
        with RecordWriter(shard) as writer:
            for i, (name, task, count, split) in enumerate(episodes[start : start + 2], start):
                rows.append(
                    dict(id=name, instructions=[task], first=first, count=count, split=split)
                )
                for k in range(count):
                    numbers = {
                        "actions": np.full((2, 3), first + k, np.float32),
                        "anchor": np.int64(k),
                    }
                    for key, value in numbers.items():
                        columns[key].append(value)
                    latents = np.full((2, 2, 2, 4), i, ml_dtypes.bfloat16)
                    writer.write(
                        {"latents": latents, "episode": np.int64(i), "text": np.int64(0)} | numbers
                    )
                first += count
        write_npz(shard.with_suffix(".npz"), **{k: np.stack(v) for k, v in columns.items()})
    embeddings = RNG.normal(size=(len(texts), 6, 5)).astype(np.float32)
    embeddings[0, 4:] = 0
    write_texts(path / "texts.npz", texts, embeddings)
    settings = {"dataset": {"name": "toy"}}
    manifest = dict(settings=settings, fingerprint="f", shards=shards, skipped=[], episodes=rows)
    write_json(path / "manifest.json", manifest)
    return embeddings


def test_codec_round_trips_every_numeric_type():
    arrays = {
        "latents": RNG.normal(size=(4, 8, 8, 16)).astype(ml_dtypes.bfloat16),
        "actions": RNG.normal(size=(16, 4)).astype(np.float32),
        "odd": np.arange(5, dtype=np.uint8),
        "flag": np.array([True, False, True]),
        "scalar": np.int64(-7),
        "empty": np.zeros((0, 3), np.float64),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
    }
    decoded = decode_record(encode_record(arrays))
    assert list(decoded) == list(arrays)
    for key, value in arrays.items():
        assert decoded[key].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(decoded[key], value)


def test_decoding_copies_nothing():
    data = encode_record({"x": np.arange(100, dtype=np.float32)})
    decoded = decode_record(data)["x"]
    assert np.shares_memory(decoded, np.frombuffer(data, np.uint8))
    assert decoded.flags.aligned and not decoded.flags.writeable


def test_strings_and_objects_are_refused():
    with pytest.raises(ValueError, match="'prompt'"):
        encode_record({"prompt": np.asarray("push")})
    with pytest.raises(ValueError, match="'x'"):
        encode_record({"x": np.asarray([None])})


def test_a_broken_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "shard") as writer:
        writer.write({"x": np.zeros(3)})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_records_texts_and_columns_agree(tmp_path):
    episodes = [("a", 0, 3, "train"), ("b", 1, 2, "train"), ("c", 1, 4, "validation")]
    embeddings = _folder(tmp_path, episodes)
    dataset = RecordDataset(tmp_path)
    assert len(dataset) == 9
    assert dataset.shapes["latents"] == (2, 2, 2, 4)
    assert [int(dataset[i]["text"]) for i in range(9)] == [0] * 3 + [1] * 6
    assert dataset.instructions == ["push", "pull"]
    for i, embedding in enumerate(embeddings):
        np.testing.assert_array_equal(dataset.text(i), embedding)
    actions = dataset.columns("actions")["actions"]
    np.testing.assert_array_equal(actions, [dataset[i]["actions"] for i in range(9)])
    with pytest.raises(KeyError, match="proprio"):
        dataset.columns("proprio")


def test_splits_and_few_episodes_per_task(tmp_path):
    episodes = [(f"e{i}", i % 2, 2, "validation" if i in (3, 6) else "train") for i in range(12)]
    _folder(tmp_path, episodes)
    dataset = RecordDataset(tmp_path)
    train, validation = dataset.record_indices("train"), dataset.record_indices("validation")
    np.testing.assert_array_equal(validation, [6, 7, 12, 13])
    np.testing.assert_array_equal(np.sort([*train, *validation]), np.arange(24))
    chosen = {n: set(dataset.record_indices("train", n)) for n in (1, 3, 99)}
    assert [len(chosen[n]) for n in (1, 3, 99)] == [4, 12, 20]
    assert chosen[1] < chosen[3] < chosen[99] == set(train)
    tasks = [dataset[int(i)]["text"] for i in chosen[1]]
    assert sorted(tasks) == [0, 0, 1, 1]
    others = {tuple(dataset.record_indices("train", 1, seed)) for seed in range(10)}
    assert len(others) > 1


def test_unfinished_folders_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no records"):
        RecordDataset(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        RecordDataset(tmp_path)
