"""Cases of a whole training step: dsv3 against transformers' DeepseekV3ForCausalLM, the same model in both.

A step is forward, cross-entropy, backward and a fused AdamW update of 128 experts of width 128 (top-2, one shared) in
three of four layers, on 4 sequences of 512 tokens in fp32. The peer has its fastest parts, grouped_mm experts and SDPA
attention, and no cache; its weights are read from a checkpoint that dsv3 wrote. Both sides run eager and, in the full
profile alone, compiled: a quick run does not tell which is the peer's best mode. Widths keep DeepSeek-V3's proportions
(queries and keys 3/2 as wide as values). Balance losses and the bias update are left out, as the peer has neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Figures
from bench.measurement import Measurement
from bench.meters.flops import flops
from bench.record import Profile
from dsv3.config import Latent, Model, MoE
from dsv3.model import Transformer, cost, hf

BATCH, LENGTH = 4, 512
# So small that dozens of timed steps on one batch leave the routing, and with it the work, as it was.
RATE = 1e-6
PEER, OURS = "transformers", "dsv3"


def shapes() -> Model:
    """The model of the case, which both sides build."""
    return Model(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=1024,
        first_k_dense_replace=1,
        attention=Latent(
            num_attention_heads=8,
            q_lora_rank=128,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
        moe=MoE(n_routed_experts=128, num_experts_per_tok=2, moe_intermediate_size=128, balance=()),
        max_position_embeddings=LENGTH,
    )


@dataclass(frozen=True)
class Side:
    """One arm: a model, its loss on the batch (and the same without compilation), the optimizer over its parameters."""

    model: nn.Module
    loss: Callable[[], Tensor]
    eager_loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> Tensor:
        """One training step; returns the loss before the update."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def bench_step(
    measure_arms: Callable[..., Figures],
    keep: Callable[..., None],
    device: torch.device,
    profile: Profile,
    tmp_path: Path,
    mode: str,
) -> None:
    """A training step of the same model, transformers' against ours."""
    if mode == "compiled" and profile == "quick":
        pytest.skip("compiling both sides takes minutes: full profile only")
    ours, theirs = sides(tmp_path, device, compiled=mode == "compiled")
    axes = {"mode": mode, "batch": BATCH, "length": LENGTH}
    per_step = BATCH * LENGTH * cost.flops_per_token(shapes(), LENGTH, training=True)
    measure_arms(
        phase="step",
        baseline=PEER,
        arms={PEER: theirs.step, OURS: ours.step},
        check=lambda: check_equal(ours, theirs),
        axes=axes,
        tokens=BATCH * LENGTH,
        flops=per_step,
    )
    counts = [
        Measurement(metric="parameters", value=cost.parameters(shapes())),
        Measurement(metric="flops", value=round(per_step)),
    ]
    keep(OURS, counts, baseline=PEER, axes=axes)


def sides(directory: Path, device: torch.device, *, compiled: bool) -> tuple[Side, Side]:
    """Our side and the peer's, with equal weights, on one batch of random tokens."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours = Transformer(shapes())
    hf.save(ours, directory / "checkpoint")
    theirs: Any = DeepseekV3ForCausalLM.from_pretrained(
        directory / "checkpoint", attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    theirs.config.use_cache = False
    rows = torch.randint(shapes().vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens, targets = rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)
    ours, theirs = ours.to(device).train(), theirs.to(device).train()

    def loss_of_ours() -> Tensor:
        return F.cross_entropy(ours(tokens).logits.flatten(0, 1), targets.flatten())

    def loss_of_theirs() -> Tensor:
        return theirs(tokens, labels=targets, shift_labels=targets).loss

    return _side(ours, loss_of_ours, compiled=compiled), _side(theirs, loss_of_theirs, compiled=compiled)


def _side(model: nn.Module, loss: Callable[[], Tensor], *, compiled: bool) -> Side:
    return Side(model, torch.compile(loss) if compiled else loss, loss, adamw(model))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def check_equal(ours: Side, theirs: Side) -> None:
    """Refuse to time sides that differ in parameters, in work, in optimizer, or in the loss before and after a step.

    Scores and their softmax are counted by formula: the peer's kernel for unequal widths and ours take different
    operators for the same causal attention.
    """
    sizes = [sum(parameter.numel() for parameter in side.model.parameters()) for side in (ours, theirs)]
    assert sizes == [cost.parameters(shapes())] * 2, f"parameters of ours and theirs: {sizes}"
    assert type(ours.optimizer) is type(theirs.optimizer), "optimizers differ"
    assert ours.optimizer.defaults == theirs.optimizer.defaults, "settings of the optimizers differ"
    # fp32 sums of up to 4096 terms in different orders on each side: eps x sqrt(terms), over four layers
    tolerance = 4 * torch.finfo(torch.float32).eps * 4096**0.5
    for _ in range(2):
        torch.testing.assert_close(ours.step(), theirs.step(), rtol=tolerance, atol=0.0)
    products = sum(
        value for name, value in cost.forward_flops(shapes(), LENGTH).items() if not name.endswith(".scores")
    )
    expected = (1 + cost.BACKWARD_OVER_FORWARD) * BATCH * products
    counted = [flops(partial(_backward, side), more=WITHOUT_SCORES).value for side in (ours, theirs)]
    for side in (ours, theirs):
        side.optimizer.zero_grad(set_to_none=True)
    assert counted == [expected] * 2, f"FLOPs of ours and theirs: {counted}, by formula {expected}"


def _backward(side: Side) -> None:
    side.eager_loss().backward()


def _nothing(*shapes: Any, **rest: Any) -> int:
    return 0


WITHOUT_SCORES = {
    torch.ops.aten.bmm: _nothing,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _nothing,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _nothing,
    torch.ops.aten._scaled_dot_product_flash_attention: _nothing,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _nothing,
    torch.ops.aten._scaled_dot_product_efficient_attention: _nothing,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _nothing,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _nothing,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: _nothing,
}
