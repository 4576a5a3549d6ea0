"""Writes a Hugging Face model directory (BF16 safetensors, configuration, tokenizer).

python3 export.py --checkpoint work/checkpoint.pt --tokenizer work/tokenizer.model --out ../demo

Every file is written under a temporary name and renamed, so a reader never sees half a file.
"""
import argparse
import json
import os
import shutil

import sentencepiece as spm
import torch
from safetensors.torch import save_file

from model import Config, Llama

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
    os.replace(path + ".tmp", path)


def write(model, tokenizer_path, out):
    os.makedirs(out, exist_ok=True)
    sp = spm.SentencePieceProcessor(model_file=tokenizer_path)
    im_start, im_end = (sp.piece_to_id(s) for s in ("<|im_start|>", "<|im_end|>"))
    cfg = model.cfg
    shutil.copyfile(tokenizer_path, os.path.join(out, "tokenizer.model.tmp"))
    os.replace(os.path.join(out, "tokenizer.model.tmp"), os.path.join(out, "tokenizer.model"))
    added = {str(i): {"content": sp.id_to_piece(i), "lstrip": False, "normalized": False,
                      "rstrip": False, "single_word": False, "special": True}
             for i in (sp.unk_id(), sp.bos_id(), sp.eos_id(), im_start, im_end)}
    write_json(os.path.join(out, "tokenizer_config.json"), {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "add_prefix_space": False, "legacy": False, "clean_up_tokenization_spaces": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": added, "sp_model_kwargs": {},
        "model_max_length": cfg.max_position_embeddings, "chat_template": CHAT_TEMPLATE})
    write_json(os.path.join(out, "config.json"), {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **cfg.to_dict(),
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "mlp_bias": False, "rope_scaling": None, "tie_word_embeddings": True,
        "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True,
        "torch_dtype": "bfloat16", "bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id()})
    write_json(os.path.join(out, "generation_config.json"), {
        "bos_token_id": sp.bos_id(), "eos_token_id": [sp.eos_id(), im_end], "do_sample": False})
    tensors = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    path = os.path.join(out, "model.safetensors")
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)  # the safetensors writer leaves it to its owner alone
    os.replace(path + ".tmp", path)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--checkpoint", default="work/checkpoint.pt")
    ap.add_argument("--tokenizer", default="work/tokenizer.model")
    ap.add_argument("--out", default="../demo")
    args = ap.parse_args()
    state = torch.load(args.checkpoint, map_location="cpu")
    model = Llama(Config(**state["config"]))
    model.load_state_dict(state["model"])
    write(model, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
