"""The same training step in PyTorch: diffusers' Cosmos transformer, our decoder's twin, compiled.

It does the whole work of ours: noise is drawn and added, the loss is that of the stage, the
gradient is clipped by its norm, AdamW updates, a moving average follows where ours has one. But in
stage 1 it trains the whole network, also where our run trains adapters.
"""

import time
from typing import Any

import torch

from mvjax.clip import Clip
from mvjax.training.torch_objectives import TorchActionObjective, TorchVideoObjective

OBJECTIVES = {"video": TorchVideoObjective, "action": TorchActionObjective}


class TorchStep:
    """One step of the peer on random data; see `benchmark.OurStep`."""

    name = "PyTorch"

    def __init__(self, config: Any, flops: float, compiled: bool):
        """Builds the networks and makes the first two steps.

        Args:
            config: of a training run.
            flops: of a step, to give the peer the same measure.
            compiled: whether to use `torch.compile`.
        """
        start = time.perf_counter()
        self.flops, self.batch_size = flops, config.training.batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self._device:
            self._objective = OBJECTIVES[config.stage](config)
        if compiled:
            self._objective.compile_networks()
        settings = config.optimizer
        self._parameters = list(self._objective.trained.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._clip_norm = settings.clip_norm
        self._ema_decay = config.training.ema_decay
        self._average = [p.detach().clone() for p in self._parameters if self._ema_decay]
        self._batch = {
            name: torch.randn(self.batch_size, *shape, device=self._device)
            for name, shape in _shapes(config).items()
        }
        if "action_mask" in self._batch:
            self._batch["action_mask"].fill_(1)
        self.run(2)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Makes so many steps; seconds until the device has finished them."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    @property
    def peak_mb(self) -> float | None:
        """The most memory of the device so far."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / 2**20

    def _step(self) -> None:
        loss = self._objective(self._batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self._average:
            torch._foreach_lerp_(self._average, self._parameters, 1 - self._ema_decay)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    shapes = {"latents": Clip(**config.clip).latent_shape}
    shapes["text"] = (config.text.length, config.text.dim)
    if config.stage == "action":
        action, proprio = config.policy_io.action, config.policy_io.proprio
        shapes["actions"] = shapes["action_mask"] = (action.horizon, action.dim)
        shapes["proprio"] = (proprio.horizon, proprio.dim)
    return shapes
