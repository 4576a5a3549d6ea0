"""Makes tiny_llama/: a random Llama-3.2-like model and its logits by Hugging Face transformers.

python make_tiny_llama.py [--out tiny_llama]      (needs torch, transformers, safetensors)

The model is small but takes every turn: llama3 rotary scaling whose three wavelength bands all have
frequencies, grouped queries, a head_dim that hidden_size does not imply, biases, tied embeddings.
Weights are BF16 values, arithmetic is F32. Keys and values pass through F16 on their way into the
cache, as they do in innerq, so that the comparison can be tight.
"""
import argparse
import json
import os

import torch
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
import transformers

NUM_TOKENS = 75  # three pages of 32 tokens, the last one partly filled
POSITIONS = [0, 1, 31, 32, 63, 64, 74]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "attention_bias": True, "mlp_bias": True, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "bos_token_id": 1, "eos_token_id": [2, 3]}


class HalfCache(DynamicCache):
    """A cache that holds F16."""

    def update(self, key, value, *args, **kwargs):
        return super().update(key.half().float(), value.half().float(), *args, **kwargs)


def hugging_face_config():
    """CONFIG as transformers 5 spells it: rotary parameters in one dictionary."""
    values = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "rope_scaling")}
    values["rope_parameters"] = {"rope_theta": CONFIG["rope_theta"], **CONFIG["rope_scaling"]}
    return LlamaConfig(**values, attn_implementation="eager")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--out", default=os.path.join(here, "tiny_llama"))
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(20260223)
    config = hugging_face_config()
    model = LlamaForCausalLM(config).eval()
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        else:  # a deviation that makes attention decided and logits far apart
            value = 1.5 * noise / parameter.shape[1] ** 0.5
        tensors[name] = value.to(torch.bfloat16)
        parameter.data = tensors[name].float()
    model.tie_weights()
    tokens = torch.randint(4, config.vocab_size, (1, NUM_TOKENS), generator=generator)
    tokens[0, 0] = 1
    with torch.no_grad():
        logits = model(tokens, past_key_values=HalfCache(), use_cache=True).logits[0]

    path = os.path.join(args.out, "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    with open(os.path.join(args.out, "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=2)
        file.write("\n")
    golden = {
        "transformers": transformers.__version__, "token_ids": tokens[0].tolist(),
        "positions": POSITIONS,
        "inverse_frequencies": [float(f"{x:.8g}") for x in model.model.rotary_emb.inv_freq],
        "logits": [[float(f"{x:.7g}") for x in logits[p]] for p in POSITIONS]}
    with open(os.path.join(args.out, "logits.json"), "w") as file:
        json.dump(golden, file)
        file.write("\n")


if __name__ == "__main__":
    main()
