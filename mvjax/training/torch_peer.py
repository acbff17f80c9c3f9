"""The same training step in PyTorch: diffusers' Cosmos transformer, compiled, flash attention.

Stage 1 trains the whole network with AdamW on the velocity loss of latents it adds noise to, and
keeps a moving average where our run does; it has no adapters, also where our run has.
Of stage 2 only the frozen backbone runs, to the block that the decoder reads: no PyTorch package
holds the decoder, so the peer does less work than we do.
"""

import time
from typing import Any

import torch

from mvjax.checkpoints.torch_weights.kind_video import VIDEO, video_sections
from mvjax.checkpoints.torch_weights.torch_reference import cosmos_transformer
from mvjax.clip import Clip
from mvjax.models.build import video_dit_config


class TorchStep:
    """One step of the peer on random data; see `benchmark.OurStep`."""

    name = "PyTorch"

    def __init__(self, config: Any, flops: float, compiled: bool):
        """Builds the network and makes its first two steps.

        Args:
            config: of a training run.
            flops: of a step, to give the peer the same measure.
            compiled: whether to use `torch.compile`.
        """
        start = time.perf_counter()
        self.flops, self.batch_size = flops, config.training.batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model_config = video_dit_config(config)
        published = VIDEO.published(video_sections(model_config))
        self._trains = config.stage == "video"
        if not self._trains:
            published["num_layers"] = config.context_layer
        self._bfloat16 = model_config.dtype == "bfloat16"
        with self._device:
            self._model = cosmos_transformer(published)
        self._model.train(self._trains).requires_grad_(self._trains)
        if not self._trains and self._bfloat16:
            self._model.to(torch.bfloat16)
        if self._trains:
            settings = config.optimizer
            self._optimizer = torch.optim.AdamW(
                self._model.parameters(),
                lr=settings.learning_rate,
                betas=(settings.b1, settings.b2),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=self._device.type == "cuda",
            )
            self._clip_norm = settings.clip_norm
            self._ema_decay = config.training.ema_decay
            self._parameters = list(self._model.parameters())
            self._average = [p.detach().clone() for p in self._parameters if self._ema_decay]
        self._forward = torch.compile(self._model) if compiled else self._model
        self._inputs = _random_inputs(config, self._device)
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
        clean = self._inputs["hidden_states"]
        noise = torch.randn_like(clean)
        inputs = self._inputs | {"hidden_states": clean + self._inputs["timestep"] * noise}
        mixed = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)
        with mixed, torch.set_grad_enabled(self._trains):
            (velocity,) = self._forward(**inputs)
        if not self._trains:
            return
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - clean)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self._average:
            torch._foreach_lerp_(self._average, self._parameters, 1 - self._ema_decay)


def _random_inputs(config: Any, device: torch.device) -> dict[str, Any]:
    b = config.training.batch_size
    t, h, w, c = Clip(**config.clip).latent_shape
    return dict(
        hidden_states=torch.randn(b, c, t, h, w, device=device),
        timestep=torch.rand(b, 1, t, 1, 1, device=device),
        encoder_hidden_states=torch.randn(b, config.text.length, config.text.dim, device=device),
        condition_mask=torch.zeros(b, 1, t, h, w, device=device),
        padding_mask=torch.zeros(1, 1, h, w, device=device),
        fps=None,
        return_dict=False,
    )
