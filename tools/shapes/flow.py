"""Second stage: transformer and text encoders learn to turn noise into the latents of a caption's image."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from triptych.tools.shapes.autoencoder import normalized_latents
from triptych.tools.shapes.model import (
    LATENT_CHANNELS,
    LATENT_EDGE,
    SEQUENCE_LENGTH,
    STEPS,
    TextToLatents,
    make_tokenizer,
    pack_latents,
    unpack_latents,
)
from triptych.tools.shapes.optimizer import Muon
from triptych.tools.shapes.scenes import JITTER, Pixels, Scene, caption, draw, varied_caption
from triptych.tools.shapes.scoring import Score, score
from triptych.tools.shapes.training import TrainingRun

BATCH = 64
PEAK_RATE = 5e-3
CAPTIONS_PER_SCENE = 16
PLAIN_CAPTIONS = 10
"""So many of the wordings per scene are the full caption, the others vary."""
ON_PATH_FROM = 0.8
"""Share of the training after which half of the steps start from where the model's own sampling gets to."""
OFFSETS = 2 * JITTER + 1


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What there is to learn.

    latents: (scenes, OFFSETS, OFFSETS, 16, 8, 8), by the shape's offset down and across.
    tokens: int64 (scenes, CAPTIONS_PER_SCENE, SEQUENCE_LENGTH).
    """

    latents: torch.Tensor
    tokens: torch.Tensor


def make_training_set(
    autoencoder: AutoencoderTiny, device: torch.device, seed: int, scenes: Sequence[Scene]
) -> TrainingSet:
    """Encode every scene at every offset, and its wordings."""
    chooser = random.Random(seed)
    reach = range(-JITTER, JITTER + 1)
    latents = []
    for scene in scenes:
        drawn = np.stack([draw(scene, dx, dy) for dy in reach for dx in reach])
        latents.append(normalized_latents(autoencoder, to_tensor(drawn, device)).half())
    tokens = [
        tokenize([caption(scene)] * PLAIN_CAPTIONS)
        + tokenize([varied_caption(scene, chooser) for _ in range(CAPTIONS_PER_SCENE - PLAIN_CAPTIONS)])
        for scene in scenes
    ]
    side = (len(scenes), OFFSETS, OFFSETS, LATENT_CHANNELS, LATENT_EDGE, LATENT_EDGE)
    return TrainingSet(torch.stack(latents).reshape(side), torch.tensor(tokens, device=device))


def to_tensor(images: Pixels, device: torch.device) -> torch.Tensor:
    """uint8 (batch, EDGE, EDGE, 3) -> float32 (batch, 3, EDGE, EDGE) in [-1, 1]."""
    scaled = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return scaled.contiguous(memory_format=torch.channels_last)


def to_images(tensor: torch.Tensor) -> Pixels:
    """Undo `to_tensor`, clipped."""
    scaled = ((tensor.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte()
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())


def tokenize(captions: list[str]) -> list[list[int]]:
    """Token ids, SEQUENCE_LENGTH of them for each caption."""
    encoded = make_tokenizer()(captions, padding="max_length", truncation=True, max_length=SEQUENCE_LENGTH)
    return [list(row) for row in encoded.input_ids]


def offsets_of(noise: torch.Tensor) -> torch.Tensor:
    """Derive the offset that a noise stands for, as indices 0 to OFFSETS - 1.

    The mean of one noise channel is a normal variable; its quantile gives an evenly distributed offset.
    Noise and image thus belong together: the way from one to the other is nearly straight and four steps
    suffice, yet each seed has an image of its own.

    Args:
        noise: (batch, 16, 8, 8), standard normal.

    Returns:
        int64 (batch, 2): down (from channel 0) and across (from channel 1).

    """
    means = noise[:, :2].float().mean((2, 3)) * LATENT_EDGE
    quantiles = 0.5 * (1.0 + torch.erf(means / math.sqrt(2.0)))
    return (quantiles * OFFSETS).long().clamp(0, OFFSETS - 1)


def train_denoiser(
    training_set: TrainingSet,
    seconds: float,
    device: torch.device,
    seed: int,
    checkpoints: Path | None = None,
) -> TextToLatents:
    """Train for so many seconds and return the averaged model."""
    torch.manual_seed(seed)
    painter = TextToLatents().to(device)
    optimizer = Muon(painter, PEAK_RATE, weight_decay=0.01)
    course = TrainingRun("painter", checkpoints, seconds, painter, optimizer)
    torch.manual_seed(seed * 1_000_003 + course.steps)
    with sdpa_kernel(SDPBackend.MATH):
        for share in course:
            course.learn(_loss(painter, training_set, share, device))
    average: TextToLatents = course.average.model  # type: ignore[assignment]
    return average


def _loss(painter: TextToLatents, training_set: TrainingSet, share: float, device: torch.device) -> torch.Tensor:
    scenes = torch.randint(len(training_set.latents), (BATCH,), device=device)
    wordings = torch.randint(CAPTIONS_PER_SCENE, (BATCH,), device=device)
    tokens = training_set.tokens[scenes, wordings]
    noise = torch.randn(BATCH, LATENT_CHANNELS, LATENT_EDGE, LATENT_EDGE, device=device)
    offsets = offsets_of(noise)
    target = pack_latents(training_set.latents[scenes, offsets[:, 0], offsets[:, 1]].float())
    start = pack_latents(noise)
    with torch.autocast(device.type, torch.bfloat16):
        if share >= ON_PATH_FROM and random.random() < 0.5:
            done = random.randrange(1, STEPS)
            sigmas = torch.full((BATCH,), 1.0 - done / STEPS, device=device)
            latents = euler_sample(painter, start, tokens, STEPS, stop=done)
        else:
            sigmas = draw_sigmas(BATCH, device)
            latents = torch.lerp(target, start, sigmas[:, None, None])
        velocity = painter(latents, tokens, sigmas)
    wanted = (latents - target) / sigmas[:, None, None]
    loss: torch.Tensor = (velocity.float() - wanted).square().mean()
    return loss


def draw_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Noise shares to train on, (count,): half on the four that four steps visit, half anywhere."""
    visited = 1.0 - torch.randint(STEPS, (count,), device=device) / STEPS
    anywhere = torch.rand(count, device=device) * 0.98 + 0.02
    return torch.where(torch.rand(count, device=device) < 0.5, visited, anywhere)


