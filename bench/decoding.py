"""Four forms in which one layer remembers keys and values, decoding a token at a time.

    multi_head   a key and a value per head                             2 H P numbers per token
    grouped      a key and a value per 4 heads                          2 G P
    single       a key and a value for all heads                        2 P
    latent       MLA, a latent of 4 P and a rotary key of P/2 in all    4.5 P

H = 16 heads of width P = 64, hidden 1024. MLA keeps DeepSeek's proportions: a latent of 4 head widths, a rotary key of
half a head, which adds to the 64 numbers that queries and keys have beside it. It decodes in its absorbed form;
`latent_expanded` makes all keys and values anew from the latents, as its training form does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.attention import KeyValueCache, build
from dsv3.config import Attention, Grouped, Latent, Model, MultiHead

HEADS, WIDTH, HIDDEN = 16, 64, 1024
LATENT = Latent(
    num_attention_heads=HEADS,
    q_lora_rank=384,
    kv_lora_rank=4 * WIDTH,
    qk_nope_head_dim=WIDTH,
    qk_rope_head_dim=WIDTH // 2,
    v_head_dim=WIDTH,
)
FORMS: dict[str, Attention] = {
    "multi_head": MultiHead(num_attention_heads=HEADS, head_dim=WIDTH),
    "grouped": Grouped(num_attention_heads=HEADS, num_key_value_heads=HEADS // 4, head_dim=WIDTH),
    "single": Grouped(num_attention_heads=HEADS, num_key_value_heads=1, head_dim=WIDTH),
    "latent": LATENT,
    "latent_expanded": LATENT,
}


@dataclass(frozen=True)
class Layer:
    """One layer with a cache that is full but for one place, and the token that comes next."""

    form: str
    module: nn.Module
    cache: KeyValueCache
    token: Tensor

    def decode(self) -> Tensor:
        """The layer's output for the next token; the cache stays as long as it is, so calls repeat."""
        options = {"absorbed": False} if self.form == "latent_expanded" else {}
        with torch.no_grad():
            out: Tensor = self.module(self.token, cache=self.cache.layers[0], **options)[0]
        return out


def layer(form: str, length: int, device: torch.device | str = "cpu", *, batch: int = 1) -> Layer:
    """A layer of that form that has seen `length` - 1 tokens of random hidden states."""
    model = one_layer(FORMS[form], length)
    module, x = made(model, device), hidden(length, batch, device)
    cache = KeyValueCache.empty(model, batch, length, device=device)
    with torch.no_grad():
        for part in x[:, :-1].split(1024, dim=1):
            module(part, cache=cache.layers[0])
            cache = cache.advance(part.shape[1])
    return Layer(form, module, cache, x[:, -1:])


def check(form: str, device: torch.device | str = "cpu") -> None:
    """Decoding the last of 300 tokens equals the whole forward pass over them.

    Raises:
        AssertionError: with the largest difference, where it does not.
    """
    length = 300
    last = layer(form, length, device)
    with torch.no_grad():
        whole = last.module(hidden(length, 1, device))[0][:, -1:]
    torch.testing.assert_close(last.decode(), whole, rtol=0.0, atol=rounding(whole))


def rounding(out: Tensor) -> float:
    """How far two forms of the layer may differ: four products of up to 1024 terms in fp32, in orders of their own."""
    return 4 * torch.finfo(out.dtype).eps * HIDDEN**0.5 * max(1.0, out.abs().max().item())


def one_layer(attention: Attention, length: int) -> Model:
    """The model around one layer of that attention."""
    return Model(
        vocab_size=1,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        intermediate_size=1,
        attention=attention,
        max_position_embeddings=length,
    )


def made(model: Model, device: torch.device | str = "cpu") -> nn.Module:
    """Its attention, with random weights that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(0)
    module = build(model, 0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return module.to(device)


def hidden(length: int, batch: int, device: torch.device | str = "cpu", *, seed: int = 1) -> Tensor:
    """Random hidden states."""
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)
