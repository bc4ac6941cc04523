"""What torch.compile makes of a loss and its gradient: graphs, breaks, recompilations and kernels, exactly.

    graphs            pieces of Python that were captured for the first call
    graph_breaks      places where capture stopped and Python went on by itself
    frames_skipped    functions that were not captured at all
    recompilations    graphs that further calls with other values of the same shape added
    kernels           loops that inductor writes for all graphs, forward and backward, after fusion
    extern_kernels    calls that it leaves to torch: matrix products

Inductor writes its code but nobody builds it: each graph then runs as it was captured. Building takes a minute, and
which vector instructions the compiler knows would decide how many loops are written (a tail beside a body), so code is
written for a processor without any. The names of inductor that are replaced are private; torch's own
`torch._inductor.utils.get_code` replaces the same.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.meters.paired import threads
from bench.variants import BATCH, LENGTH, VOCABULARY
from dsv3.config import Config
from dsv3.model import Transformer

Graph = torch.fx.GraphModule
CALLS = 3


def loss_of_rows(config: Config) -> tuple[Callable[[Tensor], Tensor], list[tuple[Tensor]]]:
    """The main loss of a fresh model, and the arguments of each call: other tokens, and so other experts."""
    model = Transformer(config.model, seed=0)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    generator = torch.Generator().manual_seed(0)
    return loss, [(torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator),) for _ in range(CALLS)]


def measure_compiled(loss: Callable[..., Tensor], calls: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    """Compile `loss`, call it with each of the arguments and go backward each time."""
    with _writing_only():
        return _measure(loss, calls)


def _measure(loss: Callable[..., Tensor], calls: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    graphs: list[Graph] = []
    torch.compiler.reset()
    counters.clear()
    written = metrics.generated_kernel_count
    with threads(1):
        compiled = torch.compile(loss, backend=_keep_graphs(graphs))
        compiled(*calls[0]).backward()
        first = len(graphs)
        for arguments in calls[1:]:
            compiled(*arguments).backward()
    found = {
        "graphs": first,
        "graph_breaks": sum(counters["graph_break"].values()),
        "frames_skipped": counters["frames"]["total"] - counters["frames"]["ok"],
        "recompilations": len(graphs) - first,
        "kernels": metrics.generated_kernel_count - written,
        "extern_kernels": counters["inductor"]["extern_calls"],
    }
    torch.compiler.reset()
    return found


def _keep_graphs(graphs: list[Graph]) -> Callable[[Graph, list[Tensor]], Any]:
    from torch._inductor.compile_fx import compile_fx

    def compile_graph(graph: Graph, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs, inner_compile=_write_code)

    return compile_graph


def _write_code(graph: Graph, inputs: list[Tensor], **options: Any) -> Any:
    """Have inductor write the code of a graph of operators; what runs is the graph as it was before."""
    from torch._inductor.compile_fx import compile_fx_inner

    before = torch.fx.Graph()
    before.output(before.graph_copy(graph.graph, {}))
    captured = Graph(graph, before)
    compile_fx_inner(graph, inputs, **options)

    def run(arguments: list[Any]) -> Any:
        return captured(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]  # arguments come as one list, as from inductor's own code
    return run


@contextmanager
def _writing_only() -> Iterator[None]:
    from torch._inductor import config

    # Any program that answers --version passes for the compiler that the loops' pragmas are chosen for.
    settings = config.patch({"force_disable_caches": True, "cpp.cxx": (sys.executable,)})
    no_vectors = mock.patch("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    no_building = mock.patch("torch._inductor.graph.GraphLowering.compile_to_module", _written)
    with settings, no_vectors, no_building, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # what inductor itself imports
        # dynamo looks at every tensor that goes on behind a break
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def _written(lowering: Any) -> Any:
    lowering.codegen()
    return mock.Mock(spec=["call"])
