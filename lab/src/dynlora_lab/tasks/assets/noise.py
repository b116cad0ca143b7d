"""A bad line: speech in a room full of echo and noise, heard through a telephone."""

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, sosfilt

Samples = NDArray[np.float64]

BAND_HZ = (300.0, 3400.0)  # ITU-T G.712's telephone band
REVERBERATION_S = 0.4  # RT60: the time in which an echo falls by 60 dB
SNR_DB = 5.0


def bad_line(samples: Samples, rate: int, seed: int) -> Samples:
    """Echo, then noise, then the band of a telephone.

    Args:
        samples: (time,) in -1..1.
        rate: samples a second, above 2 · 3400.
        seed: of echo and noise.

    Returns:
        (time,), the largest value 0.9 in size.
    """
    chance = np.random.default_rng(seed)
    echoed = fftconvolve(samples, _room(rate, chance))[: len(samples)]
    noise = _falling_noise(len(samples), chance)
    noise *= np.sqrt(np.mean(echoed**2) / np.mean(noise**2)) * 10 ** (-SNR_DB / 20)
    heard = sosfilt(butter(4, BAND_HZ, "bandpass", fs=rate, output="sos"), echoed + noise)
    return np.asarray(0.9 * heard / np.abs(heard).max())


def _room(rate: int, chance: np.random.Generator) -> Samples:
    """The answer of a room to a click: the click, then noise that falls by 60 dB in ``REVERBERATION_S``."""
    times = np.arange(int(REVERBERATION_S * rate)) / rate
    echo = chance.standard_normal(len(times)) * 10 ** (-3 * times / REVERBERATION_S)
    echo *= 1 / np.linalg.norm(echo)  # as much energy as the direct sound
    echo[0] += 1.0
    return echo


def _falling_noise(length: int, chance: np.random.Generator) -> Samples:
    """Pink noise: power in inverse proportion to frequency, as in rooms and streets."""
    spectrum = np.fft.rfft(chance.standard_normal(length))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), length)
