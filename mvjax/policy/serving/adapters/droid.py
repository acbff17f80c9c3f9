"""openpi's DROID client: left exterior camera, a Franka arm and its gripper, at 15 Hz."""

from dataclasses import replace

from mvjax.policy.serving.adapters.adapter import Adapter, check_sizes
from mvjax.policy.serving.adapters.body import Body, converted, is_described_by

POSE = "steps/observation/cartesian_position"  # of the RLDS release
GRIPPER = "steps/observation/gripper_position"


def droid(body: Body) -> Adapter:
    """Seven joints (rad) and the gripper in, eight action numbers out: the client unchanged.

    It executes joint velocities and a gripper command, so the policy must have been trained on
    these. A policy of `data_pipelines/embodiments/droid_franka.py` needs a client that sends
    `observation/cartesian_position` [6] in place of the joints, and that executes poses: it is
    given position 3 (m), Euler angles 3 (rad) and gripper.

    Raises:
        ValueError: the policy has another number of proprioceptive or action dimensions.
    """
    own = Adapter(
        name="droid",
        image=("observation/exterior_image_1_left",),
        state=("observation/joint_position", "observation/gripper_position"),
        state_size=8,
    )
    if is_described_by(body, {POSE, GRIPPER}):
        keys = ("observation/cartesian_position", "observation/gripper_position")
        posed = replace(own, state=keys, state_size=7)
        return converted(posed, body, lambda s: {POSE: s[..., :6], GRIPPER: s[..., 6:]})
    check_sizes("droid", state=(8, body.proprio_dim), action=(8, body.action_dim))
    return own
