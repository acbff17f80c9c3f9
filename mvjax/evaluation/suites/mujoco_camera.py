"""Pictures of a MuJoCo scene, drawn by software where there is no GPU."""

import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np

NO_GL = (
    "MuJoCo cannot render here ({reason}): install a software OpenGL (Debian: libegl1 "
    "libgl1-mesa-dri, or libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
)


def draw_off_screen(environment: MutableMapping[str, str] = os.environ) -> None:
    """Selects EGL unless MUJOCO_GL is set; MuJoCo reads it once, when it is imported."""
    if sys.platform == "linux":
        environment.setdefault("MUJOCO_GL", "egl")


def renderer() -> dict[str, str]:
    """The OpenGL that draws in this process: "gl_backend" (egl, osmesa, ...) and "gl_renderer".

    Pictures differ between renderers, and between versions of the same one.
    """
    draw_off_screen()
    backend = os.environ.get("MUJOCO_GL", "") or "default"
    try:
        import mujoco

        context = mujoco.GLContext(16, 16)
        try:
            context.make_current()
            from OpenGL import GL  # after the context: it then takes the functions of that backend

            words = [GL.glGetString(name) for name in (GL.GL_RENDERER, GL.GL_VERSION)]
        finally:
            context.free()
        drawn_by = ", ".join(word.decode() for word in words if word) or "unknown"
    except Exception as error:  # every GL backend raises types of its own
        drawn_by = f"none ({error})"
    return {"gl_backend": backend, "gl_renderer": drawn_by}


class MujocoCamera:
    """Draws a `mujoco.MjModel` at one size, in pixels; changes the model's rendering quality."""

    def __init__(self, model: Any, height: int, width: int) -> None:
        self._model, self._size, self._renderer = model, (height, width), None
        # Software OpenGL spends most of its time on shadows and multisampling: both are off, also
        # with a GPU, so that all pictures are alike. It must precede the making of the renderer.
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)

    def draw(self, data: Any, camera: int | str, options: Any = None) -> np.ndarray:
        """Renders a camera of the model: uint8 [height, width, 3]; RuntimeError without OpenGL."""
        import mujoco

        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self._model, *self._size)
            except Exception as error:  # every GL backend raises types of its own
                raise RuntimeError(NO_GL.format(reason=error)) from error
        self._renderer.update_scene(data, camera, options)
        flags = self._renderer.scene.flags  # update_scene resets them every time
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return self._renderer.render()

    def close(self) -> None:
        """Frees the renderer; left to the interpreter's exit, EGL would print tracebacks."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def frames_ahead(
    simulator: Any, steps: int, stride: int, cameras: Sequence[str]
) -> dict[str, np.ndarray]:
    """Steps on with the expert; see `Simulator.lookahead`."""
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
    for step in range(1, steps + 1):
        simulator.step(simulator.expert_action())
        if step % stride == 0:
            for camera in cameras:
                frames[camera].append(simulator.render(camera))
    if steps < stride:
        return {
            camera: np.zeros((0, *simulator.render(camera).shape), np.uint8) for camera in cameras
        }
    return {camera: np.stack(pictures) for camera, pictures in frames.items()}
