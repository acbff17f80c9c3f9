"""Augmentation: what is drawn, how pictures change, its records, and what an epoch shows of them.

At the end a small dataset is encoded and trained on, and its policy sees what evaluation should.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from encode_toys import (
    CLIP,
    POLICY_IO,
    ROBOT,
    SIZE,
    Tokenizer,
    assert_same_files,
    encode,
    episode,
    random_tokenizer,
)
from ml_collections import ConfigDict
from record_folders import flip_bits, ids, make_records, take
from tiny_stages import quick_compiles, save_untrained, tiny_config

from configs import quickstart
from data_pipelines.augment import Augment, Variation, window_name
from data_pipelines.cameras import View, arrange
from data_pipelines.cutting import cut_episode
from data_pipelines.inspect import inspect_dataset
from data_pipelines.inspect_episode import Wanted
from data_pipelines.inspect_records import inspect_records
from data_pipelines.loader import make_loader
from data_pipelines.records import DamagedRecord, RecordDataset
from mvjax.encode import encode_dataset
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.stand_ins import save_linear_tokenizer
from mvjax.parallel import make_mesh
from mvjax.policy.generate import cropped
from mvjax.policy.load import load_policy, load_text_encoder, load_video_tokenizer
from mvjax.policy.observation import Observation
from mvjax.training.bridge import load_backbone
from mvjax.training.run import run

AUGMENT = dict(variants=3, crop=0.75, rotation=8.0, brightness=0.2, contrast=0.2, saturation=0.3)
AUGMENTED = ConfigDict(ROBOT.to_dict() | {"augment": AUGMENT})
RNG = np.random.default_rng(0)


# --- What is drawn, and what it does to pictures ---


def test_a_draw_follows_from_its_name_alone():
    augment = Augment(**AUGMENT)
    names = [window_name("robot", f"episode {e}", a, c) for e in "ab" for a in (0, 5) for c in "xy"]
    keys = [(variant, name) for variant in (1, 2) for name in names]
    drawn = {key: augment.draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    with ThreadPoolExecutor(4) as pool:
        again = pool.map(lambda key: Augment(**AUGMENT).draw(*key), reversed(keys))
    assert dict(zip(reversed(keys), again)) == drawn
    for variation in drawn.values():
        assert 0 <= variation.left <= 1 and 0 <= variation.top <= 1
        assert 0 < abs(variation.degrees) <= 8
    # What has been encoded is continued with the same draws by every later version.
    one = augment.draw(1, "robot/episode a/0/x")
    assert (one.left, one.top, one.degrees) == pytest.approx(GOLDEN, abs=1e-9)
    others = replace(augment, brightness=0.0, hue=0.1).draw(1, "robot/episode a/0/x")
    assert (others.left, others.top, others.degrees) == (one.left, one.top, one.degrees)
    assert {augment.draw(0, name) for name in names} == {Variation(0.75)}


GOLDEN = 0.3967729078839558, 0.6436694050383271, -7.774376832488548


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (20, 40), (70, 90)])
@pytest.mark.parametrize(
    "variation",
    [Variation(0.9), Variation(0.8, 0.0, 1.0, 30.0), Variation(1.0, degrees=-45.0)],
)
def test_all_frames_change_alike_and_no_corner_is_black(variation, size):
    frames = RNG.integers(100, 200, (3, 48, 64, 3), np.uint8)
    shown = variation.picture(frames, *size)
    assert shown.shape == (3, *size, 3) and shown.min() >= 100
    for i in range(3):
        np.testing.assert_array_equal(shown[i], variation.picture(frames[i : i + 1], *size)[0])


def test_crops_and_turns_are_where_they_say():
    y, x = np.mgrid[:120, :160]
    frames = np.stack([x, y, np.full_like(x, 50)], -1)[None].astype(np.uint8)

    def centre(picture):  # of a smooth picture, the mean is what lies at its centre
        return picture[0].mean((0, 1))[:2] + 0.5

    for left, top in ((0.0, 0.0), (1.0, 0.25), (0.5, 0.5)):
        wanted = 160 * (0.4 + 0.2 * left), 120 * (0.4 + 0.2 * top)
        for degrees in (0.0, 20.0):
            shown = Variation(0.8, left, top, degrees).picture(frames, 24, 32)
            if degrees == 0 or (left, top) == (0.5, 0.5):  # elsewhere a corner is mirrored
                np.testing.assert_allclose(centre(shown), wanted, atol=0.6)
    # The picture turns clockwise: above the centre is what was to its left.
    turned = Variation(0.5, degrees=90.0).picture(frames[:, :, 20:140], 60, 60)[0].astype(float)
    np.testing.assert_allclose(turned[0, 30, :2], (80 - 30, 60), atol=1)
    almost, plain = (Variation(0.8, 0.3, 0.7, d).picture(frames, 96, 128) for d in (1e-4, 0.0))
    np.testing.assert_allclose(almost.astype(int), plain, atol=1)
    np.testing.assert_array_equal(Variation().picture(frames, 120, 160), frames)


def test_colours_mean_what_they_are_called():
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    red = grey * np.uint8([2, 0, 0])

    def shown(picture, **settings):
        """In the variants that lie farthest apart."""
        augment, rows = Augment(200, **settings), []
        for variant in range(1, 200):
            rows.append(augment.draw(variant, "w").picture(picture, 4, 4)[0, 0, 0].astype(int))
        return np.min(rows, axis=0), np.max(rows, axis=0)

    np.testing.assert_allclose(shown(grey, brightness=0.3), [[70] * 3, [130] * 3], atol=2)
    np.testing.assert_allclose(shown(grey, contrast=0.4), [[89] * 3, [111] * 3], atol=2)
    for name in ("saturation", "hue"):  # of grey there is none
        np.testing.assert_allclose(shown(grey, **{name: 0.5}), [[100] * 3] * 2, atol=1)
    least = shown(red, saturation=0.5)[0]
    np.testing.assert_allclose(least, [130, 0, 0], atol=4)  # half way to its grey of 60
    assert shown(red, hue=0.5)[1].min() > 50  # green and blue, too


def test_settings_that_make_no_sense_are_refused():
    for section, word in (
        (dict(crop=0.9), "must have variants"),
        (dict(variants=2, blur=1.0), "must have variants"),
        (dict(variants=2), "all be alike"),
    ):
        with pytest.raises(ValueError, match=rf"datasets\.robot\.augment .*{word}"):
            Augment.of(dict(name="robot", augment=section))
    assert Augment.of({}) == Augment.of(dict(augment=AUGMENT | {"variants": 1})) == Augment(1)
    config = tiny_config("action")
    with config.unlocked():
        config.datasets.robot.augment = AUGMENT
        config.datasets.other = config.datasets.robot.to_dict() | {"augment": {}}
    with pytest.raises(ValueError, match=r"same robot, but a policy would see 1\.0 .* and 0\.75"):
        Experiment.from_config(config)
    config.datasets.other.embodiment = "another"
    Experiment.from_config(config)
    with pytest.raises(ValueError, match=r"robot\.augment\.crop must be a number above 0"):
        Experiment.from_config(config).changed({"datasets.robot.augment.crop": 0.0})


def test_the_quickstarts_last_word_augments_all_of_its_datasets():
    config = quickstart.get_config("smoke,tiled,augmented")
    assert config.clip.width == 128
    assert [d.augment.variants for d in config.datasets.values()] == [2, 2]
    assert [Augment.of(d).crop for d in config.datasets.values()] == [0.9, 0.9]
    assert "augment" not in quickstart.get_config("smoke,tiled").datasets.robot
    with pytest.raises(ValueError, match="'augmented' must be the quickstart's last word"):
        quickstart.get_config("smoke,augmented,tiled")


# --- Records ---


def test_records_hold_every_variant_of_a_window(tmp_path):
    views = dict(hand=dict(height=16, width=32))
    clip = ConfigDict(CLIP.to_dict() | {"views": views})
    tiled = ConfigDict(AUGMENTED.to_dict() | {"views": dict(hand=("front", ""))})
    episodes = [episode(i) for i in range(3)]
    records = encode(episodes, tmp_path / "records", dataset=tiled, clip=clip)
    plain = encode(episodes, tmp_path / "plain")
    assert len(records) == len(plain) == 90 and records.variants == 3
    assert records.fingerprint != plain.fingerprint
    for name in ("anchor", "actions", "proprio"):
        np.testing.assert_array_equal(records.columns(name)[name], plain.columns(name)[name])
    index, known = 37, Tokenizer()
    cuts = cut_episode(episodes[1], tiled, clip, POLICY_IO, variants=True)
    stored = [records.read(index, variant) for variant in range(3)]
    for variant, record in enumerate(stored):
        pictures = cuts.pictures(index - 30, variant)
        for entry, view in (("latents", "video"), ("views/hand", "hand")):
            latents = known.encode((pictures[view] / 127.5 - 1)[None].astype(np.float32))[0]
            np.testing.assert_allclose(record[entry].astype(np.float32), latents, atol=0.02)
        for name in ("actions", "proprio", "anchor", "text", "episode"):
            np.testing.assert_array_equal(record[name], plain[index][name])
        assert pictures["hand"][:, :, 16:].max() == 0  # a black cell stays black
    apart = [np.abs(a["latents"].astype(np.float32) - stored[0]["latents"]).mean() for a in stored]
    assert apart[0] == 0 and min(apart[1:]) > 0.02
    facts = dict(inspect_records(tmp_path / "records", thorough=True).facts)
    assert facts["variants"] == "3 of each window" and facts["records read"] == "270 of 270"


def test_no_number_of_processes_and_no_interruption_changes_a_byte(tmp_path):
    episodes = [episode(i) for i in range(5)]
    encode(episodes, tmp_path / "one", dataset=AUGMENTED)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                encode, episodes, tmp_path / "two", dataset=AUGMENTED, process=i, processes=2
            )
            for i in (0, 1)
        ]
        [job.result() for job in jobs]
    assert_same_files(tmp_path / "one", tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        stopped = Tokenizer(fail_at=15)
        encode(episodes, tmp_path / "stopped", dataset=AUGMENTED, tokenizer=stopped)
    encode(episodes, tmp_path / "stopped", dataset=AUGMENTED)
    assert_same_files(tmp_path / "one", tmp_path / "stopped")


def test_switched_off_records_are_those_without_it(tmp_path):
    off = ConfigDict(ROBOT.to_dict() | {"augment": AUGMENT | {"variants": 1}})
    episodes = [episode(0)]
    encode(episodes, tmp_path / "without")
    encode(episodes, tmp_path / "off", dataset=off)
    assert_same_files(tmp_path / "without", tmp_path / "off")
    assert "augment" not in (tmp_path / "off/plan.json").read_text()
    with pytest.raises(ValueError, match=r"augment\.crop is None there, 0\.75 here"):
        encode(episodes, tmp_path / "without", dataset=AUGMENTED)
    encode(episodes, tmp_path / "on", dataset=AUGMENTED)
    other = ConfigDict(AUGMENTED.to_dict())
    other.augment.rotation = 2.0
    with pytest.raises(ValueError, match=r"augment\.rotation is 8\.0 there, 2\.0 here"):
        encode(episodes, tmp_path / "on", dataset=other)


def test_an_inspection_shows_the_variants():
    wanted = Wanted(AUGMENTED, POLICY_IO, CLIP)
    found = inspect_dataset([episode(0)], "robot", "toy", wanted=wanted)
    (picture,) = found.samples[0].pictures["video: variants 0 to 2 of a window"]
    assert picture.shape == (16, 48, 3)


# --- The loader ---


def _seen(loader, batches):
    """(record, variant) of every sample."""
    read = take(loader, batches)
    variants = [int(x[0, 0, 0, -1]) for batch in read for x in batch["latents"]]
    return list(zip([index for _, index in ids(read)], variants))


def test_an_epoch_shows_one_variant_and_as_many_epochs_show_each_once(tmp_path):
    records = make_records(tmp_path / "one", 1, variants=3)
    options = dict(weights=[1.0], batch_size=9, seed=3, split="train")
    seen = _seen(make_loader([records], **options), 60)
    epochs = [seen[i : i + 90] for i in range(0, 540, 90)]  # 90 windows of training
    for epoch in epochs:
        assert sorted(index for index, _ in epoch) == records.record_indices("train").tolist()
        counts = Counter(variant for _, variant in epoch)
        assert min(counts.values()) > 15 and len(counts) == 3
    for three in (epochs[:3], epochs[1:4], epochs[3:]):
        assert len({one for epoch in three for one in epoch}) == 270
    assert _seen(make_loader([records], **options | {"seed": 4}), 10) != seen[:90]
    held_out = _seen(make_loader([records], **options | {"split": "validation"}), 20)
    assert {variant for _, variant in held_out} == {0} and len(held_out) == 180

    mixed = dict(options, weights=[1.0, 2.0])
    datasets = [records, make_records(tmp_path / "two", 2)]
    shares = Counter(number for number, _ in ids(take(make_loader(datasets, **mixed), 30)))
    assert shares == {1: 90, 2: 180}


def test_a_run_goes_on_with_the_same_variants(tmp_path):
    records = make_records(tmp_path / "one", 1, variants=3)
    options = dict(weights=[1.0], seed=3, split="train")
    straight, seen, state = _seen(make_loader([records], batch_size=6, **options), 80), [], None
    for size, batches in ((6, 11), (10, 20), (4, 5), (12, 16)):
        loader = make_loader([records], batch_size=size, **options)
        if state is not None:
            loader.set_state(json.loads(json.dumps(state)))
        seen += _seen(loader, batches)
        state = loader.get_state()
    assert seen == straight[: len(seen)] and len(seen) > 450


def test_a_damaged_variant_is_replaced_and_the_others_are_read(tmp_path, caplog):
    records = make_records(tmp_path / "one", 1, variants=3)
    file = tmp_path / "one/shard_0.arrayrecord"
    flip_bits(file, file.stat().st_size // 5)
    records, broken = RecordDataset(tmp_path / "one"), []
    for one in [(index, variant) for index in range(len(records)) for variant in range(3)]:
        try:
            records.read(*one)
        except DamagedRecord:
            broken.append(one)
    assert len(broken) == 1
    options = dict(weights=[1.0], batch_size=9, seed=3, split="train")
    seen = _seen(make_loader([records], **options), 30)
    assert broken[0] not in seen and len(set(seen)) == 269
    assert caplog.text.count("replaced a sample") == 1


# --- From episodes to the policy ---


def _config(stage, folder):
    config = tiny_config(stage, steps=2, sample_every=0, ema_decay=0.0)
    robot = dict(config.datasets.robot, video="front", anchor_fps=20.0, weight=1.0)
    robot |= dict(name="arm", embodiment="arm", records=str(folder / "arm"), augment=AUGMENT)
    robot["augment"] |= dict(hue=0.1)
    config.datasets = dict(arm=dict(robot, action="action", proprio="state"))
    config.tokenizer, config.validation_share = str(folder / "tokenizer.npz"), 0.4
    if stage == "action":
        config.backbone.checkpoint = str(folder / "video")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with augmented records, a backbone that learned nothing, and a trained decoder."""
    folder = tmp_path_factory.mktemp("augmented")
    save_linear_tokenizer(folder / "tokenizer.npz", random_tokenizer())
    config = _config("video", folder)
    dataset = config.datasets.arm
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    encode_dataset(
        [episode(i) for i in range(5)],
        dataset,
        config.clip,
        config.policy_io,
        tokenizer,
        text_encoder,
        dataset.records,
        identity={"tokenizer": tokenizer_identity, "text_encoder": text_identity},
        batch_size=16,
        anchor_fps=dataset.anchor_fps,
        validation_share=config.validation_share,
    )
    with quick_compiles():
        save_untrained(config, folder / "video")
        run(Experiment.from_config(_config("action", folder)), folder / "action")
    return folder


