"""Pipelines of pixels, of codes and in stages: DDPM, DeepFloyd IF, Kandinsky, unCLIP, Amused and others."""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers import (
    AmusedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    Kandinsky3UNet,
    StableCascadeUNet,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UVit2DModel,
    VQModel,
)
from diffusers.pipelines.deepfloyd_if import IFWatermarker

from triptych.tools.families.cases import PROMPT, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.families.classes.stable_diffusion import FROM_IMAGE, checked, sd
from triptych.tools.families.classes.stable_diffusion_variants import prior
from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.text import WIDTH

_THREE: Final = {"num_inference_steps": 3}
_SQUARE: Final = {"height": 64, "width": 64}


def samples() -> list[Sample]:
    """Those of this module."""
    return [
        *_unconditional(),
        *_deep_floyd(),
        *_kandinsky(),
        *_kandinsky22(),
        *_unclip(),
        *_cascade(),
        *_codes(),
        *(Sample(name, unbuilt=f"diffusers cannot load its own {part} from a folder") for name, part in _LOST.items()),
    ]


_LOST: Final = {
    "AltDiffusionPipeline": "RobertaSeriesModelWithTransformation",
    "AltDiffusionImg2ImgPipeline": "RobertaSeriesModelWithTransformation",
    "BlipDiffusionPipeline": "ContextCLIPTextModel",
    "BlipDiffusionControlNetPipeline": "ContextCLIPTextModel",
    "VQDiffusionPipeline": "LearnedClassifierFreeSamplingEmbeddings",
    "VersatileDiffusionPipeline": "UNetFlatConditionModel",
    "VersatileDiffusionDualGuidedPipeline": "UNetFlatConditionModel",
    "VersatileDiffusionTextToImagePipeline": "UNetFlatConditionModel",
    "VersatileDiffusionImageVariationPipeline": "UNetFlatConditionModel",
}
"""Classes whose components have moved to where diffusers does not find them: it cannot load what it has saved."""


# Pixels -----------------------------------------------------------------------------------------------------------


def _pixels(**changes: Any) -> UNet2DModel:
    return UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **changes,
        }
    )


def _unconditional() -> list[Sample]:
    unet = {"unet": _pixels}
    small = (32, 32)
    codes = {"unet": lambda: _pixels(in_channels=4, out_channels=4), "vqvae": _movq}
    return [
        Sample("DDPMPipeline", unet, _THREE),
        Sample("DDIMPipeline", unet, _THREE),
        Sample("PNDMPipeline", unet, {"num_inference_steps": 8}),
        Sample("ScoreSdeVePipeline", unet, _THREE),
        Sample("KarrasVePipeline", unet, _THREE),
        Sample(
            "RePaintPipeline",
            {"unet": lambda: _pixels(sample_size=32)},
            {**_THREE, "image": input_image().resize(small), "mask_image": mask().resize(small), "jump_length": 1},
        ),
        Sample("LDMPipeline", codes, _THREE),
        Sample(
            "LDMSuperResolutionPipeline",
            {"unet": lambda: _pixels(in_channels=6, out_channels=3), "vqvae": lambda: _movq(latent_channels=3)},
            {**_THREE, "image": input_image().resize((32, 32))},
        ),
        Sample(
            "LDMTextToImagePipeline",
            {**sd(), "vqvae": lambda: vaes.kl(quant=True, shift=None), "bert": _bert, "tokenizer": _words},
            {"prompt": PROMPT, **_SQUARE, **_THREE},
        ),
        Sample(
            "PaintByExamplePipeline",
            {**sd(in_channels=9), **checked(), "image_encoder": _example},
            {**_THREE, "example_image": input_image(3), "image": input_image(), "mask_image": mask(), **_SQUARE},
        ),
    ]


def _words() -> Any:
    return text.tokenizer(start=True, length=77)


def _bert() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return LDMBertModel(
        LDMBertConfig(
            vocab_size=text.VOCABULARY_SIZE,
            d_model=WIDTH,
            encoder_layers=1,
            encoder_ffn_dim=2 * WIDTH,
            encoder_attention_heads=2,
            head_dim=16,
            max_position_embeddings=77,
            pad_token_id=text.PAD,
        )
    )


