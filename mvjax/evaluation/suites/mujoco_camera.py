"""Pictures of a MuJoCo scene, drawn by software where there is no GPU."""

import os
import sys
from typing import Any

import numpy as np

NO_GL = (
    "MuJoCo cannot draw here ({reason}): install a software OpenGL (Debian: libegl1 "
    "libgl1-mesa-dri, or libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa before starting"
)


def draw_off_screen(environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Chooses EGL, where nothing else was chosen; MuJoCo reads that once, when it is imported."""
    if sys.platform == "linux":
        environment.setdefault("MUJOCO_GL", "egl")


class MujocoCamera:
    """Draws a model at one size.

    Args:
        model: a `mujoco.MjModel`, whose rendering quality is changed.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
    """

    def __init__(self, model: Any, height: int, width: int) -> None:
        self._model, self._size, self._renderer = model, (height, width), None
        # Software OpenGL spends most of its time on shadows and multisampling: both are off (before
        # the drawing context is made, or it has no effect). Pictures must not mix the two settings.
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)

    def draw(self, data: Any, camera: int | str, options: Any = None) -> np.ndarray:
        """What a camera of the model sees: uint8 [height, width, 3].

        Raises:
            RuntimeError: no OpenGL can be found.
        """
        import mujoco

        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._model, *self._size)
            except Exception as error:  # every GL backend raises its own kind
                raise RuntimeError(NO_GL.format(reason=error)) from error
        self._renderer.update_scene(data, camera, options)
        flags = self._renderer.scene.flags  # update_scene sets them anew every time
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return self._renderer.render()

    def close(self) -> None:
        """Frees the renderer now: left to the interpreter's exit, EGL prints tracebacks."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def frames_ahead(simulator: Any, steps: int, stride: int) -> np.ndarray:
    """Plays on with the expert: frames `stride`, `2 * stride`, ... up to `steps` steps ahead."""
    frames = []
    for step in range(1, steps + 1):
        simulator.step(simulator.expert_action())
        if step % stride == 0:
            frames.append(simulator.render())
    return np.stack(frames) if frames else np.zeros((0, *simulator.render().shape), np.uint8)
