"""How alike two videos are: PSNR and SSIM."""

import numpy as np
import scipy

PEAK = 255.0
_WINDOW = dict(sigma=1.5, truncate=3.5)  # 11 x 11 pixels


def psnr(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, per frame.

    Args:
        video, reference: uint8 [t, h, w, 3].

    Returns:
        float64 [t]; infinity where the frames are equal.
    """
    error = np.mean((video.astype(np.float64) - reference) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def ssim(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity, per frame: 1 for equal frames.

    Wang et al. 2004: Gaussian window of σ 1.5 over 11x11 pixels, K1 0.01, K2 0.03, population
    covariance; the mean over pixels whose window lies inside the frame, and over the colours.

    Args:
        video, reference: uint8 [t, h, w, 3], at least 11 pixels high and wide.

    Returns:
        float64 [t].
    """
    return np.array(
        [_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(video, reference)]
    )


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    blur = lambda image: scipy.ndimage.gaussian_filter(image, axes=(0, 1), **_WINDOW)  # noqa: E731
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(likeness[5:-5, 5:-5].mean())