@torch.no_grad()
def euler_sample(
    painter: TextToLatents, noise: torch.Tensor, tokens: torch.Tensor, steps: int, stop: int | None = None
) -> torch.Tensor:
    """Take Euler steps from noise, packed (batch, 16, 64), to the image; only `stop` of them if given."""
    latents = noise
    for index in range(steps if stop is None else stop):
        sigmas = torch.full((len(noise),), 1.0 - index / steps, device=noise.device)
        latents = latents - painter(latents, tokens, sigmas).float() / steps
    return latents


@torch.no_grad()
def generate(
    painter: TextToLatents, autoencoder: AutoencoderTiny, scenes: list[Scene], device: torch.device, seed: int
) -> Pixels:
    """Paint the scenes' captions in STEPS steps, uint8 (scenes, EDGE, EDGE, 3)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (len(scenes), LATENT_CHANNELS, LATENT_EDGE, LATENT_EDGE)
    noise = torch.randn(shape, generator=generator).to(device)
    tokens = torch.tensor(tokenize([caption(scene) for scene in scenes]), device=device)
    latents = unpack_latents(euler_sample(painter, pack_latents(noise), tokens, STEPS))
    scaled = latents / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return to_images(autoencoder.decode(scaled).sample)


def score_denoiser(
    painter: TextToLatents, autoencoder: AutoencoderTiny, scenes: list[Scene], device: torch.device, seed: int = 1
) -> list[Score]:
    """Score one image of each scene."""
    images = generate(painter, autoencoder, scenes, device, seed)
    return [score(image, scene) for image, scene in zip(images, scenes, strict=True)]
