"""Where to take hold of an object from above with a two-finger gripper."""

from dataclasses import dataclass

import numpy as np

OPENING_M = 0.08  # between the open fingers
WIDEST_M = 0.072  # of an object that goes between them; wider ones are held by the rim
TIP_M = 0.013  # the finger tips are that far below the point between them
DEEP_M = 0.03  # how far that point goes below an object's top
RIM_DEEP_M = 0.018
FLOOR_M = 0.017  # and how far it stays above its bottom
DIRECTIONS = 16  # of the closing axis that are tried
ENOUGH_M = 0.02  # clearance beyond which more is worth nothing
TURN_M = 0.012  # clearance that a quarter turn of the hand is worth

# Boxes around the point between the finger tips: half widths along the closing axis and across it,
# and the range of heights, metres.
_FINGERS = (OPENING_M / 2 + 0.02, 0.012, -TIP_M, 0.05)
_HAND = (0.105, 0.035, 0.024, 0.25)


@dataclass(frozen=True)
class Grasp:
    """Where the point between the finger tips goes, [3], and the closing axis' angle to y."""

    position: np.ndarray
    yaw: float


def choose_grasp(points: np.ndarray, others: np.ndarray, tried: list[Grasp] | None = None) -> Grasp:
    """The grasp with most room for the hand, with little turning.

    Args:
        points: on the object, [n, 3], metres.
        others: on everything that the hand must not touch, [m, 3].
        tried: grasps that did not hold.
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
    """The direction in which the fingers close, [2]; y where the hand is not turned."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def _clearance(grasp: Grasp, others: np.ndarray) -> float:
    """How far the open hand stays from points [n, 3]; negative inside it."""
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
