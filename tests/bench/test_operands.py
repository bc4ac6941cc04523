"""The meter of operands against the products written out."""

import torch
from torch import Tensor, nn

from bench.meters.operands import operands
from dsv3.config import Float32, presets
from dsv3.model import Transformer
from dsv3.precision import apply
from dsv3.precision.linear import KEPT

Seen = list[tuple[str, str, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.lm_head = nn.Linear(5, 4)
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.product = None

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch.matmul if self.product is None else self.product
        return self.lm_head(multiply(self.first(x), self.weight))


def test_each_product_reports_its_input_its_weight_and_the_gradient_of_its_output() -> None:
    torch.manual_seed(0)
    net, x, seen = Net(), torch.randn(2, 3, 6), Seen()
    with operands(net, ("lm_head",), lambda name, kind, matrix: seen.append((name, kind, matrix))):
        net(x).sum().backward()
    found = {(name, kind): matrix for name, kind, matrix in seen}
    into_stack = x @ net.first.weight.T + net.first.bias
    from_stack = torch.ones(6, 4) @ net.lm_head.weight
    expected = {
        ("first", "activation"): x.flatten(0, 1),
        ("first", "weight"): net.first.weight.T,
        ("first", "gradient"): from_stack @ net.weight.T,
        ("", "activation"): into_stack.flatten(0, 1),
        ("", "weight"): net.weight,
        ("", "gradient"): from_stack,
    }
    assert found.keys() == expected.keys()
    for key, matrix in expected.items():
        torch.testing.assert_close(found[key], matrix)
        assert not found[key].requires_grad


def test_the_model_is_as_before_after_the_block_and_computed_the_same_in_it() -> None:
    torch.manual_seed(0)
    net, x, seen = Net(), torch.randn(4, 6), Seen()
    before = net(x)
    with operands(net, (), lambda name, kind, matrix: seen.append((name, kind, matrix))):
        torch.testing.assert_close(net(x), before)
    heard = len(seen)
    net(x).sum().backward()
    assert len(seen) == heard
    assert net.product is None


def test_on_the_real_model_it_hears_of_what_the_policy_would_put_on_codes() -> None:
    config = presets.tiny().model
    model = Transformer(config, seed=0)
    heard = set[tuple[str, str]]()
    with operands(model, KEPT, lambda name, kind, matrix: heard.add((name, kind))):
        out = model(torch.randint(0, config.vocab_size, (1, 32)))
        (out.logits.sum() + out.mtp_logits[0].sum()).backward()
    names = {name for name, _ in heard}
    assert len(heard) == 3 * len(names)
    assert names & set(apply(model, Float32()).kept) == {name for name in names if not name.endswith("experts")}
    assert not any(name.split(".")[-1] in KEPT for name in names)
