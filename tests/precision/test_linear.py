"""Linear layers on codes: the product against the blockwise reference and float64, gradients against the same rounding
written out, and the policy that puts them into a model."""

import copy
from itertools import product as every

import pytest
import torch
from torch import Tensor, nn

from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.precision import Float8Linear, apply, autocast, product, quantise, recipes, reference, round_trip
from dsv3.precision.formats import FP32

PRECISIONS = [
    Float8Block(format=form, scale=scale, block=block)
    for form, scale, block in every(("e4m3", "e5m2"), ("fp32", "ue8m0"), (128, 16))
]
SHAPES = [(1, 1, 1), (63, 60, 100), (5, 300, 130), (128, 256, 128)]


def by_id(precision: Float8Block) -> str:
    return f"{precision.format}-{precision.scale}-{precision.block}"


each_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=by_id)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [K, N] and an upstream gradient [M, N] of the size that a mean over tokens gives."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(m + k + n)
    x = torch.randn(m, k, generator=generator).requires_grad_()
    weight = torch.randn(k, n, generator=generator).mul(0.02).requires_grad_()
    return x, weight, torch.randn(m, n, generator=generator) * 1e-6


@each_shape
@each_precision
def test_the_product_is_the_blockwise_sum_to_fp32_rounding(precision: Float8Block, shape: tuple[int, int, int]) -> None:
    x, weight, _ = tensors(shape)
    use = recipes(precision)
    exact = reference.product(quantise(x.detach(), use.activation), quantise(weight.detach(), use.weight))
    magnitudes = (
        round_trip(x.detach(), use.activation).abs().double() @ round_trip(weight.detach(), use.weight).abs().double()
    )
    # Two operands rounded once each when codes meet scales, one rounding per product and per addition.
    bound = (shape[1] + 3) * FP32.eps / 2 * magnitudes + 1e-30
    assert bool(((product(x, weight, use).double() - exact).abs() <= bound).all())


@each_shape
@each_precision
def test_the_gradients_are_exactly_those_of_the_rounding_written_out(
    precision: Float8Block, shape: tuple[int, int, int]
) -> None:
    x, weight, upstream = tensors(shape)
    use = recipes(precision)
    product(x, weight, use).backward(upstream)
    kept_x, kept_weight = round_trip(x.detach(), use.activation), round_trip(weight.detach(), use.weight)
    along_tokens = round_trip(kept_x, use.activation.transposed())
    assert torch.equal(x.grad, round_trip(upstream, use.gradient) @ kept_weight.T)
    assert torch.equal(weight.grad, along_tokens.T @ round_trip(upstream, use.gradient.transposed()))


@each_precision
def test_the_product_is_within_the_format_s_bound_of_float64(precision: Float8Block) -> None:
    # Magnitudes in [1/2, 1] keep every code a normal number, so each operand is off by at most half of eps, relatively.
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        (torch.rand(shape, generator=generator) / 2 + 0.5) * torch.randn(shape, generator=generator).sign()
        for shape in ((60, 300), (300, 100))
    )
    use = recipes(precision)
    eps = use.activation.format.eps
    bound = (eps + eps**2 / 4 + 303 * FP32.eps) * (x.abs().double() @ weight.abs().double())
    assert bool(((product(x, weight, use) - x.double() @ weight.double()).abs() <= bound).all())


