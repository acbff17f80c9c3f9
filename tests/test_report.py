"""The report of a small synthetic run: complete, self-contained, naming its missing parts."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from data_pipelines.atomic import write_json
from mvjax.evaluation.report import build_evaluation_report, build_report, write_environment
from mvjax.evaluation.rollout import (
    EpisodeResult,
    Setting,
    append_result,
    read_results,
    write_setting,
)
from mvjax.identity import FILE

TASKS = ("drawer-close-v3", "window-open-v3")
VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Collects text, links and videos, and checks that every tag is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.links, self.videos = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.videos += [dict(attributes)] if tag == "video" else []

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def evaluation(run, name, setting, successes, plan_seconds=0.2):
    folder = run / "evaluation" / name
    write_setting(folder, setting)
    queries = 10 if setting.mode in ("policy", "oracle") else 0
    for task, solved in zip(TASKS, successes):
        for seed in range(20):
            video = f"videos/{task}_{seed}.mp4" if seed < 2 and setting.stop_step == 0 else None
            result = EpisodeResult(
                "metaworld", task, seed, seed < solved, 40 + seed, queries, plan_seconds,
                setting.mode, "abc", video,
            )  # fmt: skip
            append_result(folder / "results.jsonl", result)


def write_clip(path, brightness):
    video = pytest.importorskip("data_pipelines.video", reason="PyAV is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, brightness, 64, dtype=np.uint8)
    frame = np.broadcast_to(ramp[:, None, None], (64, 64, 3))
    video.write_video(path, [np.roll(frame, 4 * t, axis=0) for t in range(8)], 20)


def write_metrics(folder, steps=300):
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 0.1 + 0.9 / (1 + s / 40), "time": s} for s in range(steps)]
    torn = '{"step": 300, "lo'
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n" + torn)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "quickstart")


def write_run(run):
    """A run folder with all that a report shows."""
    evaluation(run, "policy", Setting("stop after 0 steps", "policy", 0), (19, 15))
    evaluation(run, "stop5", Setting("stop after 5 steps", "policy", 5), (20, 16), 0.9)
    evaluation(run, "oracle", Setting("true future", "oracle"), (20, 20))
    evaluation(run, "expert", Setting("scripted expert", "expert"), (20, 20))
    evaluation(run, "none", Setting("doing nothing", "none"), (0, 0))
    half = Setting("half: stop after 0 steps", "policy", 0, variant="half")
    evaluation(run, "half_policy_k0", half, (20, 11))
    for task in TASKS:
        for seed in range(2):
            write_clip(run / "evaluation" / "policy" / "videos" / f"{task}_{seed}.mp4", 200)
    write_clip(run / "predictions" / "drawer <1>_predicted.mp4", 100)
    write_clip(run / "predictions" / "drawer <1>_true.mp4", 220)
    write_clip(run / "predictions" / "x_predicted.mp4", 100)
    write_clip(run / "predictions" / "x_true.mp4", 220)
    shown = dict(instruction="open the <drawer>", dataset="robot", episode="e7", seconds=0.35)
    (run / "predictions" / "x.json").write_text(json.dumps(shown))
    write_metrics(run / "video")
    write_metrics(run / "action")
    phases = [{"name": "train video", "seconds": 75.2, "peak_mb": 1450}]
    phases += [{"name": "evaluate", "seconds": 3725, "peak_mb": 640}]
    (run / "phases.json").write_text(json.dumps(phases))
    (run / "command.txt").write_text("launch/quickstart.sh --seed 0 && echo done\n")
    study = [
        {"label": label, "demonstrations": n, "successes": k, "trials": 120}
        for label, n, k in [("trained", 10, 103), ("trained", 40, 101), ("untrained", 10, 79)]
    ]
    (run / "study").mkdir()
    (run / "study" / "results.json").write_text(json.dumps(study))
    write_environment(run)
    return run


def test_report_is_one_self_contained_page(run):
    out = run / "report.html"
    build_report(run, out)
    text = out.read_text()
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links), page.links
    assert not re.search(r"url\((?!#)|@import|<script\s|<link|<iframe|<img", text)
    assert text.count("<script>") == 1  # plays the videos
    assert text.count("<svg") == 4  # two stages, the sweep, the study
    assert len(page.videos) == 2 * 2 + 2 * 2
    for video in page.videos:
        assert video["src"].startswith("data:video/mp4;base64,") and len(video["src"]) > 500
        assert {"controls", "loop", "muted", "playsinline", "aria-label"} <= set(video)
    assert [p.name for p in run.glob("report*")] == ["report.html"]
    build_report(run, out)
    assert out.read_text() == text  # the same run, the same page


def test_report_says_the_numbers(run):
    build_report(run, run / "report.html")
    text = (run / "report.html").read_text()
    said = Page(text).text
    for words in [
        "85 % success on 2 tasks",
        "34 of 40 episodes, 95 % interval 71–93 %",  # wilson_interval(34, 40)
        "95 % 19/20 · 76–99 %",
        "scripted expert",
        "doing nothing",
        "true future",
        "stop after 5 steps",
        "half: stop after 0 steps 0 77.5 %",
        "90 ms",  # 0.9 s over 10 queries
        "drawer <1>",
        "open the <drawer> Predicted True robot, e7, at 0.35 s",
        "1 min 15 s 1.4 GB",
        "1 h 2 min 640 MB",
        "103/120",
        "launch/quickstart.sh --seed 0 && echo done",
        "numpy " + np.__version__,
    ]:
        assert words in said, words
    assert text.count('class="success"') == 4 and 'class="failure"' not in text
    earlier = json.loads((run / "environment.json").read_text())
    del earlier["mvjax"]
    (run / "environment.json").write_text(json.dumps(earlier))
    build_report(run, run / "report.html")
    assert "Software python" in Page((run / "report.html").read_text()).text


def test_a_report_says_that_results_are_not_of_one_identity(run):
    folder = run / "evaluation" / "none"
    (result, *_) = read_results(folder / "results.jsonl")
    other = dataclasses.replace(result, seed=99, config_hash="def")
    append_result(folder / "results.jsonl", other)
    said = Page(build_evaluation_report(run / "evaluation").read_text()).text
    assert "“doing nothing” are not all of one identity: their config_hash is abc, def." in said
    assert said.count("not all of one identity") == 1 and "not recorded" in said
    assert "not played on the same tasks" not in said
    append_result(folder / "results.jsonl", dataclasses.replace(result, task="door-close-v3"))
    said = Page(build_evaluation_report(run / "evaluation").read_text()).text
    assert said.count("not played on the same tasks: only one of them has door-close-v3.") == 1


def test_a_report_says_that_predicted_videos_are_of_another_model(run):
    networks = {"tokenizer": {"digest": "t"}, "text_encoder": {"name": "n"}}
    where = {"packages": {}, "devices": "1 x cpu", "mvjax": "0.1.0"}

    def claimed(folder, **what):
        write_json(run / folder / FILE, {"what": what, "where": [where]})

    backbone = {"step": 9, "digest": "new"}
    policy = {**networks, "backbone": backbone, "decoder": {"step": 5, "digest": "d"}}
    simulator = dict(suite="metaworld", simulator={}, protocol={})
    claimed("evaluation/policy", **simulator, policy=policy)
    for digest, told in (("new", False), ("old", True)):
        claimed("predictions", **networks, backbone=backbone | {"digest": digest})
        build_report(run, run / "report.html")
        said = Page((run / "report.html").read_text()).text
        words = "predicted videos (here) differ: backbone.digest is 'new' there, 'old' here"
        assert (words in said) == told


def test_a_report_of_an_unfinished_run_says_what_is_missing(tmp_path):
    run = tmp_path / "young"
    write_metrics(run / "video", steps=1)
    build_report(run, tmp_path / "young.html")
    said = Page((tmp_path / "young.html").read_text()).text
    for words in [
        "Not evaluated yet",
        "No episode was recorded.",
        "Nothing has been evaluated yet.",
        "No video was predicted.",
        "Nothing logged yet: Stage 2: action decoder.",
        "No phase has been measured.",
        "The command was not recorded.",
    ]:
        assert words in said, words
    assert "Sample efficiency" not in said

    evaluation(run, "none", Setting("doing nothing", "none"), (1, 0))
    evaluation(run, "blind", Setting("no image", "policy", 1), (1, 0))
    evaluation(run, "chosen", Setting("our choice", "policy", 3, main=True), (20, 19))
    (run / "evaluation" / "started").mkdir()
    build_report(run, tmp_path / "young.html")
    said = Page((tmp_path / "young.html").read_text()).text
    assert "97.5 % success on 2 tasks our choice: 39 of 40 episodes" in said

    with pytest.raises(FileNotFoundError, match="There is no run folder"):
        build_report(tmp_path / "old", tmp_path / "old.html")


def test_variants_alone_make_a_report_with_a_curve_for_each(tmp_path):
    """Another layer over two stop steps, six shares of the data at one: none is left out."""
    for k, rate in ((0, 12), (5, 14)):
        setting = Setting(f"layer9: stop after {k}", "policy", k, variant="layer9")
        evaluation(tmp_path, f"layer9_policy_k{k}", setting, (rate, rate))
    for n in range(6):
        setting = Setting(f"share{n}: stop after 0", "policy", 0, variant=f"share{n}")
        evaluation(tmp_path, f"share{n}_policy_k0", setting, (n, n))
    path = build_evaluation_report(tmp_path / "evaluation")
    page = Page(text := path.read_text())
    assert path.name == "report.html" and "Not evaluated yet" not in page.text
    assert text.count("<svg") == 1 and ">layer9<" in text and ">share0<" not in text
    for words in ("layer9: stop after 5 5 70 %", "share5: stop after 0 0 25 %"):
        assert words in page.text, page.text
