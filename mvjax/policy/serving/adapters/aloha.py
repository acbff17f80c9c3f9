"""openpi's ALOHA clients, real and simulated: the high camera, fourteen joints, at 50 Hz."""

from mvjax.policy.serving.adapters.adapter import Adapter, check_sizes
from mvjax.policy.serving.adapters.body import Body, converted, is_described_by

STATE = "observation.state"  # as in the public LeRobot datasets


def aloha(body: Body) -> Adapter:
    """Per arm six joints (rad) and a gripper, in and out, as the robot has them.

    Actions that were learned relative to the present joints are made absolute. The simulated client
    sends no prompt: the server needs `--prompt`.

    Raises:
        ValueError: the policy has another number of proprioceptive or action dimensions.
    """
    own = Adapter(name="aloha", image=("images", "cam_high"), state=("state",), state_size=14)
    check_sizes("aloha", state=(14, body.proprio_dim), action=(14, body.action_dim))
    if is_described_by(body, {STATE}):
        return converted(own, body, lambda state: {STATE: state})
    return own
