"""The requests that are run, of families that make videos and sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.minimax_h3 import (
    MiniMaxH3AudioReference,
    MiniMaxH3ImageReference,
    MiniMaxH3VideoReference,
)
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from triptych.tools.families.case import SIDE, SQUARE, VIDEO, VISION, Case, input_image, video_frames
from triptych.tools.make_model import Family


def video_cases() -> list[Case]:
    """Those of all families but Wan."""
    image = {"image": input_image()}
    text = {"max_sequence_length": 64, "negative_prompt": "grey"}
    frames = {**SQUARE, "num_frames": 9}
    remembering = {"height": SIDE, "width": SIDE, "num_frames": 9, "sigmas": [1.0, 0.6, 0.3, 0.0], **image}
    glyphs = {**VIDEO, "prompt": 'a red sign that says "open"', "negative_prompt": "grey"}
    return [
        Case("LTXModularPipeline", "text2video", Family.LTX, {**frames, **text}),
        Case("LTXModularPipeline", "image2video", Family.LTX, {**frames, **text, **image}),
        *_ltx2("LTX2ModularPipeline", Family.LTX2),
        *_ltx2("LTX25ModularPipeline", Family.LTX25),
        Case("EchoModularPipeline", "", Family.ECHO, remembering),
        Case("HunyuanVideo15ModularPipeline", "text2video", Family.HUNYUAN_VIDEO15, glyphs),
        Case("HunyuanVideo15ModularPipeline", "image2video", Family.HUNYUAN_VIDEO15, {**glyphs, **image}),
        *_cosmos3(),
        *_animate2(),
        *_minimax(),
    ]


def _ltx2(pipeline: str, family: Family) -> list[Case]:
    text = {**SQUARE, "max_sequence_length": 64, "negative_prompt": "grey"}
    frames = {**text, "num_frames": 9}
    # The later one guesses how many frames it takes, if it is not told.
    guessed = {**text, "min_seconds": 0.3, "max_seconds": 0.8} if family is Family.LTX25 else frames
    conditions = [LTX2VideoCondition(input_image()), LTX2VideoCondition(video_frames(8), index=1, strength=0.5)]
    references = [LTX2ReferenceCondition(video_frames(9), strength=0.8)]
    return [
        Case(pipeline, "text2video", family, guessed),
        Case(pipeline, "image2video", family, {**frames, "image": input_image()}),
        Case(pipeline, "condition", family, {**frames, "conditions": conditions}),
        Case(pipeline, "in_context", family, {**frames, "reference_conditions": references}),
    ]


def _animate2() -> list[Case]:
    # The frames are more than one segment has.
    moved = {**SQUARE, "image": input_image(), "driving_video": video_frames(8), "segment_frame_length": 5}
    text = {"max_sequence_length": 64}
    return [
        Case("WanAnimate2ModularPipeline", "", Family.WAN_ANIMATE2, {**moved, **text, "negative_prompt": "grey"}),
        Case("WanAnimate2DistilledModularPipeline", "", Family.WAN_ANIMATE2_DISTILLED, {**moved, **text}),
    ]


def _cosmos3() -> list[Case]:
    omni, distilled = "Cosmos3OmniModularPipeline", "Cosmos3DistilledModularPipeline"
    size = {"height": SIDE, "width": 48}
    tasks: dict[str, dict[str, Any]] = {
        "text2image": {**size, "num_frames": 1},
        "text2video": {**size, "num_frames": 5},
        "image2video": {**size, "num_frames": 5, "image": input_image()},
        "video2video": {**size, "num_frames": 9, "video": video_frames(5)},
    }
    guided = {"num_inference_steps": 3, "negative_prompt": "grey"}
    made = [Case(distilled, task, Family.COSMOS3_DISTILLED, inputs) for task, inputs in tasks.items()]
    made += [Case(omni, task, Family.COSMOS3, {**inputs, **guided}) for task, inputs in tasks.items()]
    made += [
        Case(omni, f"{task}_with_sound", Family.COSMOS3, {**inputs, **guided})
        for task, inputs in tasks.items()
        if task != "text2image"
    ]
    sight: dict[str, dict[str, Any]] = {
        "policy": {"image": input_image()},
        "forward_dynamics": {"image": input_image(), "raw_actions": torch.linspace(-1, 1, 8).reshape(4, 2)},
        "inverse_dynamics": {"video": video_frames(5)},
    }
    for mode, seen in sight.items():
        action = CosmosActionCondition(mode=mode, chunk_size=4, domain_name="pusht", resolution_tier=256, **seen)
        made.append(Case(omni, f"action_{mode}", Family.COSMOS3, {**guided, "action": action}))
    return made


def _minimax() -> list[Case]:
    pipeline, family = "MiniMaxH3ModularPipeline", Family.MINIMAX_H3
    base = {"height": 32, "width": 48, "num_frames": 124, "num_inference_steps": 2}
    sound = torch.sin(torch.linspace(0, 300, 800)).repeat(2, 1)
    references = [
        MiniMaxH3ImageReference(input_image()),
        MiniMaxH3VideoReference(video_frames(12), fps=12.0, audio=sound, sample_rate=400),
        MiniMaxH3AudioReference(sound, sample_rate=400),
    ]
    # More than fits into one of its windows.
    song = {"lyrics": "[verse]\nOh ship\n", "audio_duration": 4.2, "num_inference_steps": 2}
    return [
        Case(pipeline, "t2va", family, base, VISION),
        Case(pipeline, "fl2va", family, {**base, "image": input_image(), "last_image": input_image(1)}, VISION),
        Case(pipeline, "ref2va", family, {**base, "references": references}, VISION),
        Case("MiniMaxMusic3ModularPipeline", "", Family.MINIMAX_MUSIC3, song),
    ]
