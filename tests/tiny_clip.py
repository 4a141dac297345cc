"""A CLIP model small enough to make in a test, with the real classes, and pictures to score."""

import string

import numpy as np
import torch
from PIL import Image


WORDS = ("a", "green", "rabbit", "two", "dogs", "red")
PROMPTS = ["a green rabbit", "two dogs", "a green rabbit", "", "two red dogs, a rabbit"]


def tokenizer():
    """Letters and a few words; [EOS] has the highest id, as in CLIP."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, ",", "."]
    merges, pieces = [], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            pieces.append(parts[0])
    tokens = [*letters, *(letter + "</w>" for letter in letters), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)))


def config(vocab_size, eos_token_id, layers=2, hidden_act="quick_gelu"):
    from transformers import CLIPConfig

    both = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_act": hidden_act}
    return CLIPConfig(
        text_config={
            "hidden_size": 12,
            "intermediate_size": 24,
            "vocab_size": vocab_size,
            "max_position_embeddings": 20,
            "eos_token_id": eos_token_id,
            **both,
        },
        vision_config={"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14, **both},
        projection_dim=10,
    )


def model(seed=0, **settings):
    """Random, with weights large enough for the scores to differ."""
    from transformers import CLIPModel

    words = tokenizer()
    made = CLIPModel(config(len(words), words.eos_token_id, **settings)).eval()
    randomize(made.state_dict(), seed)
    return made


def randomize(tensors, seed):
    """Small biases and large embeddings, so that what is scored matters more than what is added to everything."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("logit_scale"):
            tensor.fill_(4.6)
        elif key.endswith(("norm1.weight", "norm2.weight", "norm.weight", "layrnorm.weight")):
            tensor.copy_(1 + 0.1 * noise)
        elif key.endswith("bias"):
            tensor.copy_(0.1 * noise)
        elif "embedding" in key:
            tensor.copy_(noise)
        elif tensor.is_floating_point():
            tensor.copy_(0.4 * noise)


def image_processor(size):
    """transformers' own preprocessing on Pillow; early versions of transformers 5 had one class, which was this."""
    import transformers

    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    processor_class = getattr(transformers, name)
    return processor_class(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def pictures(count=5):
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (30 + 5 * index, 41, 3), dtype=np.uint8)) for index in range(count)
    ]


def save(folder, seed=0):
    """A folder as on the Hub: model and tokenizer. Returns the model."""
    made = model(seed)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return made
