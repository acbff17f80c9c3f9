"""A scripted expert for LIBERO tasks that put one object on or into another.

It reads the poses of all objects, which no policy can. The hand always points down and follows the
pose error; after a failed grasp another one is tried. `PickAndPlace` plays an episode;
`choose_grasp` selects where to take hold of an object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from mvjax.evaluation.suites.libero_physics import body_points, other_points

POSITION_UNIT_M = 0.05  # an action of 1 in OSC_POSE
ROTATION_UNIT = 0.5  # the same, radians
OPEN, CLOSED = -1.0, 1.0
CLOSE_STEPS, OPEN_STEPS = 12, 8  # control steps until the gripper has closed or opened
PATIENCE = 40  # control steps after which a motion ends even if its goal was not reached
FAR_PATIENCE = 90  # the same for a motion across the table
ABOVE_M = 0.08  # approach height over the grasp
CLEAR_M = 0.04  # clearance over the highest obstacle on the path
WAY_M = 0.09  # half the width of the path that must be clear
FINGERS_M = 0.015  # the point between the finger tips may be this far below a rim
CARRY_SPEED = 0.9  # fraction of the maximum
DROP_M = 0.012  # release height above the target
DROP_INSIDE_M = 0.05  # release height above the floor of a container
DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])  # the hand, its fingers closing along y
HELD_M = 0.03  # an object that has risen by this much is held


class PickAndPlace:
    """Plays one episode; `act` is called once per control step.

    Args:
        model: the scene.
        data: its present state, read at every step.
        goal: LIBERO's: [[relation, object, target]].

    Raises:
        ValueError: if the goal is not to put one object on or into another.
    """

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, goal: Sequence[Sequence[str]]
    ) -> None:
        if len(goal) != 1 or goal[0][0] not in ("on", "in"):
            raise ValueError(
                f"the scripted expert puts one object on or into another, but the goal is {goal}"
            )
        self._model, self._data = model, data
        relation, thing, target = goal[0]
        self._thing, self._inside = f"{thing}_main", relation == "in"
        sites = [model.site(i).name for i in range(model.nsite)]
        self._region = target if target in sites else None
        body = model.body_rootid[model.site(target).bodyid[0]] if self._region else None
        self._target = model.body(body).name if self._region else f"{target}_main"
        self._tried: tuple[Grasp, ...] = ()  # immutable: `Snapshot` makes a shallow copy
        self._begin()

    def act(self) -> np.ndarray:
        """The next action, float32 [7]."""
        self._waited += 1
        return getattr(self, f"_{self._phase}")().astype(np.float32)

    def _begin(self) -> None:
        """Chooses a grasp in the present scene, and starts the first phase."""
        points = body_points(self._model, self._data, self._thing)
        others = other_points(self._model, self._data, self._thing)
        self._grasp = choose_grasp(points, others, list(self._tried))
        self._tried = (*self._tried, self._grasp)
        self._start_height = self._position()[2]
        place, below = self._grasp.position, self._grasp.position[2] - points[:, 2].min()
        self._above_height = max(
            place[2] + ABOVE_M, _tallest(others, self._hand(), place) + CLEAR_M
        )
        carried_over = _tallest(others, place, self._target_place())
        self._carry_height = max(place[2] + ABOVE_M, carried_over + CLEAR_M + below)
        target = body_points(self._model, self._data, self._target)
        self._drop_height = self._surface() + below + (DROP_INSIDE_M if self._inside else DROP_M)
        if self._inside:  # the hand is wider than a basket and must stay above its rim
            self._drop_height = max(self._drop_height, target[:, 2].max() - FINGERS_M)
        self._go("above")

    def _surface(self) -> float:
        """The height on which the object will rest, metres."""
        if self._region is None:
            return float(self._data.body(self._target).xpos[2])
        site = self._site(self._region)
        depth = self._model.site(self._region).size[2] if self._inside else 0.0
        return float(site.xpos[2] - depth)

    def _go(self, phase: str) -> None:
        self._phase, self._waited = phase, 0

    def _above(self) -> np.ndarray:
        goal = np.array([*self._grasp.position[:2], self._above_height])
        if self._reached(goal, 0.015, FAR_PATIENCE):
            self._go("descend")
        return self._move(goal, OPEN)

    def _descend(self) -> np.ndarray:
        if self._reached(self._grasp.position, 0.006):
            self._go("close")
        return self._move(self._grasp.position, OPEN, 0.6)

    def _close(self) -> np.ndarray:
        if self._waited >= CLOSE_STEPS:
            self._go("lift")
        return self._move(self._grasp.position, CLOSED)

    def _lift(self) -> np.ndarray:
        goal = self._hand().copy()
        goal[2] = self._carry_height
        if self._hand()[2] > goal[2] - 0.015 or self._waited > PATIENCE:
            if self._position()[2] < self._start_height + HELD_M:
                self._begin()  # it slipped: start again with another grasp
            else:
                self._go("carry")
        return self._move(goal, CLOSED, CARRY_SPEED)

    def _carry(self) -> np.ndarray:
        goal = self._over_target(self._carry_height)
        if self._reached(goal, 0.012, FAR_PATIENCE):
            self._go("lower")
        return self._move(goal, CLOSED, CARRY_SPEED)

    def _lower(self) -> np.ndarray:
        goal = self._over_target(self._drop_height)
        if self._reached(goal, 0.008):
            self._go("release")
        return self._move(goal, CLOSED, 0.4)

    def _release(self) -> np.ndarray:
        if self._waited >= OPEN_STEPS:
            self._go("retreat")
        return self._move(self._hand(), OPEN)

    def _retreat(self) -> np.ndarray:
        if self._waited > PATIENCE:
            self._begin()  # the task is not solved: start again
        goal = self._hand().copy()
        goal[2] = self._carry_height
        return self._move(goal, OPEN)

    def _move(self, goal: np.ndarray, gripper: float, speed: float = 1.0) -> np.ndarray:
        """An action towards a point, and towards the orientation of the grasp."""
        position = np.clip((goal - self._hand()) / POSITION_UNIT_M, -speed, speed)
        turn = self._turn() / ROTATION_UNIT
        return np.concatenate([position, np.clip(turn, -speed, speed), [gripper]])

    def _turn(self) -> np.ndarray:
        """The rotation to the orientation of the grasp, as a rotation vector [3]."""
        cos, sin = np.cos(self._grasp.yaw), np.sin(self._grasp.yaw)
        wanted = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ DOWN
        missing = wanted @ self._site("gripper0_grip_site").xmat.reshape(3, 3).T
        quaternion, vector = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quaternion, missing.reshape(9))
        mujoco.mju_quat2Vel(vector, quaternion, 1.0)
        return vector

    def _reached(self, goal: np.ndarray, tolerance: float, patience: int = PATIENCE) -> bool:
        near = np.linalg.norm(goal - self._hand()) < tolerance
        turned = np.linalg.norm(self._turn()) < 0.08
        return bool(near and turned) or self._waited > patience

    def _over_target(self, height: float) -> np.ndarray:
        """The hand's position at which the object is over the target."""
        shift = self._target_place() - self._position()[:2]
        return np.array([*(self._hand()[:2] + shift), height])

    def _target_place(self) -> np.ndarray:
        """The middle of the target [2]; read anew, since the target may be pushed."""
        if self._region is not None:
            return self._site(self._region).xpos[:2]
        return self._data.body(self._target).xpos[:2]

    def _hand(self) -> np.ndarray:
        return self._site("gripper0_grip_site").xpos

    def _position(self) -> np.ndarray:
        return self._data.body(self._thing).xpos

    def _site(self, name: str):
        return self._data.site(name)


