"""Encoders in torch: LightZero 0.2.0's own modules, and what only its main branch has.

Each is (module, shape of an observation); its weights are random, its statistics are of images.
"""

import functools

import torch
from torch.nn import functional

from kvjax.tools.bench import lightzero_020

EMBED = 64


def _common():
    return lightzero_020._load("lzero.model.common")


class _Ends(torch.nn.Module):
    """An encoder of 0.2.0 with the norm that main puts behind it."""

    def __init__(self, encoder, linear):
        super().__init__()
        self.downsample_net, self.resblocks = encoder.downsample_net, encoder.resblocks
        self.last_linear, self.final_norm = linear, torch.nn.LayerNorm(linear.out_features)

    def forward(self, x):
        x = self.downsample_net(x)
        for block in self.resblocks:
            x = block(x)
        return self.final_norm(self.last_linear(x.flatten(1)))


def _seeded(make):
    """The same arguments make the same weights, whatever was drawn before."""

    @functools.wraps(make)
    def made(*args, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return make(*args, **options)

    return made


@_seeded
def resnet(side=64, norm="LN", blocks=1, channels=8, planes=3, final="simnorm"):
    shape = (planes, side, side)
    network = _common().RepresentationNetworkUniZero
    encoder = network(shape, blocks, channels, norm_type=norm, embedding_dim=EMBED)
    features = channels * (8 if side == 64 else 6) ** 2
    encoder.last_linear = torch.nn.Linear(features, EMBED, bias=False)
    ended = encoder if final == "simnorm" else _Ends(encoder, encoder.last_linear)
    return _randomised(ended, shape), shape


@_seeded
def memory(channels=64, planes=3):
    widths, shape = (channels // 4, channels // 2, channels), (planes, 5, 5)
    return _randomised(_common().LatentEncoderForMemoryEnv(shape, EMBED, widths), shape), shape


@_seeded
def vector(norm="LN", size=7):
    network = _common().RepresentationNetworkMLP
    return _randomised(network(size, EMBED, norm_type=norm), (size,)), (size,)


class Vit(torch.nn.Module):
    """A vision transformer by torch's functions, with the names of main's tensors."""

    def __init__(self, side, width, depth, heads, hidden, planes, final):
        super().__init__()
        self.heads, pixels = heads, 64 * planes
        norm, linear = torch.nn.LayerNorm, torch.nn.Linear
        empty = torch.nn.Identity()
        self.to_patch_embedding = torch.nn.ModuleList(
            [empty, norm(pixels), linear(pixels, width), norm(width)]
        )
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = torch.nn.Parameter(torch.zeros(1, 1 + (side // 8) ** 2, width))
        self.transformer = torch.nn.Module()
        self.transformer.norm, self.transformer.layers = norm(width), torch.nn.ModuleList()
        for _ in range(depth):
            attention, feed_forward = torch.nn.Module(), torch.nn.Module()
            attention.norm = norm(width)
            attention.to_qkv = linear(width, 3 * 64 * heads, bias=False)
            attention.to_out = torch.nn.ModuleList([linear(64 * heads, width)])
            layers = [norm(width), linear(width, hidden), empty, empty, linear(hidden, width)]
            feed_forward.net = torch.nn.ModuleList(layers)
            self.transformer.layers.append(torch.nn.ModuleList([attention, feed_forward]))
        self.last_linear = linear(width, EMBED)
        self.final_norm = norm(EMBED) if final == "layernorm" else _common().SimNorm(8)

    def forward(self, images):
        patches = functional.unfold(images, 8, stride=8).unflatten(
            1, (-1, 64)
        )  # [B, F, 64, patches]
        _, norm, linear, token_norm = self.to_patch_embedding
        tokens = token_norm(linear(norm(patches.permute(0, 3, 2, 1).flatten(2))))
        first = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([first, tokens], dim=1) + self.pos_embedding
        for attention, feed_forward in self.transformer.layers:
            qkv = attention.to_qkv(attention.norm(x)).chunk(3, dim=2)
            heads = [part.unflatten(2, (self.heads, 64)).transpose(1, 2) for part in qkv]
            read = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = x + attention.to_out[0](read)
            norm, expand, _, _, contract = feed_forward.net
            x = x + contract(functional.gelu(expand(norm(x))))
        return self.final_norm(self.last_linear(self.transformer.norm(x)[:, 0]))


@_seeded
def vit(side=16, width=24, depth=2, heads=2, hidden=40, planes=3, final="layernorm"):
    shape = (planes, side, side)
    return _randomised(Vit(side, width, depth, heads, hidden, planes, final), shape), shape


def observations(shape, rows, seed=1):
    """Noise, brighter in half of an image; means of nothing but noise would all be alike."""
    random = torch.Generator().manual_seed(seed)
    observed = torch.rand((rows, *shape), generator=random)
    for index, row in enumerate(observed):
        half = row.shape[-1] // 2
        row[..., :half] += 3 * (index % 2)
        row[..., half:] += 3 * (1 - index % 2)
    return observed


def _randomised(module, shape):
    """Weights and statistics of their own everywhere, and latents that no softmax saturates."""
    random, observed = torch.Generator().manual_seed(5), observations(shape, 8, seed=7)
    spread = []
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn(value.shape, generator=random), alpha=0.2)
        for _ in range(2):
            module.train()(observed)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.add_(torch.randn(value.shape, generator=random), alpha=0.1)
        linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-1]
        hook = linear.register_forward_hook(lambda *args: spread.append(args[2].std()))
        module.eval()(observed)
        hook.remove()
        linear.weight.div_(spread[0] / 3)
    return module