def _policy(folder, sampling=None, **settings):
    experiment = Experiment.from_config(_config("action", folder)).changed(settings)
    sampling = sampling or Sampling(video_steps=2, action_steps=2)
    return load_policy(experiment, folder / "action", sampling, 1)


def test_a_policy_sees_variant_0_of_what_its_cameras_show(folder, quickly):
    """Observed and true future frames, and the latents that validation reads, to the last bit."""
    policy = _policy(folder, Sampling(video_steps=2, action_steps=2, oracle=True))
    config, source = _config("action", folder), episode(1)
    records, clip = RecordDataset(folder / "arm"), config.clip
    cuts = cut_episode(source, config.datasets.arm, clip, config.policy_io, 20.0)
    index = 6
    anchor = int(np.searchsorted(source.streams["front"].timestamps, cuts.columns["anchor"][index]))
    shown = np.clip(anchor + 2 * np.arange(1 - clip.observed_frames, clip.future_frames + 1), 0, 29)
    frames = source.streams["front"].values.data[shown]
    past, future = np.split(frames, [clip.observed_frames])
    proprio = cuts.columns["proprio"][index]
    query = Observation({"front": past}, proprio, "push", {"front": future}, ("query", 0))
    pictures = np.asarray(policy.inputs([query], with_future=True).video)[0]
    np.testing.assert_array_equal(pictures, cuts.pictures(index)["video"])
    kept = round(0.75 * SIZE)
    np.testing.assert_allclose(  # the centre
        pictures.mean((1, 2)), frames[:, 6 : 6 + kept, 6 : 6 + kept].mean((1, 2)), atol=3
    )
    view = View("video", (("front",),), clip.height, clip.width, crop=0.75)
    np.testing.assert_array_equal(pictures, arrange([view], {"front": frames})["video"])
    stored = records[records.episodes[1].first + index]["latents"].astype(np.float32)
    latents = policy.weights[0].encode(pictures[None].astype(np.float32) / 127.5 - 1)[0]
    np.testing.assert_allclose(latents, stored, atol=0.02)
    finished = replace(query, frames={"video": pictures[: len(past)]}, arranged=True, future=None)
    chunks = policy.sampled(Sampling(video_steps=2, action_steps=2)).act([query, finished])
    np.testing.assert_array_equal(chunks[0], chunks[1])


def test_another_crop_is_another_policy(folder, caplog, quickly):
    other = {"datasets.arm.augment.crop": 0.5}
    with pytest.raises(ValueError, match=r"arm\.augment\.crop is 0\.75 there, 0\.5 here"):
        _policy(folder, **other)
    with pytest.raises(ValueError, match=r"augment\.crop is 0\.75 there, 0\.5 here"):
        run(Experiment.from_config(_config("action", folder)).changed(other), folder / "other")
    what = _policy(folder).identity["what"]
    assert what["settings"]["crop"] == 0.75
    experiment = Experiment.from_config(_config("action", folder)).changed(other)
    mesh = make_mesh(experiment.config.mesh)
    load_backbone(experiment, mesh)
    assert "cropped otherwise, than the decoder sees" in caplog.text
    assert "datasets.arm.augment.crop is 0.75 there, 0.5 here" in caplog.text


def test_generation_begins_with_the_crop_of_training(folder, caplog):
    config, frames = _config("video", folder), RNG.integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert cropped(config, frames).shape == (5, 30, 45, 3)
    assert cropped(config, frames, tiled=True) is frames
    assert "a tiled picture is not cropped" in caplog.text
    del config.datasets
    assert cropped(config, frames) is frames
