"""An episode with every kind of stream, and vectors made of it and back."""

import numpy as np
from scipy.spatial.transform import Rotation

from data_pipelines.episode import Stream
from data_pipelines.vectors import bases, parse, read, restore, streams, vector

RNG = np.random.default_rng(0)
N, HZ = 40, 10
TIMES = np.arange(N, dtype=np.int64) * (10**9 // HZ)
ROTATION = Rotation.from_rotvec(RNG.normal(size=(N, 3)))
POSITION = RNG.normal(size=(N, 3))
QUATERNION = ROTATION.as_quat()
STORED = {
    "matrix": ROTATION.as_matrix(),
    "quaternion_xyzw": QUATERNION,
    "quaternion_wxyz": QUATERNION[:, [3, 0, 1, 2]],
    "rotvec": ROTATION.as_rotvec(),
    "euler_xyz": ROTATION.as_euler("xyz"),
}


def poses(position=POSITION, rotation=ROTATION):
    matrices = np.tile(np.eye(4), (N, 1, 1))
    matrices[:, :3, :3], matrices[:, :3, 3] = rotation.as_matrix(), position
    return matrices


def six_numbers(rotation):
    return rotation.as_matrix()[..., :2, :].reshape(-1, 6)


VALUES = {
    "eef": poses(),
    "position": POSITION,
    **{f"rotation {form}": values for form, values in STORED.items()},
    **{
        f"pose {form}": np.concatenate([POSITION, values.reshape(N, -1)], 1)
        for form, values in STORED.items()
    },
    "joints": RNG.normal(size=(N, 7)).astype(np.float32),
    "joint_state": RNG.normal(size=(N, 7)),
    "grip": RNG.uniform(0, 0.08, size=N),
    "action": RNG.normal(size=(N, 7)),
    "other": poses(RNG.normal(size=(N, 3)), Rotation.random(N, random_state=1)),
    "label": np.array(["reach"] * N),
}
EPISODE = {name: Stream(TIMES, values) for name, values in VALUES.items()}
# With 1 / HZ between instants and anchors at stored times, windows are slices.
WINDOW = dict(horizon=5, fps=HZ, shift=0.1)
ANCHORS = TIMES[[0, 7, 30]]


def read_parts(*parts, dim, **window):
    parts = parse(parts)
    return read(parts, EPISODE, ANCHORS, dim, **(WINDOW | window))


def there_and_back(parts, dim, now=3):
    """Vectors of the instants after `now`, and the streams that come of them again."""
    parts = parse(parts)
    values = {name: VALUES[name][now + 1 : now + 6] for name in streams(parts)}
    base = {name: VALUES[name][now] for name in bases(parts)}
    numbers = vector(parts, values, base, dim)
    assert numbers.shape == (5, dim) and numbers.dtype == np.float32
    return values, numbers, restore(parts, numbers, base)
