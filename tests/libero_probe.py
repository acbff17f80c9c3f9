"""Facts about the LIBERO simulator, gathered in LIBERO's own Python: `libero_probe.py OUT.npz`."""

import sys

import numpy as np

from mvjax.evaluation.suites.libero import STAY, Libero

TASK = "object-2"


def episode(simulator: Libero, seed: int, steps: int, looks: tuple[int, ...] = ()) -> np.ndarray:
    """States of an episode with noise on the expert's actions."""
    simulator.reset(seed)
    rng, states = np.random.default_rng(seed), []
    for step in range(steps):
        if step in looks:
            simulator.lookahead(30, 15, ["agentview", "wrist"])
        simulator.step(np.clip(simulator.expert_action() + rng.normal(0, 0.1, 7), -1, 1))
        states.append(np.concatenate([simulator.state(), simulator.proprio()]))
    return np.stack(states)


def pushed(simulator: Libero, direction: tuple[int, int, int]) -> np.ndarray:
    """Positions of the end effector at full command for a second, then half a second back."""
    simulator.reset(0)
    action, positions = np.array([*direction, 0, 0, 0, -1]), []
    for step in range(30):
        simulator.step(action if step < 20 else action * (-1, -1, -1, 1, 1, 1, 1))
        positions.append(simulator.effector_position())
    return np.stack(positions)


def turned(simulator: Libero) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hand turned by half a radian to both sides: quaternions, recorded, by robosuite."""
    from robosuite.utils.transform_utils import quat2axisangle

    quaternions, recorded, theirs = [], [], []
    for axis in (3, 4):
        for sign in (1, -1):
            simulator.reset(0)
            action = STAY.copy()
            action[axis] = sign * 0.3
            for _ in range(20):
                simulator.step(action)
                quaternions.append(simulator.effector_quaternion())
                recorded.append(simulator.lerobot_state()[3:6])
                theirs.append(quat2axisangle(simulator.effector_quaternion()))
    return tuple(np.stack(each).reshape(4, 20, -1) for each in (quaternions, recorded, theirs))


def official(task: str, seed: int) -> dict[str, np.ndarray]:
    """The same start through LIBERO's own evaluation environment, with its hard resets."""
    scene = Libero(task).scene
    from libero.libero.envs import OffScreenRenderEnv

    bddl = scene.env.bddl_file_name
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=96, camera_widths=128)
    env.seed(0)
    env.reset()
    env.set_init_state(scene.initial_states[seed])
    for _ in range(10):
        obs, *_ = env.step(STAY.astype(float))
    found = {
        "official_state": env.get_sim_state(),
        "official_picture": obs["agentview_image"][::-1, ::-1],
        "official_wrist": obs["robot0_eye_in_hand_image"][::-1, ::-1],
        "official_position": obs["robot0_eef_pos"],
        "official_quaternion": obs["robot0_eef_quat"],
        "official_fingers": obs["robot0_gripper_qpos"],
    }
    env.close()
    return found


def main(out: str) -> None:
    """Writes the facts."""
    simulator = Libero(TASK, 96, 128)
    simulator.reset(3)
    facts = {
        "state": simulator.state(),
        "picture": simulator.render("agentview"),
        "wrist": simulator.render("wrist"),
        "proprio": simulator.proprio(),
        "quaternion": simulator.effector_quaternion(),
        "rotation": simulator.effector_rotation(),
        "instruction": simulator.instruction,
        "max_steps": simulator.max_steps,
        **dict(zip(("turned", "turned_recorded", "turned_theirs"), turned(simulator))),
        "first": episode(simulator, 3, 40),
        "other_seed": episode(simulator, 4, 40),
        "drawn": episode(simulator, 12345, 1),
        "again": episode(simulator, 3, 40),
        "with_looks": episode(simulator, 3, 40, looks=(0, 17)),
        "pushed": np.stack([pushed(simulator, d) for d in ((-1, 1, 1), (1, 1, -1), (1, -1, 1))]),
    }
    simulator.reset(3)
    facts["state_later"] = simulator.state()
    facts["future"] = simulator.lookahead(60, 20, ["wrist", "agentview"])["agentview"]
    for _ in range(60):
        simulator.step(simulator.expert_action())
    facts["came"] = simulator.render("agentview")
    simulator.close()
    np.savez(out, **facts, **official(TASK, 3))


if __name__ == "__main__":
    main(sys.argv[1])
