"""Make the demo model of `examples/shapes/`: draw images, train on them, save a diffusers Flux folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from triptych.tools.shapes.autoencoder import peak_signal_to_noise, train_autoencoder
from triptych.tools.shapes.flow import make_training_set, score_denoiser, train_denoiser
from triptych.tools.shapes.model import save_model
from triptych.tools.shapes.scenes import held_out_scenes, training_scenes

EXAMPLES = """examples:
  python -m triptych.tools.train_shapes                              30 minutes, into examples/shapes
  python -m triptych.tools.train_shapes --minutes 10 --out /tmp/quick
  python -m triptych.tools.train_shapes --work /tmp/shapes-work      stop it and start it again: it goes on
  python -m triptych.tools.train_shapes --threads 1                  faster than 2 where others use the CPU too
"""
AUTOENCODER_SHARE = 0.35
DEFAULT_WORK = Path.home() / ".cache" / "triptych" / "shapes"


def main(arguments: list[str] | None = None) -> int:
    """Train, save and print the scores over the held-out scenes as one JSON object."""
    options = _parse(arguments)
    device = torch.device(_device(options.device))
    if options.threads:
        torch.set_num_threads(options.threads)
    seconds = options.minutes * 60.0
    work = options.work / f"seed-{options.seed}"
    autoencoder = train_autoencoder(seconds * AUTOENCODER_SHARE, device, options.seed, work)
    clearness = peak_signal_to_noise(autoencoder, device)
    _say(f"autoencoder: PSNR {clearness:.1f} dB; encoding the images")
    training_set = make_training_set(autoencoder, device, options.seed, training_scenes())
    painter = train_denoiser(training_set, seconds * (1.0 - AUTOENCODER_SHARE), device, options.seed, work)
    scores = score_denoiser(painter, autoencoder, list(held_out_scenes()), device)
    save_model(options.out, autoencoder, painter)
    for name in ("autoencoder", "painter"):
        (work / f"{name}.safetensors").unlink()
    _say(f"saved to {options.out}")
    shares = {name: sum(bool(asdict(one)[name]) for one in scores) / len(scores) for name in asdict(scores[0])}
    print(json.dumps({**shares, "held_out": len(scores), "psnr_db": round(clearness, 2)}))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triptych.tools.train_shapes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("examples/shapes"), help="the model folder to write")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time, both stages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="checkpoints, from which a run goes on")
    return parser.parse_args(arguments)


def _device(choice: str) -> str:
    if choice != "auto":
        return choice
    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