def test_numbers_that_are_codes_already_give_the_plain_product_and_its_gradients() -> None:
    # Whole numbers up to 8 have four bits: with power-of-two scales e4m3 holds each of them, and fp32 their sums.
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randint(-8, 9, shape, generator=generator).float() for shape in ((63, 100), (100, 60), (63, 60))
    )
    ours, plain = [(x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    y = product(*ours, recipes(Float8Block(scale="ue8m0")))
    expected = plain[0] @ plain[1]
    y.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(y, expected)
    assert torch.equal(ours[0].grad, plain[0].grad)
    assert torch.equal(ours[1].grad, plain[1].grad)


def test_tokens_are_the_leading_dimensions_in_order() -> None:
    x, weight, _ = tensors((60, 100, 63))
    use = recipes(Float8Block())
    assert torch.equal(product(x.unflatten(0, (4, 15)), weight, use), product(x, weight, use).unflatten(0, (4, 15)))


def test_no_token_is_an_empty_product_with_zero_weight_gradient() -> None:
    x, weight, _ = tensors((63, 60, 100))
    y = product(x[:0], weight, recipes(Float8Block()))
    y.sum().backward()
    assert y.shape == (0, 100)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_forward_keeps_one_byte_per_activation_for_backward() -> None:
    x, weight, _ = tensors((128, 256, 128))
    sizes: list[tuple[int, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append((tensor.numel(), tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(x, weight, recipes(Float8Block()))
    assert sorted(sizes) == sorted([(128 * 256, 1), (256 * 128, 1), (128 * 2, 4), (2 * 1, 4)])


def test_a_gradient_that_nobody_asked_for_is_not_computed() -> None:
    x, weight, upstream = tensors((63, 60, 100))
    product(x.detach(), weight, recipes(Float8Block())).backward(upstream)
    assert x.grad is None
    assert weight.grad is not None


class Net(nn.Module):
    """Names as in the model: what a policy goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 60)
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(60, 4, bias=False),
                "gate_proj": nn.Linear(60, 100),
                "down_proj": nn.Linear(100, 60, bias=False),
            }
        )
        self.norm = nn.LayerNorm(60)
        self.lm_head = nn.Linear(60, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        weight = self.mlp["gate"](x).softmax(-1)[..., :1]
        return self.lm_head(self.norm(x + weight * self.mlp["down_proj"](self.mlp["gate_proj"](x).relu())))


def seeded() -> Net:
    torch.manual_seed(0)
    return Net()


def test_the_policy_leaves_router_head_embedding_and_norm_alone() -> None:
    net = seeded()
    scope = apply(net, Float8Block())
    assert scope.on_codes == ("mlp.gate_proj", "mlp.down_proj")
    assert scope.kept == ("mlp.gate", "lm_head")
    matrices = 60 * 100 * 2
    assert scope.share == matrices / (matrices + 60 * 4 + 2 * 60 * 50)
    assert isinstance(net.mlp["gate_proj"], Float8Linear)
    assert type(net.lm_head) is nn.Linear


def test_names_to_keep_can_be_given() -> None:
    assert apply(seeded(), Float8Block(), keep=("gate_proj",)).on_codes == ("mlp.gate", "mlp.down_proj", "lm_head")


def test_parameters_stay_the_same_objects_under_the_same_names() -> None:
    net = seeded()
    before = dict(net.named_parameters())
    keys = list(net.state_dict())
    apply(net, Float8Block())
    after = dict(net.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(net.state_dict()) == keys


def test_applying_again_replaces_the_recipes_and_nothing_else() -> None:
    net = seeded()
    first = apply(net, Float8Block())
    assert apply(net, Float8Block(format="e5m2")) == first
    assert net.mlp["gate_proj"].use == recipes(Float8Block(format="e5m2"))


@pytest.mark.parametrize("precision", [Float32(), BFloat16(), Float16()])
def test_other_precisions_change_no_module(precision: Precision) -> None:
    net = seeded()
    scope = apply(net, precision)
    assert (scope.on_codes, scope.share) == ((), 0.0)
    assert not any(isinstance(module, Float8Linear) for module in net.modules())


def test_a_layer_on_codes_adds_its_bias_in_full_precision() -> None:
    linear = nn.Linear(60, 100)
    on_codes = Float8Linear(linear, recipes(Float8Block()))
    x = torch.randn(3, 5, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_codes(x), product(x, linear.weight.T, on_codes.use) + linear.bias)


def test_a_model_on_codes_copies_and_loads_like_any_other() -> None:
    net = seeded()
    apply(net, Float8Block())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.mlp["gate_proj"].weight.zero_()
    twin.load_state_dict(net.state_dict())
    tokens = torch.arange(50).view(2, 25)
    assert torch.equal(net(tokens), twin(tokens))


@pytest.mark.parametrize(
    "precision, expected",
    [
        (Float32(), torch.float32),
        (Float8Block(), torch.float32),
        (BFloat16(), torch.bfloat16),
        (Float16(), torch.float16),
    ],
)
def test_autocast_decides_the_product_s_dtype_whatever_runs_outside(
    precision: Precision, expected: torch.dtype
) -> None:
    linear, x = nn.Linear(8, 8), torch.ones(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast(precision, "cpu"):
        assert linear(x).dtype == expected


class Stack(nn.Module):
    """Stacked weights with the attribute that the policy looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 60, 100))
        self.product = None


def test_stacked_weights_get_the_product_on_codes_and_count_in_the_share() -> None:
    net = nn.ModuleDict({"experts": Stack(), "lm_head": nn.Linear(60, 100)})
    scope = apply(net, Float8Block())
    assert scope.on_codes == ("experts",)
    assert scope.share == 2 / 3
    x = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    up = net["experts"].up[0]
    assert torch.equal(net["experts"].product(x, up), product(x, up, recipes(Float8Block())))
