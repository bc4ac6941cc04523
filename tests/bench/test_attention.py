"""The arms of attention and of decoding: they agree with the reference, and one that does not is found out."""

import pytest
import torch

from bench import attention, decoding
from bench.attention_sizes import ARMS, HEADS, KEEP, KEYS
from dsv3.attention.select import window


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_agrees_with_the_reference(arm: str) -> None:
    attention.check(arm, attention.inputs(300))


@pytest.mark.parametrize("arm", ["per_head_share", "window"])
def test_an_arm_that_sees_other_keys_is_found_out(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose", lambda arm, given: window(1, given.q.shape[2], given.q.shape[2], size=99))
    with pytest.raises(AssertionError, match=arm):
        attention.check(arm, attention.inputs(600))


def test_an_arm_with_a_wrong_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(arm: str, given: attention.Inputs) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(given.q, given.k, given.v, is_causal=True)
        return out.detach() + (out - out.detach()) / 2

    monkeypatch.setattr(attention, "forward", half)
    with pytest.raises(AssertionError, match="sdpa"):
        attention.check("sdpa", attention.inputs(64))


def test_a_share_and_a_number_are_what_their_names_say() -> None:
    given, length = attention.inputs(1024), 1024
    share, number = (attention.choose(arm, given) for arm in ("per_head_share", "per_head_number"))
    assert share is not None
    assert number is not None
    assert share.cost.kept == HEADS * sum(max(1, int(KEEP * visible)) for visible in range(1, length + 1))
    assert number.cost.kept == HEADS * sum(min(KEYS, visible) for visible in range(1, length + 1))


def test_inputs_are_the_same_each_time_and_keep_no_gradient() -> None:
    one, other = attention.inputs(20), attention.inputs(20)
    attention.training("per_head_number", one)
    assert all(torch.equal(a, b) for a, b in zip(one.leaves(), other.leaves(), strict=True))
    assert all(leaf.grad is None for leaf in one.leaves())


@pytest.mark.parametrize("form", decoding.FORMS)
def test_decoding_equals_the_whole_forward_and_repeats(form: str) -> None:
    decoding.check(form)
    made = decoding.layer(form, 20)
    assert torch.equal(made.decode(), made.decode())
    assert made.cache.length == 19


def test_a_form_that_decodes_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoding.layer
    monkeypatch.setattr(decoding, "layer", lambda form, length, device: real(form, length - 1, device))
    with pytest.raises(AssertionError):
        decoding.check("latent")


def test_absorbed_and_expanded_decoding_agree() -> None:
    absorbed, expanded = (decoding.layer(form, 50).decode() for form in ("latent", "latent_expanded"))
    # four products of up to 1024 terms in fp32, in orders of their own
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=4 * 32 * torch.finfo(torch.float32).eps * 4)