def _example() -> Any:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    return PaintByExampleImageEncoder(text.clip_vision().config, proj_size=WIDTH)


# DeepFloyd IF -----------------------------------------------------------------------------------------------------

_IF: Final[dict[str, Any]] = {
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}


def _deep_floyd() -> list[Sample]:
    small = {"image": input_image().resize((32, 32))}
    size = {"height": 32, "width": 32}
    first = _floyd(in_channels=3)
    second = _floyd(in_channels=6, class_embed_type="timestep", time_embedding_dim=WIDTH)
    says = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 3}
    start = {"strength": 0.7}
    paint = {"mask_image": mask().resize((32, 32))}
    larger = {"mask_image": mask(), "original_image": input_image()}
    return [
        Sample("IFPipeline", first, {**says, **size}),
        Sample("IFImg2ImgPipeline", first, {**says, **small, **start}),
        Sample("IFInpaintingPipeline", first, {**says, **small, **start, **paint}),
        Sample("IFSuperResolutionPipeline", second, {**says, **small, "height": 64, "width": 64}),
        Sample(
            "IFImg2ImgSuperResolutionPipeline",
            second,
            {**says, "image": input_image(), **start, "original_image": input_image(1)},
        ),
        Sample("IFInpaintingSuperResolutionPipeline", second, {**says, "image": input_image(), **start, **larger}),
    ]


def _floyd(**changes: Any) -> dict[str, Any]:
    text_embeds = {
        "encoder_hid_dim": WIDTH,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
    }
    return {
        "unet": lambda: UNet2DConditionModel(**{**_IF, **text_embeds, "act_fn": "gelu", **changes}),
        "tokenizer": lambda: text.tokenizer(start=False, length=77),
        "scheduler": lambda: DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": IFWatermarker,
        "requires_safety_checker": False,
    }


# Kandinsky --------------------------------------------------------------------------------------------------------


def _movq(**changes: Any) -> VQModel:
    return VQModel(
        **{
            "block_out_channels": [32] * 3,
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "num_vq_embeddings": 12,
            "vq_embed_dim": changes.get("latent_channels", 4),
            **changes,
        }
    )


def _spatial() -> VQModel:
    """With four levels: the pipelines take latents to be an eighth of an image."""
    return _movq(
        block_out_channels=[32] * 4,
        down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        norm_type="spatial",
    )


def _embedded(seed: int) -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


def _mclip() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    return MultilingualCLIP(
        MCLIPConfig(
            numDims=WIDTH,
            transformerDimensions=WIDTH,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=text.VOCABULARY_SIZE,
            pad_token_id=text.PAD,
        )
    )


def _two_stages(parts: dict[str, Any]) -> dict[str, Any]:
    """The same with what makes an embedding of an image of the text before."""
    made = {
        "prior": prior,
        "image_encoder": text.clip_vision_projection,
        "text_encoder": lambda: text.clip_text(projection=True, max_position_embeddings=77),
        "tokenizer": _words,
        "scheduler": lambda: UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "image_processor": text.clip_images,
    }
    return {**parts, **{f"prior_{name}": maker for name, maker in made.items()}}


