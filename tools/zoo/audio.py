"""Sound instead of pictures: AudioLDM, AudioLDM 2, MusicLDM, Stable Audio."""

from __future__ import annotations

from diffusers import (
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioProjectionModel,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from zoo.inputs import SPECIAL
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl, unet


MEL_BINS = 8
SECONDS = 0.032


@component("RobertaTokenizer")
def roberta_tokenizer() -> RobertaTokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    return RobertaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS
    )


def _clap_text_config() -> ClapTextConfig:
    return ClapTextConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TOKENS + 4,
        projection_dim=WIDTH,
    )


@component("ClapTextModelWithProjection")
def clap_text_model() -> ClapTextModelWithProjection:
    return ClapTextModelWithProjection(_clap_text_config())


@component("ClapModel")
@argument("text_encoder", "MusicLDM*")
def clap_model() -> ClapModel:
    audio = ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        intermediate_size=37,
        depths=[1, 1],
        num_attention_heads=[1, 1],
        num_hidden_layers=1,
        patch_size=4,
        patch_stride=4,
        patch_embeds_hidden_size=8,
        projection_dim=WIDTH,
    )
    return ClapModel(ClapConfig(text_config=_clap_text_config(), audio_config=audio, projection_dim=WIDTH))


@component("ClapFeatureExtractor")
def clap_feature_extractor() -> ClapFeatureExtractor:
    return ClapFeatureExtractor()


@component("SpeechT5HifiGan")
def vocoder() -> SpeechT5HifiGan:
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=MEL_BINS,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
        )
    )


@argument("vae", "AudioLDM*", "MusicLDM*")
def spectrogram_vae() -> AutoencoderKL:
    return autoencoder_kl(in_channels=1, out_channels=1)


@argument("unet", "AudioLDM*", "MusicLDM*")
def clap_unet() -> UNet2DConditionModel:
    """The text comes in as a class, one vector for a prompt."""
    return unet(
        cross_attention_dim=(16, 32),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )


@argument("unet", "AudioLDM2*")
def audioldm2_unet() -> AudioLDM2UNet2DConditionModel:
    return AudioLDM2UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(WIDTH, WIDTH),
        attention_head_dim=8,
    )


@component("AudioLDM2ProjectionModel")
def audioldm2_projection() -> AudioLDM2ProjectionModel:
    return AudioLDM2ProjectionModel(text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=WIDTH)


@component("GPT2LMHeadModel")
def language_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_head=2, n_layer=1, n_ctx=99, vocab_size=300, n_positions=99))


@component("AutoencoderOobleck")
def oobleck() -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[1, 2],
        sampling_rate=4,
    )


@component("StableAudioDiTModel")
def stable_audio_transformer() -> StableAudioDiTModel:
    return StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )


@component("StableAudioProjectionModel")
def stable_audio_projection() -> StableAudioProjectionModel:
    return StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32)


@component("EDMDPMSolverMultistepScheduler")
def edm_scheduler() -> EDMDPMSolverMultistepScheduler:
    return EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)


SPECIAL.update(
    {
        "AudioLDM*": {"audio_length_in_s": SECONDS},
        "MusicLDM*": {"audio_length_in_s": SECONDS},
        "AudioLDM2*": {"max_new_tokens": 4},
        "StableAudioPipeline": {"audio_end_in_s": 2.0},
    }
)
