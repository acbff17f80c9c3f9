import numpy as np
import pytest

from mvjax.policy.observation import History, ObservationSpec, control_stride

SPEC = ObservationSpec(observed_frames=5, fps=20, proprio_horizon=3, proprio_fps=80, execute=8)


def record(history, steps, start=0):
    """Records steps whose frame and state say the step's number; returns the rendered steps."""
    rendered = []
    for step in range(start, start + steps):

        def render(step=step):
            rendered.append(step)
            return np.full((2, 2, 3), step, np.uint8)

        history.record(np.array([step, -step]), render)
    return rendered


def test_start_repeats_the_first_frame_and_state():
    history = History(SPEC, control_hz=80)
    record(history, 1)
    observation = history.observation("open the drawer")
    assert observation.frames.shape == (5, 2, 2, 3) and observation.frames.dtype == np.uint8
    assert observation.proprio.dtype == np.float32
    assert observation.frames[:, 0, 0, 0].tolist() == [0] * 5
    assert observation.proprio[:, 0].tolist() == [0, 0, 0]
    assert observation.instruction == "open the drawer" and observation.future is None

    record(history, 8, start=1)
    observation = history.observation("")
    assert observation.frames[:, 0, 0, 0].tolist() == [0, 0, 0, 4, 8]
    assert observation.proprio[:, 0].tolist() == [6, 7, 8]


def test_two_frames_are_rendered_per_query_at_80_hz_and_20_fps():
    history = History(SPEC, control_hz=80)
    assert record(history, 1) == [0]
    for start in range(1, 80, 8):
        assert len(record(history, 8, start)) == 2
    assert history.observation("").frames[:, 0, 0, 0].tolist() == [64, 68, 72, 76, 80]


@pytest.mark.parametrize("execute", [1, 3, 4, 6, 8, 25])
@pytest.mark.parametrize("stride", [1, 4, 5])
def test_exactly_the_frames_that_queries_read_are_rendered(execute, stride):
    spec = ObservationSpec(4, 20, 1, 20, execute)
    history = History(spec, control_hz=20 * stride)
    rendered, read = [], set()
    for step in range(121):
        rendered += record(history, 1, step)
        if step % execute == 0:
            frames = history.observation("").frames[:, 0, 0, 0]
            wanted = [max(0, step - back * stride) for back in (3, 2, 1, 0)]
            assert frames.tolist() == wanted
            read.update(wanted)
    complete = 121 - 3 * stride - execute  # later frames may wait for a query after the last step
    assert [s for s in rendered if s < complete] == sorted(s for s in read if s < complete)


def test_unforeseen_query_and_impossible_rate_are_explained():
    history = History(SPEC, control_hz=80)
    record(history, 4)
    with pytest.raises(ValueError, match=r"query at control step 3 .*execute = 8"):
        history.observation("")
    with pytest.raises(ValueError, match=r"80 Hz, which is not a whole multiple of clip\.fps = 30"):
        History(ObservationSpec(5, 30, 1, 80, 8), control_hz=80)
    with pytest.raises(ValueError, match="not a whole multiple"):
        control_stride(10, 20)
    with pytest.raises(ValueError, match="execute must be at least 1, got 0"):
        ObservationSpec(5, 20, 1, 80, execute=0)
    assert control_stride(80, 20) == 4