def _painter(kind: str, channels: int, **changes: Any) -> Any:
    addition = {
        "text_image": {"encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": WIDTH},
        "image": {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": WIDTH},
        "image_hint": {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": WIDTH},
    }[kind]
    options = {**_IF, "in_channels": channels, "out_channels": 8, "addition_embed_type": kind, **addition, **changes}
    return lambda: UNet2DConditionModel(**options)


def _linear() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)


def _kandinsky() -> list[Sample]:
    embeds = {"image_embeds": _embedded(1), "negative_image_embeds": _embedded(2)}
    parts = {
        "text_encoder": _mclip,
        "tokenizer": _words,
        "unet": _painter("text_image", 4),
        "scheduler": _linear,
        "movq": _spatial,
    }
    painting = {**parts, "unet": _painter("text_image", 9)}
    says = {"prompt": PROMPT, **_SQUARE, **_THREE}
    from_image = {**says, "image": input_image(), "strength": 0.7}
    paint = {**says, "image": input_image(), "mask_image": mask()}
    both = {"prior_num_inference_steps": 2}
    third = {"unet": _third, "movq": _spatial, "tokenizer": _sentences, "scheduler": _squared}
    return [
        Sample("KandinskyPipeline", parts, {**says, **embeds}),
        Sample("KandinskyImg2ImgPipeline", parts, {**from_image, **embeds}),
        Sample("KandinskyInpaintPipeline", painting, {**paint, **embeds}),
        Sample("KandinskyPriorPipeline", _only_prior(), {"prompt": PROMPT, "num_inference_steps": 2}),
        Sample("KandinskyCombinedPipeline", _two_stages(parts), {**says, **both}),
        Sample("KandinskyImg2ImgCombinedPipeline", _two_stages(parts), {**from_image, **both}),
        Sample("KandinskyInpaintCombinedPipeline", _two_stages(painting), {**paint, **both}),
        Sample("Kandinsky3Pipeline", third, {**says, "negative_prompt": "grey"}),
        Sample("Kandinsky3Img2ImgPipeline", third, {**FROM_IMAGE, "image": input_image()}),
    ]


def _only_prior() -> dict[str, Any]:
    return {name.removeprefix("prior_"): maker for name, maker in _two_stages({}).items()}


def _third() -> Kandinsky3UNet:
    return Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=8,
        encoder_hid_dim=WIDTH,
    )


def _sentences() -> Any:
    return text.tokenizer(start=False, length=128)


def _squared() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)


def _kandinsky22() -> list[Sample]:
    embeds = {"image_embeds": _embedded(1), "negative_image_embeds": _embedded(2), **_SQUARE, **_THREE}
    hint = {"hint": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))}
    image = {"image": input_image()}
    start = {**image, "strength": 0.7}
    paint = {**image, "mask_image": mask()}
    parts = {"unet": _painter("image", 4), "scheduler": _learned, "movq": _spatial}
    painting = {**parts, "unet": _painter("image", 9)}
    hinted = {**parts, "unet": _painter("image_hint", 8)}
    says = {"prompt": PROMPT, **_SQUARE, **_THREE, "prior_num_inference_steps": 2}
    return [
        Sample("KandinskyV22Pipeline", parts, embeds),
        Sample("KandinskyV22Img2ImgPipeline", parts, {**embeds, **start}),
        Sample("KandinskyV22InpaintPipeline", painting, {**embeds, **paint}),
        Sample("KandinskyV22ControlnetPipeline", hinted, {**embeds, **hint}),
        Sample("KandinskyV22ControlnetImg2ImgPipeline", hinted, {**embeds, **start, **hint}),
        Sample("KandinskyV22PriorPipeline", _only_prior(), {"prompt": PROMPT, "num_inference_steps": 2}),
        Sample(
            "KandinskyV22PriorEmb2EmbPipeline",
            _only_prior(),
            {"prompt": PROMPT, "image": input_image(), "num_inference_steps": 3, "strength": 0.7},
        ),
        Sample("KandinskyV22CombinedPipeline", _two_stages(parts), says),
        Sample("KandinskyV22Img2ImgCombinedPipeline", _two_stages(parts), {**says, **start}),
        Sample("KandinskyV22InpaintCombinedPipeline", _two_stages(painting), {**says, **paint}),
    ]


def _learned() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)


# unCLIP, Wuerstchen, Cascade ----------------------------------------------------------------------------------------


def _unclip() -> list[Sample]:
    parts = {
        "prior": prior,
        "decoder": lambda: UNet2DConditionModel(**{**_IF, "class_embed_type": "identity"}),
        "text_encoder": lambda: text.clip_text(projection=True, max_position_embeddings=77),
        "text_proj": _projection,
        "super_res_first": _finer,
        "super_res_last": _finer,
        "prior_scheduler": lambda: UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": lambda: UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler,
        "feature_extractor": text.clip_images,
    }
    steps = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    return [
        Sample("UnCLIPPipeline", parts, {"prompt": PROMPT, "prior_num_inference_steps": 2, **steps}),
        Sample("UnCLIPImageVariationPipeline", parts, {"image": input_image(), **steps}),
    ]


