"""Tests sigma.py. Needs torch, so CI does not run it:  python3 test_sigma.py"""
import dataclasses
import sys
import unittest

import torch
from torch import nn

import sigma
from low_bit import LowBitSpec
from model import Config, Llama
from sigma import SigmaInput, SigmaLinear

SPECS = [LowBitSpec(*s) for s in (("pow2", 2, 64, 16), ("pow2", 3, 32, 3), ("pow2", 4, 0, 8),
                                  ("apot", 4, 128, 4), ("uniform", 2, 64, 3),
                                  ("uniform", 8, 64, 16), ("pow2", 3, 64, 16, "pow2"),
                                  ("uniform", 4, 0, 8, "pow2"))]


def layer(spec, rows=16, cols=256):
    torch.manual_seed(3)
    return SigmaLinear(nn.Parameter(torch.randn(rows, cols) * 0.05), spec, SigmaInput(spec))


class SigmaTest(unittest.TestCase):
    def test_levels_are_the_nearest(self):
        for spec in SPECS:
            one = layer(spec)
            clip, u, level = one.quantized()
            levels = torch.tensor(sorted(set(spec.levels)), dtype=torch.float32)
            least = (u.unsqueeze(-1) - levels / spec.max_level).abs().amin(-1)
            found = (u - level / spec.max_level).abs()
            self.assertTrue(torch.allclose(found, least, atol=1e-6), spec)
            self.assertTrue(torch.equal(clip, clip.half().float()))

    def test_the_first_alpha_is_best_for_gaussian_weights(self):
        for spec in SPECS:
            if spec.scale == "pow2":  # powers of two follow alpha in steps
                continue
            one = layer(spec, 256, 1024)
            errors = {}
            for factor in (0.85, 1.0, 1.15):
                one.alpha.data.fill_(spec.normal_alpha * factor)
                errors[factor] = float((one.low_bit_weight() - one.weight).square().mean())
            self.assertEqual(min(errors, key=errors.get), 1.0, (spec, errors))

    def test_scales_are_powers_of_two(self):
        spec = LowBitSpec("pow2", 3, 64, 16, "pow2")
        one = layer(spec)
        stored = one.tensors()["weight_scales"].float()
        wanted = (one.alpha * one.grouped()[1]).squeeze(-1)
        self.assertTrue((torch.frexp(stored).mantissa == 0.5).all())
        self.assertTrue(((stored / wanted).log2().abs() <= 0.5 + 1e-3).all())
        for clip, rounded in ((0.0, 0.0), (1e-30, 0.0), (2.0 ** -24, 2.0 ** -24),
                              (2.0 ** -25, 0.0), (1.3 * 2.0 ** -17, 2.0 ** -17), (3.0, 4.0),
                              (1e5, 2.0 ** 15), (-1.0, 0.0)):
            self.assertEqual(float(sigma.stored_clip(spec, torch.tensor(clip))), rounded, clip)

    def test_gradients(self):
        for spec in SPECS:
            one = layer(spec)
            wanted = torch.randn_like(one.weight)
            (one.low_bit_weight() * wanted).sum().backward()
            w, deviation = one.grouped()
            clip, _, level = one.quantized()
            u, q = w / clip, level / spec.max_level
            inside = u.abs() < 1
            to_alpha = deviation * torch.where(inside, q - u, u.sign())
            to_alpha = float((to_alpha * wanted.view_as(w)).sum().detach())
            self.assertAlmostEqual(float(one.alpha.grad), to_alpha,
                                   delta=1e-3 * abs(to_alpha) + 1e-4)
            self.assertTrue(torch.allclose(one.weight.grad, wanted * inside.view_as(wanted)), spec)

    def test_inputs(self):
        x = torch.randn(64, 256) * 3
        for spec in SPECS:
            rounding = SigmaInput(spec)
            y = rounding(x)
            clip = rounding.clip() if spec.static_activations else x.abs().amax(-1, keepdim=True)
            q = y * spec.max_activation / clip
            self.assertTrue(torch.allclose(q, q.round(), atol=2e-3 if spec.activation_bits == 16
                                           else 1e-4), spec)
            self.assertLessEqual(float(q.detach().abs().max()), spec.max_activation * (1 + 1e-6))
            inside = x.abs() <= clip
            half = ((0.5 / spec.max_activation + 1e-6) * clip).expand_as(x)
            self.assertTrue(((y - x).abs() <= half)[inside].all(), spec)
            if spec.static_activations:  # learned, and not moved by evaluation
                y.sum().backward()
                self.assertNotEqual(float(rounding.alpha.grad), 0.0)
                before = rounding.sigma.clone()
                rounding.eval()(2 * x)
                self.assertEqual(rounding.sigma, before)

    def test_pruning(self):
        for share in (0.5, 0.8):
            one = layer(LowBitSpec("pow2", 4, 64, 16))
            one.prune = share
            weight = one.low_bit_weight()
            self.assertAlmostEqual(float((weight == 0).float().mean()), share, delta=2e-3)
            weight.sum().backward()
            self.assertTrue((one.weight.grad[weight == 0] == 1).all())  # goes on learning

    def test_a_checkpoint_computes_the_same(self):
        for spec in SPECS:
            config = Config(vocab_size=64, hidden_size=128, intermediate_size=256,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32)
            torch.manual_seed(5)
            model, copy = Llama(config), Llama(config)
            sigma.make_low_bit(model, spec)
            ids = torch.randint(0, 64, (1, 40))
            model(ids)
            layers = sigma.low_bit_layers(model)
            self.assertEqual(len(layers), 14)
            self.assertIs(layers["model.layers.0.mlp.gate_proj"].input,
                          layers["model.layers.0.mlp.up_proj"].input)
            tensors = {n: p.data for n, p in model.named_parameters()
                       if not any(n.startswith(name + ".") for name in layers)}
            for name, one in layers.items():
                tensors |= {f"{name}.{suffix}": t for suffix, t in one.tensors().items()}
            sigma.decode(copy, tensors, {"quant_method": "sigma", **dataclasses.asdict(spec)})
            copy.load_state_dict(tensors)
            name = "model.layers.1.mlp.down_proj"
            self.assertTrue(torch.allclose(copy.get_submodule(name).weight,
                                           layers[name].low_bit_weight(), atol=1e-7), spec)
            with torch.no_grad():
                found, wanted = copy.eval()(ids), model.eval()(ids)
            self.assertGreater(float(wanted.std()), 0.01)
            self.assertLess(float((found - wanted).abs().max()), 1e-4, spec)


if __name__ == "__main__":
    sys.exit(unittest.main())