def _tallest(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """The height of the tallest points [n, 3] near the straight path between two points."""
    start, way = start[:2], end[:2] - start[:2]
    share = np.clip((points[:, :2] - start) @ way / max(way @ way, 1e-9), 0, 1)
    distance = np.linalg.norm(points[:, :2] - start - share[:, None] * way, axis=1)
    return float(points[distance < WAY_M, 2].max(initial=-np.inf))


# Grasps from above with a two-finger gripper.

OPENING_M = 0.08  # between the open fingers
WIDEST_M = 0.072  # objects up to this width fit between them; wider ones are held by the rim
TIP_M = 0.013  # the finger tips are this far below the point between them
DEEP_M = 0.03  # depth of that point below an object's top
RIM_DEEP_M = 0.018  # the same for a rim
FLOOR_M = 0.017  # its least height above an object's bottom
DIRECTIONS = 16  # directions of the closing axis to try
ENOUGH_M = 0.02  # clearance beyond which more does not count
TURN_M = 0.012  # clearance traded for a quarter turn of the hand

# Boxes around the point between the finger tips: half widths along and across the closing axis,
# lowest and highest point, metres.
_FINGERS = (OPENING_M / 2 + 0.02, 0.012, -TIP_M, 0.05)
_HAND = (0.105, 0.035, 0.024, 0.25)


@dataclass(frozen=True)
class Grasp:
    """Position [3] of the point between the finger tips, and angle of the closing axis to y."""

    position: np.ndarray
    yaw: float


def choose_grasp(points: np.ndarray, others: np.ndarray, tried: list[Grasp] | None = None) -> Grasp:
    """Returns the grasp with most clearance and little turning.

    Args:
        points: on the object [n, 3], metres.
        others: on all obstacles [m, 3].
        tried: grasps that failed.
    """
    top, bottom = points[:, 2].max(), points[:, 2].min()
    middle = (points.max(0) + points.min(0)) / 2
    near = others[np.linalg.norm(others[:, :2] - middle[:2], axis=1) < 0.3]
    candidates = []
    yaws = np.linspace(-np.pi / 2, np.pi / 2, DIRECTIONS, endpoint=False)
    solid = min(np.ptp(points[:, :2] @ closing_axis(yaw)) for yaw in yaws) <= WIDEST_M
    for yaw in yaws:
        axis = closing_axis(yaw)
        along = points[:, :2] @ axis
        width = np.ptp(along)
        if solid and width > WIDEST_M:
            continue
        if solid:
            center = middle[:2] + axis * ((along.max() + along.min()) / 2 - middle[:2] @ axis)
            places = [(center, max(top - DEEP_M, bottom + FLOOR_M))]
        else:
            rim = points[points[:, 2] > top - 0.01]
            places = [
                (middle[:2] + axis * (reach - middle[:2] @ axis), top - RIM_DEEP_M)
                for reach in ((rim[:, :2] @ axis).max() - 0.005, (rim[:, :2] @ axis).min() + 0.005)
            ]
        for place, height in places:
            grasp = Grasp(np.array([*place, height]), yaw)
            room = min(_clearance(grasp, near), ENOUGH_M)
            narrow = -0.5 * width if solid else 0.0
            used = sum(_alike(grasp, other) for other in tried or [])
            candidates.append((room - TURN_M * abs(yaw) / (np.pi / 2) + narrow - used, grasp))
    return max(candidates, key=lambda candidate: candidate[0])[1]


def closing_axis(yaw: float) -> np.ndarray:
    """Returns the direction [2] in which the fingers close; y if the hand is not turned."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def _clearance(grasp: Grasp, others: np.ndarray) -> float:
    """The distance of the open hand from points [n, 3]; negative inside it."""
    axis = closing_axis(grasp.yaw)
    offset = others - grasp.position
    along = np.abs(offset[:, :2] @ axis)
    across = np.abs(offset[:, :2] @ [axis[1], -axis[0]])
    rooms = [np.inf]
    for half_along, half_across, low, high in (_FINGERS, _HAND):
        level = (offset[:, 2] > low) & (offset[:, 2] < high)
        gaps = np.maximum(along[level] - half_along, across[level] - half_across)
        rooms.extend(gaps)
    return min(rooms)


def _alike(grasp: Grasp, other: Grasp) -> bool:
    turned = abs((grasp.yaw - other.yaw + np.pi / 2) % np.pi - np.pi / 2)
    return bool(turned < 0.3 and np.linalg.norm(grasp.position - other.position) < 0.04)
