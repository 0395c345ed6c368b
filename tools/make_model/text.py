"""Tokenizers that know every byte, and tiny text and vision encoders."""

from __future__ import annotations

from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_LENGTH: Final = 64
"""Tokens, each a byte."""
WIDTH: Final = 32
"""Of the hidden states of every encoder."""
LONG: Final = 4096
"""Tokens that the encoders with chat templates take."""

# Byte-level: every text has tokens, and different texts have different ones.
SPECIAL: Final = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
PAD, END, START, UNKNOWN = range(len(SPECIAL))
VOCABULARY_SIZE: Final = len(SPECIAL) + 256
T5: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 2 * WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
}
_CLIP: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TEXT_LENGTH,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
# Those of vision models come after the bytes.
_VISION: Final = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")
VISION_VOCABULARY_SIZE: Final = VOCABULARY_SIZE + len(_VISION)
_VISION_IDS: Final = {token: VOCABULARY_SIZE + number for number, token in enumerate(_VISION)}
CHAT: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
_CLIP_VISION: Final[dict[str, Any]] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "projection_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_DECODER: Final[dict[str, Any]] = {
    "vocab_size": VISION_VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONG,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def tokenizer(*, start: bool, length: int = TEXT_LENGTH) -> PreTrainedTokenizerFast:
    """One for encoders of T5 and CLIP (`start`: it begins with a token of its own), for texts of `length` tokens."""
    template = "<s> $A </s>" if start else "$A </s>"
    return _bytes(template, model_max_length=length)


def chat_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One for language models, with a chat template and the tokens of images."""
    return _bytes("$A", model_max_length=LONG, chat_template=CHAT, additional_special_tokens=list(_VISION), **options)


def _bytes(template: str, **options: Any) -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", START), ("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL, **{"padding_side": "right", **options})


def clip_text(*, projection: bool = False, **changes: Any) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The text encoder of CLIP, with its projection or without."""
    config = CLIPTextConfig(**{**_CLIP, **changes})
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5(**changes: Any) -> T5EncoderModel:
    """The encoder of T5 1.1."""
    return T5EncoderModel(T5Config(**{**T5, "feed_forward_proj": "gated-gelu", **changes}))


def umt5() -> UMT5EncoderModel:
    """The encoder of UMT5."""
    return UMT5EncoderModel(UMT5Config(**T5))


def clip_vision(**changes: Any) -> CLIPVisionModel:
    """The image encoder of CLIP, for images of 32 pixels."""
    return CLIPVisionModel(CLIPVisionConfig(**{**_CLIP_VISION, **changes}))


def clip_vision_projection(**changes: Any) -> CLIPVisionModelWithProjection:
    """The same with its projection."""
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**_CLIP_VISION, **changes}))


def clip_images() -> CLIPImageProcessorPil:
    """The image processor of `clip_vision`."""
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def siglip_vision_config(**changes: Any) -> SiglipVisionConfig:
    """The image encoder of SigLIP, for images of 32 pixels."""
    config = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionConfig(**{**config, "image_size": 32, "patch_size": 16, **changes})


def siglip_vision(**changes: Any) -> SiglipVisionModel:
    """That encoder."""
    return SiglipVisionModel(siglip_vision_config(**changes))


def qwen2_vl_processor() -> Qwen2VLProcessor:
    """The processor of `qwen2_5_vl`: its tokenizer and its image processor.

    Raises:
        ImportError: There is no torchvision, which its part for videos needs even where there is none.
    """
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return Qwen2VLProcessor(
        image_processor=processor,
        tokenizer=chat_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def qwen3_vl_processor() -> Qwen3VLProcessor:
    """The processor of `qwen3_vl`; raises as `qwen2_vl_processor` does."""
    # Each of its tokens stands for a patch of the VAE's latents, so it sees images as large as that does.
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024}, patch_size=16)
    return Qwen3VLProcessor(
        image_processor=processor,
        tokenizer=chat_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT,
    )


def qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    """The language model with eyes of Qwen-Image."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
        "window_size": 56,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**_DECODER, "rope_parameters": rope, "rope_scaling": rope},
            vision_config=vision,
            **_token_ids(),
        )
    )


def qwen3(cls: Any, layers: int = 2) -> Any:
    """A model of Qwen 3 of some class."""
    return cls(Qwen3Config(**{**_DECODER, "num_hidden_layers": layers, "head_dim": 16}))


def qwen3_vl(cls: Any, layers: int = 2) -> Any:
    """A model of Qwen 3 with eyes, of some class."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = {**_DECODER, "num_hidden_layers": layers, "head_dim": 16, "rope_parameters": rope, "rope_scaling": rope}
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    return cls(Qwen3VLConfig(text_config=text, vision_config=vision, **_token_ids()))


def qwen3_5_vl() -> Qwen3_5ForConditionalGeneration:
    """Qwen 3.5 with eyes: one layer of linear attention, one of the usual."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    made = {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "rope_parameters": {**rope, "partial_rotary_factor": 0.5},
    }
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 64,
    }
    config = Qwen3_5Config(text_config={**_DECODER, **made}, vision_config=vision, **_token_ids())
    return Qwen3_5ForConditionalGeneration(config)


def decoder_config(**changes: Any) -> dict[str, Any]:
    """The configuration of a tiny language model, for the families that have one of another maker."""
    return {**_DECODER, **changes}


def _token_ids() -> dict[str, int]:
    return {
        "vision_start_token_id": _VISION_IDS["<|vision_start|>"],
        "vision_end_token_id": _VISION_IDS["<|vision_end|>"],
        "image_token_id": _VISION_IDS["<|image_pad|>"],
        "video_token_id": _VISION_IDS["<|video_pad|>"],
    }
