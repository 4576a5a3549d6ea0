"""Linear layers that learn to be low-bit: sigma-based quantization of weights and of inputs.

After the abstract of Standard Deviation-Based Quantization for Deep Neural Networks (arXiv
2202.12422): clips are multiples of standard deviations, and the multiple is learned. The formulas
are ours; the gradients are those of LSQ (arXiv 1902.08153). A group of weights w has sigma, its
root mean square, and the clip T = alpha * sigma; a matrix has one alpha. With u = w / T and q(u)
the nearest level of the scheme, in [-1, 1], the layer computes with T * q(u), whose gradients are

  to w      1 where |u| < 1, else 0                      (straight through)
  to alpha  sigma * (q(u) - u) there, else sigma * sign(u)

sigma counts as a constant: it follows the weights from step to step, but no gradient goes through
it. T is rounded to F16 as it will be stored, or to a power of two, straight through. Inputs
likewise, see SigmaInput.
"""
import torch
import torch.nn.functional as F
from torch import nn

import low_bit
from low_bit import LowBitSpec

# The layers' matrices by the input that they share: the server multiplies such a group at once, so
# it has one range of inputs.
INPUT_GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
                ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))


def straight_through(rounded, value):
    """`rounded`, with the gradient of `value`."""
    return value + (rounded - value).detach()


def nearest_level(spec, magnitude):
    """The level nearest to 0 <= magnitude <= max_level; halfway, the larger."""
    if spec.scheme == "uniform":
        return torch.floor(magnitude + 0.5)
    if spec.scheme == "apot":
        return torch.where(magnitude >= 7, 8.0, torch.floor(magnitude + 0.5).clamp(max=6))
    # Half a unit of the exponent carries into it from 1.5 * 2^i on; then the mantissa is dropped.
    bits = magnitude.float().view(torch.int32) + 0x400000 & 0x7f800000
    return torch.where(magnitude < 0.5, 0.0, bits.view(torch.float32).clamp(min=1))


def stored_clip(spec, clip):
    """T as it will be stored: as F16, and with `scale` pow2 the nearest power of two, by its
    logarithm, that F16 holds; zero below all of them."""
    if spec.scale == "pow2":
        exponent = clip.clamp(min=2.0 ** -30).log2().round()
        clip = torch.where(exponent < -24, 0.0, exponent.clamp(max=15).exp2())
    return clip.half().float()


def round_inputs(spec, x, clip):
    """Inputs as the server's integers stand for them: q * R / Q, q = round(clamp(x * Q / R)).

    clip: R as a tensor that broadcasts with x. Gradients as those of weights.
    """
    most = spec.max_activation
    u = (x / clip.clamp(min=1e-30)).clamp(-1, 1)
    return straight_through(torch.round(u * most) / most, u) * clip


def row_clip(x):
    """R of dynamic activations: the largest |x| of each row of inputs."""
    return x.detach().abs().amax(-1, keepdim=True)


class SigmaInput(nn.Module):
    """Rounds the inputs of one or more matrices to `activation_bits`.

    3 and 4 bits: R = alpha * sigma for all rows, alpha learned as that of weights, sigma a running
    root mean square of the inputs that only training moves. The first inputs set both: alpha is
    then the multiple of sigma of least squared error, as inputs are far from Gaussian.
    8 and 16 bits: R is the largest |x| of a row, and there is nothing to learn.
    """
    MOMENTUM = 0.02

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        if spec.static_activations:
            self.alpha = nn.Parameter(torch.tensor(1.0))
            self.register_buffer("sigma", torch.tensor(0.0))

    @torch.no_grad()
    def observe(self, x):
        sigma = x.square().mean().sqrt()
        if self.sigma > 0:
            self.sigma.lerp_(sigma, self.MOMENTUM)
            return
        self.sigma.copy_(sigma)
        errors = {alpha: float((round_inputs(self.spec, x, alpha * sigma) - x).square().mean())
                  for alpha in (0.25 * i for i in range(2, 41))}
        self.alpha.fill_(min(errors, key=errors.get))

    def clip(self):
        """R of static activations."""
        return self.alpha * self.sigma.clone()  # which moves on before gradients are computed

    def forward(self, x):
        x = x.float()
        if not self.spec.static_activations:
            return round_inputs(self.spec, x, row_clip(x))
        if self.training:
            self.observe(x.detach())
        return round_inputs(self.spec, x, self.clip())