def _projection() -> Any:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    return UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH)


def _finer() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        in_channels=6,
        out_channels=3,
        add_attention=False,
    )


def _cascade() -> list[Sample]:
    says = {"prompt": PROMPT, "negative_prompt": "grey"}
    # An image of this size is one of 3 x 3 numbers in the first of the two stages.
    size = {"height": 128, "width": 128}
    both = {**says, **size, "num_inference_steps": 2, "prior_num_inference_steps": 2}
    first = {"prior": _cascade_prior, "text_encoder": _projecting, "resolution_multiple": 42.67}
    second = {"decoder": _cascade_decoder, "text_encoder": _projecting, "vqgan": _paella}
    whole = {
        **second,
        "prior_prior": _cascade_prior,
        "prior_text_encoder": _projecting,
        "prior_feature_extractor": None,
        "prior_image_encoder": None,
    }
    old_first = {"prior": _old_prior, "text_encoder": _clip, "scheduler": DDPMWuerstchenScheduler}
    old_second = {"decoder": _old_decoder, "text_encoder": _clip, "vqgan": _paella}
    old_whole = {**old_second, "prior_prior": _old_prior, "prior_text_encoder": _clip}
    embedded = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    return [
        Sample("StableCascadePriorPipeline", first, {**says, **size, "num_inference_steps": 2}),
        Sample(
            "StableCascadeDecoderPipeline",
            second,
            {**says, "image_embeddings": embedded, "num_inference_steps": 2, "guidance_scale": 2.0},
        ),
        Sample("StableCascadeCombinedPipeline", whole, both),
        Sample("WuerstchenPriorPipeline", old_first, {**says, **size, "num_inference_steps": 2}),
        Sample(
            "WuerstchenDecoderPipeline",
            old_second,
            {**says, "image_embeddings": embedded, "num_inference_steps": 2, "guidance_scale": 2.0},
        ),
        Sample("WuerstchenCombinedPipeline", old_whole, both),
    ]


def _projecting() -> Any:
    return text.clip_text(projection=True, max_position_embeddings=77)


def _clip() -> Any:
    return text.clip_text(max_position_embeddings=77)


def _cascade_prior() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=WIDTH,
        block_out_channels=(WIDTH, WIDTH),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        switch_level=(False,),
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.0, 0.0),
    )


def _cascade_decoder() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=WIDTH,
        block_out_channels=(8, WIDTH),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        switch_level=None,
        effnet_in_channels=4,
        clip_text_pooled_in_channels=WIDTH,
        dropout=(0.0, 0.0),
    )


def _paella() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=16)


def _old_prior() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    return WuerstchenPrior(c_in=4, c=8, depth=1, c_cond=WIDTH, c_r=8, nhead=2)


def _old_decoder() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    return WuerstchenDiffNeXt(
        c_cond=WIDTH,
        c_hidden=[16],
        nhead=[-1],
        blocks=[1],
        level_config=["CT"],
        clip_embd=WIDTH,
        effnet_embd=4,
        inject_effnet=[False],
    )


# Codes ------------------------------------------------------------------------------------------------------------


def _codes() -> list[Sample]:
    parts = {"vqvae": _looked_up, "text_encoder": _projecting, "transformer": _uvit, "scheduler": _masking}
    says = {"prompt": PROMPT, "negative_prompt": "grey", **_THREE}
    start = {"image": input_image(), "strength": 0.7}
    return [
        Sample("AmusedPipeline", parts, {**says, **_SQUARE}),
        Sample("AmusedImg2ImgPipeline", parts, {**says, **start}),
        Sample("AmusedInpaintPipeline", parts, {**says, **start, "mask_image": mask()}),
    ]


def _masking() -> AmusedScheduler:
    return AmusedScheduler(mask_token_id=15)


def _looked_up() -> VQModel:
    return _movq(num_vq_embeddings=8, mid_block_add_attention=False, lookup_from_codebook=True)


def _uvit() -> UVit2DModel:
    return UVit2DModel(
        hidden_size=16,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=16,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.0,
        intermediate_size=16,
        layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )
