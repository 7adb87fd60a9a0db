"""Make the golden checkpoints and their logits: tiny random models of each family, run in f32 by transformers.

    python -m venv venv && venv/bin/pip install torch transformers && venv/bin/python make.py

For each case: NAME/ is a Hugging Face checkpoint, NAME.safetensors has `tokens` [n] and `logits` [n, vocab_size] of one
forward pass with eager attention. Weights are drawn so that attention is far from uniform, and each case is checked to
depend on what it is there for: with the feature taken away, some logit moves by more than 0.05.

Made with torch 2.15 and transformers 5.23. Another version may store other configuration keys; logits stay the same.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

HERE = Path(__file__).parent
TOKENS = 48
SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.02,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)


def rope(kind, theta, **keys):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **keys))


LLAMA3 = rope("llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0)


def old_keys(name):
    """rope_parameters as checkpoints had it before: rope_theta, and rope_scaling with its type under `name`."""
    def rewrite(config):
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        scaling[name] = scaling.pop("rope_type")
        config["rope_scaling"] = scaling
    return rewrite


def drop(*names):
    return lambda config: [config.pop(name) for name in names]


# name: (config, model, keys, stored type, changes to config.json, what the logits must depend on, save options)
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(head_dim=8, tie_word_embeddings=False, **LLAMA3), torch.bfloat16,
              [old_keys("rope_type")], rope("default", 500.0), dict(max_shard_size="8KB")),
    "llama-bias": (LlamaConfig, LlamaForCausalLM,
                   dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True,
                        mlp_bias=True, **rope("linear", 10000.0, factor=4.0)), torch.float32,
                   [old_keys("type"), drop("head_dim")], rope("default", 10000.0), {}),
    "mistral": (MistralConfig, MistralForCausalLM,
                dict(num_attention_heads=6, head_dim=8, sliding_window=7, tie_word_embeddings=False,
                     **rope("default", 10000.0)), torch.float16, [], dict(sliding_window=None), {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM,
              dict(num_attention_heads=2, num_key_value_heads=2, use_sliding_window=True, sliding_window=5,
                   max_window_layers=1, tie_word_embeddings=True, **rope("default", 1000000.0)), torch.float16,
              [drop("layer_types")], dict(use_sliding_window=False, sliding_window=None, layer_types=None), {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM,
              dict(num_attention_heads=6, head_dim=8, tie_word_embeddings=True, **rope("default", 1000000.0)),
              torch.bfloat16, [], rope("default", 10.0), {}),
    "yarn": (LlamaConfig, LlamaForCausalLM, dict(head_dim=8, tie_word_embeddings=False, **YARN), torch.float16, [],
             rope("default", 100.0), {}),
}


def randomise(model, generator):
    """Weights that keep activations near 1, attention scores of a few units, and no norm or bias that could be left out."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith(".bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = noise
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            value = gain * noise / weight.shape[1] ** 0.5
        weight.data = value


def logits(model_class, config, weights, tokens):
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def main():
    total = 0
    for seed, (name, (config_class, model_class, keys, dtype, changes, without, save)) in enumerate(CASES.items()):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        generator = torch.Generator().manual_seed(seed)
        config = config_class(**{**SIZES, **keys})
        model = model_class(config)
        randomise(model, generator)
        model = model.to(dtype)
        model.save_pretrained(folder, **save)
        (folder / "generation_config.json").unlink(missing_ok=True)
        stored = json.loads((folder / "config.json").read_text())
        stored.pop("transformers_version")
        for change in changes:
            change(stored)
        (folder / "config.json").write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")

        weights = {key: value.float() for key, value in model.state_dict().items()}
        tokens = torch.randint(SIZES["vocab_size"], (TOKENS,), generator=generator)
        expected = logits(model_class, config, weights, tokens)
        ablated = logits(model_class, config_class(**{**SIZES, **keys, **without}), weights, tokens)
        effect = (expected - ablated).abs().max().item()
        assert effect > 0.05, f"{name}: the logits hardly depend on {without} ({effect})"
        save_file({"tokens": tokens.int(), "logits": expected.contiguous()}, HERE / f"{name}.safetensors")
        size = sum(file.stat().st_size for file in [*folder.iterdir(), HERE / f"{name}.safetensors"])
        total += size
        print(f"{name}: {size} bytes, logits up to {expected.abs().max():.2f}, without the feature they move by {effect:.2f}")
    print(f"{total} bytes")
    assert total <= 200_000


main()