class SigmaLinear(nn.Linear):
    """A matrix [N, K] without bias that computes with low-bit weights and inputs.

    `weight` holds the floats that are learned. `prune`: at least this share of the matrix, what is
    least in units of its group's sigma, counts as zero; may be changed between steps. A pruned
    weight goes on learning, and returns when it has grown.
    """

    def __init__(self, weight, spec, shared_input):
        nn.Module.__init__(self)  # that of Linear would draw weights
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self.alpha = nn.Parameter(torch.tensor(spec.normal_alpha))
        self.input = shared_input
        self.spec = spec
        self.prune = 0.0

    def grouped(self):
        """The weights [N, groups, group size] and sigma [N, groups, 1] of each group."""
        size = self.spec.group_size or self.in_features
        w = self.weight.float().view(self.out_features, -1, size)
        return w, w.detach().square().mean(-1, keepdim=True).sqrt()

    def quantized(self):
        """T [N, groups, 1], the weights u = w / T within [-1, 1], and their levels, like u."""
        w, sigma = self.grouped()
        clip = self.alpha * sigma
        clip = straight_through(stored_clip(self.spec, clip), clip)
        u = (w / clip.clamp(min=1e-30)).clamp(-1, 1)
        with torch.no_grad():
            level = nearest_level(self.spec, u.abs() * self.spec.max_level) * u.sign()
            if self.prune > 0:
                size = w.abs() / sigma.clamp(min=1e-30)
                rank = max(1, round(self.prune * size.numel()))
                level[size <= size.flatten().kthvalue(rank).values] = 0
        return clip, u, level

    def low_bit_weight(self):
        """The weights [N, K] that the layer computes with."""
        clip, u, level = self.quantized()
        w = clip * straight_through(level / self.spec.max_level, u)
        return w.view_as(self.weight)

    def forward(self, x):
        return F.linear(self.input(x), self.low_bit_weight())

    @torch.no_grad()
    def tensors(self):
        """What a checkpoint holds of the matrix: suffix of the name -> tensor."""
        clip, _, level = self.quantized()
        levels = self.spec.levels
        table = torch.zeros(2 * self.spec.max_level + 1, dtype=torch.uint8)
        for code in reversed(range(len(levels))):  # of two codes of a level the first
            table[levels[code] + self.spec.max_level] = code
        codes = table[level.long() + self.spec.max_level].flatten()
        data = low_bit.pack(codes.tolist(), self.spec.bits)
        out = {"weight_codes": torch.frombuffer(bytearray(data), dtype=torch.uint8)
               .view(self.out_features, -1), "weight_scales": clip.squeeze(-1).half()}
        if self.spec.static_activations:
            out["input_clip"] = self.input.clip().float().view(1)
        return out


def make_low_bit(model, spec):
    """Replaces the matrices of a Llama's layers. Embeddings and norms stay as they are."""
    for layer in model.model.layers:
        for block_name, names in INPUT_GROUPS:
            block, shared = getattr(layer, block_name), SigmaInput(spec)
            for name in names:
                setattr(block, name, SigmaLinear(getattr(block, name).weight, spec, shared))


def low_bit_layers(model):
    """Name -> SigmaLinear."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SigmaLinear)}


class RoundedInput(nn.Module):
    """Rounds the inputs of a matrix that was read from a checkpoint. clip: R, or None for rows'."""

    def __init__(self, spec, clip):
        super().__init__()
        self.spec, self.clip = spec, clip

    def forward(self, x):
        return round_inputs(self.spec, x, row_clip(x) if self.clip is None else self.clip)


def decode(model, tensors, config):
    """Turns the codes of `tensors`, a checkpoint's, into ".weight" of floats, and makes the
    matrices of `model` round their inputs as the server does. config: "quantization_config"."""
    if config.get("head") is not None:
        raise ValueError("a head of codes has no counterpart here: quantize without --head-bits")
    spec = LowBitSpec(**{k: v for k, v in config.items() if k not in ("quant_method", "head")})
    levels = torch.tensor(spec.levels, dtype=torch.float32)
    for name, linear in list(model.named_modules()):
        codes = tensors.pop(name + ".weight_codes", None)
        if codes is None:
            continue
        codes = torch.tensor(low_bit.unpack(codes.flatten().numpy().tobytes(), spec.bits))
        scales = tensors.pop(name + ".weight_scales").float().unsqueeze(-1)
        level = levels[codes].view(*scales.shape[:2], -1)
        tensors[name + ".weight"] = (scales * level / spec.max_level).view_as(linear.weight)
        round_input = RoundedInput(spec, tensors.pop(name + ".input_clip", None))
        linear.register_forward_pre_hook(lambda _, args, r=round_input: (r(args[0]),))
