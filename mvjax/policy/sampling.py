"""How a query to the policy is answered."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mvjax.flow.noise_levels import karras_sigmas


@dataclass(frozen=True)
class Sampling:
    """How a query is answered.

    Attributes:
        video_steps: steps of the full video schedule (published: 35).
        stop_step: K, evaluations of the video before the partial pass; 0 (published) denoises
            nothing, `video_steps` denoises fully.
        action_steps: Euler steps of the action chunk (published: 10).
        sigma_max: noise level the video starts from (published: 80).
        sigma_min: noise level of the last, clean prediction (published: 0.002).
        oracle: take the true future video, noised at σ_K, instead of generating one.
        seed: of the video and action noise (published: 0).
        fresh_noise: draw new noise at every query, from the seed and the observation; the published
            policy takes the same noise at every query, so the error that noise brings repeats.
        draws: action chunks sampled per query; the one nearest to all others (the medoid) is
            executed. They share one context, so a draw costs ten small Euler steps (published: 1).
    """

    video_steps: int = 35
    stop_step: int = 0
    action_steps: int = 10
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    oracle: bool = False
    seed: int = 0
    fresh_noise: bool = False
    draws: int = 1

    def __post_init__(self):
        if not 0 <= self.stop_step <= self.video_steps:
            raise ValueError(
                f"stop_step must be between 0 and video_steps = {self.video_steps}, got "
                f"{self.stop_step}."
            )
        for name in ("draws", "action_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"The policy's {name} must be at least 1, got {getattr(self, name)}."
                )

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels of the video, float64 [video_steps + 1]."""
        return karras_sigmas(self.video_steps, sigma_max=self.sigma_max, sigma_min=self.sigma_min)

    @property
    def stop_sigma(self) -> float:
        """σ_K, the noise level at which the plan is read."""
        return float(self.sigmas[self.stop_step])

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for a whole video: the steps and the clean prediction."""
        return self.video_steps + 1
