"""HunyuanVideo from a picture, which a LLaVA reads with the prompt."""

from __future__ import annotations

from diffusers import HunyuanVideoTransformer3DModel
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Tokenizer

from zoo.hunyuan import CHANNELS, FRAMES, hunyuan_video_transformer
from zoo.inputs import SPECIAL, picture
from zoo.language_models import language_settings, qwen_tokenizer
from zoo.registry import argument, component


PICTURE_TOKENS = 4
LLAMA_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
SPECIAL.update(
    {
        "HunyuanVideoImageToVideo*": {
            "image": [picture(0), picture(1)],  # one for each prompt
            "num_frames": FRAMES,
            "max_sequence_length": 64,
            # the pipeline cuts off three tokens before the prompt, and the four of the last header behind it
            "prompt_template": {
                "template": "<|end_header_id|><image>:{}<|eot_id|><|start_header_id|>a<|end_header_id|>\n",
                "crop_start": 3,
                "image_emb_start": 1,
                "image_emb_end": 1 + PICTURE_TOKENS,
                "image_emb_len": PICTURE_TOKENS,
            },
        }
    }
)


@argument("tokenizer", "HunyuanVideoImageToVideo*")
def llama_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(LLAMA_SPECIAL, special_tokens=True)
    return tokenizer


@component("LlavaForConditionalGeneration")
def llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config={"model_type": "llama", **language_settings()},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        image_token_index=llama_tokenizer().convert_tokens_to_ids("<image>"),
    )
    config.pad_token_id = 0  # which the pipeline reads
    return LlavaForConditionalGeneration(config)


@argument("transformer", "HunyuanVideoImageToVideo*")
def hunyuan_picture_transformer() -> HunyuanVideoTransformer3DModel:
    """The picture's latents and a mask are channels beside the noisy ones."""
    return hunyuan_video_transformer(
        in_channels=2 * CHANNELS + 1, guidance_embeds=False, image_condition_type="latent_concat"
    )
