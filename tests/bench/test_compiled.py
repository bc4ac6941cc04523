"""What torch.compile makes of a function is counted: captures, breaks, recompilations and kernels."""

import pytest
import torch
from torch import Tensor

from bench.compiled import measure_compiled

X = torch.ones(4, 4, requires_grad=True)


def chain(x: Tensor) -> Tensor:
    return (torch.sin(x) * 2 + 1).sum()


def test_a_chain_is_one_graph_with_one_kernel_each_way() -> None:
    assert measure_compiled(chain, [(X,), (X,)]) == {
        "graphs": 1,
        "graph_breaks": 0,
        "frames_skipped": 0,
        "recompilations": 0,
        "kernels": 2,
        "extern_kernels": 0,
    }


def test_a_product_is_left_to_torch_and_splits_the_kernels() -> None:
    found = measure_compiled(lambda x: ((torch.sin(x) @ x) * 2).sum(), [(X,)])
    assert found["extern_kernels"] == 3  # forward, and the gradients of both factors
    assert found["kernels"] > 2


def test_a_value_that_steers_python_breaks_the_graph() -> None:
    def steered(x: Tensor) -> Tensor:
        y = torch.sin(x)
        torch._dynamo.graph_break()
        return (y * 2).sum()

    found = measure_compiled(steered, [(X,)])
    assert (found["graphs"], found["graph_breaks"]) == (2, 1)


def test_another_constant_is_compiled_again() -> None:
    found = measure_compiled(lambda x, flag: (x * (2 if flag else 3)).sum(), [(X, True), (X, False), (X, True)])
    assert (found["graphs"], found["recompilations"]) == (1, 1)


def test_a_function_that_is_left_alone_is_a_skipped_frame() -> None:
    def looped(x: Tensor) -> Tensor:
        for _ in range(2):  # a break inside a loop leaves the whole function to Python
            torch._dynamo.graph_break()
        return x.sum()

    assert measure_compiled(looped, [(X,)])["frames_skipped"] >= 1


def test_what_runs_is_the_function_and_real_compilation_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = X.detach().clone().requires_grad_()
    measure_compiled(chain, [(leaf,)])
    torch.testing.assert_close(leaf.grad, torch.cos(X.detach()) * 2)
    from torch._inductor.graph import GraphLowering

    assert GraphLowering.compile_to_module.__name__ == "compile_to_module"
