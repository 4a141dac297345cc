"""Old families, one or two pipelines each: discrete latents, several networks under other names, text encoders of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    BlockRefinementScheduler,
    HeunDiscreteScheduler,
    PriorTransformer,
    Transformer2DModel,
    UNet2DConditionModel,
    UniDiffuserModel,
    UniDiffuserTextDecoder,
    UVit2DModel,
    VQDiffusionScheduler,
    VQModel,
)
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.shap_e import ShapERenderer
from transformers import CLIPTokenizer, GPT2Tokenizer

from zoo.flux import flux_transformer
from zoo.inputs import SPECIAL, picture
from zoo.kandinsky import ROBERTA
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl, clip_tokenizer, unet


# ---------------------------------------------------------------- AltDiffusion, latent diffusion (LDM)


@component("RobertaSeriesModelWithTransformation")
def roberta_series() -> RobertaSeriesModelWithTransformation:
    return RobertaSeriesModelWithTransformation(RobertaSeriesConfig(project_dim=WIDTH, **ROBERTA))


@component("LDMBertModel")
@argument("bert", "LDMTextToImage*")
def ldm_bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=78,
            max_position_embeddings=128,
            d_model=WIDTH,
            encoder_layers=1,
            encoder_ffn_dim=37,
            encoder_attention_heads=2,
            head_dim=16,
        )
    )


@argument("tokenizer", "LDMTextToImage*")
def ldm_tokenizer() -> CLIPTokenizer:
    return clip_tokenizer()


@argument("vqvae", "LDMTextToImage*")
def ldm_autoencoder() -> AutoencoderKL:
    return autoencoder_kl()


# ---------------------------------------------------------------- discrete latents


@argument("vqvae", "Amused*")
def amused_vqvae() -> VQModel:
    return VQModel(
        act_fn="silu",
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=32,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )


@component("UVit2DModel")
def amused_transformer() -> UVit2DModel:
    return UVit2DModel(
        hidden_size=16,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=32,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.0,
        intermediate_size=32,
        layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )


@component("AmusedScheduler")
def amused_scheduler() -> AmusedScheduler:
    return AmusedScheduler(mask_token_id=31)


@argument("vqvae", "VQDiffusion*")
def vq_diffusion_vqvae() -> VQModel:
    return VQModel(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        norm_num_groups=8,
        num_vq_embeddings=12,
        vq_embed_dim=3,
    )


@argument("transformer", "VQDiffusion*")
def vq_diffusion_transformer() -> Transformer2DModel:
    return Transformer2DModel(
        attention_bias=True,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=12,
        num_vector_embeds=12,
        norm_num_groups=8,
        sample_size=8,
        activation_fn="geglu-approximate",
    )


@component("VQDiffusionScheduler")
def vq_diffusion_scheduler() -> VQDiffusionScheduler:
    return VQDiffusionScheduler(num_vec_classes=12)


@component("LearnedClassifierFreeSamplingEmbeddings")
def learned_embeddings() -> LearnedClassifierFreeSamplingEmbeddings:
    return LearnedClassifierFreeSamplingEmbeddings(learnable=False)


# ---------------------------------------------------------------- several networks: UniDiffuser, Versatile Diffusion, Shap-E


@component("UniDiffuserModel")
def unidiffuser() -> UniDiffuserModel:
    return UniDiffuserModel(
        text_dim=WIDTH,
        clip_img_dim=WIDTH,
        num_text_tokens=TOKENS,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=16,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        norm_type="layer_norm",
        block_type="unidiffuser",
        ff_final_dropout=True,
        use_data_type_embedding=False,
    )


@component("UniDiffuserTextDecoder")
def unidiffuser_text_decoder() -> UniDiffuserTextDecoder:
    return UniDiffuserTextDecoder(
        prefix_length=TOKENS,
        prefix_inner_dim=WIDTH,
        prefix_hidden_dim=WIDTH,
        vocab_size=256,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_inner=37,
    )


@component("GPT2Tokenizer")
def gpt2_tokenizer() -> GPT2Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        tokens = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", *(str(digit) for digit in range(10))]
        (Path(folder) / "vocab.json").write_text(
            "{" + ", ".join(f'"{token}": {index}' for index, token in enumerate(tokens)) + "}"
        )
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return GPT2Tokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")


@argument("image_unet", "VersatileDiffusion*")
def versatile_image_unet() -> UNet2DConditionModel:
    return unet()


@component("UNetFlatConditionModel")
def versatile_text_unet() -> UNetFlatConditionModel:
    return UNetFlatConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@component("HeunDiscreteScheduler")
def heun_scheduler() -> HeunDiscreteScheduler:
    return HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
    )


@argument("prior", "ShapE*")
def shap_e_prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        embedding_dim=WIDTH // 2,
        num_embeddings=WIDTH,
        embedding_proj_dim=WIDTH,
        time_embed_dim=32,
        num_layers=1,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )


@component("ShapERenderer")
def shap_e_renderer() -> ShapERenderer:
    return ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=WIDTH // 2,
        d_hidden=8,
        n_output=12,
        background=(0.1,) * 3,
    )


# ---------------------------------------------------------------- diffusion of text


@argument("model", "LLaDA2*", "DiffusionGemma*")
@argument("processor", "DiffusionGemma*")
def no_language_model() -> None:
    """They write text, so it does not matter which."""
    return None


@component("BlockRefinementScheduler")
@argument("scheduler", "DiffusionGemma*")
def block_refinement_scheduler() -> BlockRefinementScheduler:
    return BlockRefinementScheduler()


# ---------------------------------------------------------------- FLUX Kontext and Redux


@component("ReduxImageEncoder")
def redux_image_encoder() -> ReduxImageEncoder:
    return ReduxImageEncoder(redux_dim=WIDTH, txt_in_features=WIDTH)


@argument("transformer", "FluxKontext*")
def kontext_transformer():
    return flux_transformer()


SPECIAL.update(
    {
        "AltDiffusionImg2Img*": {"image": picture(), "strength": 0.75},
        "AmusedImg2Img*": {"image": picture(), "strength": 0.75},
        "AmusedInpaint*": {"image": picture(), "mask_image": picture(1, mode="L"), "strength": 0.75},
        "VersatileDiffusionDualGuided*": {"image": [picture(), picture(1)]},
        "Flux2KleinKV*": {"image": picture(size=64)},  # what its cache is for
        "FluxKontext*": {"image": picture(), "max_area": 16 * 16, "_auto_resize": False},
        "FluxKontextInpaint*": {"mask_image": picture(1, mode="L")},
    }
)
