"""Sawyer of Meta-World v3, 80 Hz: 4 numbers each, in the simulator's own units.

Action: dx, dy, dz and gripper in -1 .. 1. Proprioception: hand position (m) and gripper opening
(0 .. 1). Streams of `launch.record` (format "lerobot"): action, observation.state.
"""

ACTION = (dict(stream="action", columns=(0, 1, 2, 3)),)
PROPRIO = (dict(stream="observation.state", columns=(0, 1, 2, 3)),)

CAMERAS = {"corner": ("corner",), "gripper": ("gripper",)}
