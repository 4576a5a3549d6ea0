"""Trains the SentencePiece BPE model and turns documents into token ids and loss weights.

python3 tokenizer.py --out work/tokenizer.model
"""
import argparse
import io
import os

import sentencepiece as spm

import data


def train(path, vocab=1024, documents=24000):
    model = io.BytesIO()  # with a model_prefix the file would name a path of this machine
    spm.SentencePieceTrainer.train(
        sentence_iterator=data.sample_text(documents), model_writer=model, model_type="bpe",
        vocab_size=vocab, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, user_defined_symbols=["\n"],
        control_symbols=[data.IM_START, data.IM_END], unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        character_coverage=1.0, num_threads=1, minloglevel=1)
    with open(path, "wb") as f:
        f.write(model.getvalue())


class Tokenizer:
    def __init__(self, path):
        self.path = path
        self.sp = spm.SentencePieceProcessor(model_file=path)
        self.special = {s: self.sp.piece_to_id(s) for s in data.SPECIAL}
        self.bos, self.eos = self.special[data.BOS], self.special[data.EOS]
        self.im_end = self.special[data.IM_END]
        self.memory = {}

    def encode(self, text):
        ids = self.memory.get(text)
        if ids is None:
            ids = self.sp.encode(text)
            if len(text) < 24 and len(self.memory) < 200000:
                self.memory[text] = ids
        return ids

    def encode_document(self, doc):
        ids, weights = [], []
        for text, weight in doc:
            part = [self.special[text]] if text in self.special else self.encode(text)
            ids += part
            weights += [weight] * len(part)
        return ids, weights

    def decode(self, ids):
        return self.sp.decode(ids)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", default="work/tokenizer.model")
    ap.add_argument("--vocab", type=int, default=1024)
    args = ap.parse_args()
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    train(args.out, args.vocab)


if __name__ == "__main__":
    main()
