"""First stage: the autoencoder, on drawings of training scenes and of freely coloured and placed shapes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional

from triptych.tools.shapes.model import make_autoencoder
from triptych.tools.shapes.optimizer import Muon
from triptych.tools.shapes.scenes import EDGE, JITTER, PALETTE, RADIUS, outline, scene_coverage, training_scenes
from triptych.tools.shapes.training import TrainingRun

BATCH = 32
PEAK_RATE = 3e-3
CUT_OUTS_UNTIL = 0.75
"""Share of the training on cut-outs of half the edge: a step costs a quarter and shows more outline."""
LATENT_NOISE = 0.05
"""Noise that the decoder learns to ignore: it stands for the transformer's errors."""


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images, (batch, 3, edge, edge) in [-1, 1], and the covers, (batch, 1, edge, edge), that made them."""

    images: torch.Tensor
    covers: torch.Tensor


def train_autoencoder(
    seconds: float, device: torch.device, seed: int, checkpoints: Path | None = None
) -> AutoencoderTiny:
    """Train for so many seconds; return the averaged model, its latents scaled to mean 0, deviation 1."""
    torch.manual_seed(seed)
    model = make_autoencoder().to(device=device, memory_format=torch.channels_last)
    optimizer = Muon(model, PEAK_RATE)
    course = TrainingRun("autoencoder", checkpoints, seconds, model, optimizer)
    chooser = random.Random(seed * 1_000_003 + course.steps)
    for share in course:
        batch = draw_batch(BATCH, chooser, device, EDGE // 2 if share < CUT_OUTS_UNTIL else EDGE)
        course.learn(_loss(model, batch, device))
    average: AutoencoderTiny = course.average.model
    _scale_latents(average, device)
    return average


def draw_batch(count: int, chooser: random.Random, device: torch.device, edge: int = EDGE) -> ImageBatch:
    """Half training scenes, half shapes of any colour, radius and place, so that the decoder knows all edges.

    With an edge below EDGE the images are cut-outs, with the scenes' shapes anywhere in them.
    """
    scenes = training_scenes()
    covers, colours, grounds = [], [], []
    for index in range(count):
        scene = chooser.choice(scenes)
        x, y = chooser.uniform(0.1, 0.9) * edge, chooser.uniform(0.1, 0.9) * edge
        if index % 2 and edge == EDGE:
            dx, dy = chooser.randint(-JITTER, JITTER), chooser.randint(-JITTER, JITTER)
            covers.append(scene_coverage(scene.size, scene.shape, scene.place, dx, dy))
        elif index % 2:
            covers.append(outline(scene.shape, round(x), round(y), RADIUS[scene.size], edge))
        else:
            covers.append(outline(scene.shape, x, y, chooser.uniform(6, 15), edge))
        colours.append(PALETTE[scene.colour] if index % 2 else _any_colour(chooser))
        grounds.append(PALETTE[scene.background] if index % 2 else _any_colour(chooser))
    cover = torch.from_numpy(np.stack(covers)).to(device)[:, None]
    colour = torch.tensor(colours, dtype=torch.float32, device=device)[..., None, None]
    ground = torch.tensor(grounds, dtype=torch.float32, device=device)[..., None, None]
    images = (ground + (colour - ground) * cover) / 127.5 - 1.0
    return ImageBatch(images.contiguous(memory_format=torch.channels_last), cover)


def _any_colour(chooser: random.Random) -> tuple[int, int, int]:
    return chooser.randint(0, 255), chooser.randint(0, 255), chooser.randint(0, 255)


def _loss(model: AutoencoderTiny, batch: ImageBatch, device: torch.device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        latents = model.encoder(batch.images)
        decoded = model.decoder(latents + LATENT_NOISE * torch.randn_like(latents))
    latents, decoded = latents.float(), decoded.float()
    edge = functional.max_pool2d(((batch.covers > 0) & (batch.covers < 1)).float(), 3, stride=1, padding=1)
    weight = 1.0 + 4.0 * edge
    error = decoded - batch.images
    steepness = _slopes(error).abs().mean() * 0.5
    miss = (weight * (error.abs() + error.square())).mean()
    loss: torch.Tensor = miss + steepness + 1e-4 * latents.square().mean()
    return loss


def _slopes(images: torch.Tensor) -> torch.Tensor:
    across = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    return torch.cat([across.flatten(1), down.flatten(1)], dim=1)


@torch.no_grad()
def _scale_latents(model: AutoencoderTiny, device: torch.device) -> None:
    batch = draw_batch(512, random.Random(0), device)
    latents = model.encode(batch.images[1::2]).latents
    mean, deviation = float(latents.mean()), float(latents.std())
    model.register_to_config(shift_factor=mean, scaling_factor=1.0 / deviation)


@torch.no_grad()
def peak_signal_to_noise(model: AutoencoderTiny, device: torch.device) -> float:
    """Measure the mean PSNR in dB over 128 drawings of training scenes, for pixels in [0, 1]."""
    batch = draw_batch(256, random.Random(1), device)
    images = batch.images[1::2]
    decoded = model.decode(model.encode(images).latents).sample.clamp(-1.0, 1.0)
    errors = nn.functional.mse_loss(decoded / 2, images / 2, reduction="none").mean((1, 2, 3))
    return float((-10.0 * errors.log10()).mean())


@torch.no_grad()
def normalized_latents(model: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Encode images to latents, (batch, 16, EDGE / 8, EDGE / 8), scaled as the pipeline expects them."""
    if images.shape[-2:] != (EDGE, EDGE):
        raise ValueError(f"images of {EDGE} x {EDGE} pixels are needed, these are {tuple(images.shape)}")
    latents: torch.Tensor = model.encode(images).latents
    scaled: torch.Tensor = (latents - model.config.shift_factor) * model.config.scaling_factor
    return scaled
