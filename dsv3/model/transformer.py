"""The decoder: embedding, blocks, final norm, head, and multi-token prediction beside it.

    x = Emb(t);   x = Block_i(x), i = 0 ... n-1;   logits = Head(RMSNorm(x))

Parameters carry the names of the published checkpoints (`dsv3.model.hf.names` has the two exceptions). With a cache
only the new tokens are passed and the result equals the last positions of a forward pass over all of them;
multi-token prediction is then left out, as it has no part in the next token. Where it is said where documents begin,
attention sees none but its own and positions count from its beginning; all else goes token by token. Padding stands
behind a row's tokens, where causal attention sees it from nowhere, and no router counts it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dsv3.attention import Documents, KeyValueCache, Selection
from dsv3.config import Model
from dsv3.config.rules import require
from dsv3.layers import RMSNorm
from dsv3.model.block import Block
from dsv3.model.cost import mtp_depths
from dsv3.model.initialise import initialise
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.output import ModelOutput
from dsv3.moe import Routing


class Transformer(nn.Module):
    """The model of a config, with the initial weights of a seed; under `with torch.device("meta")`, shapes alone."""

    def __init__(self, model: Model, *, seed: int = 0) -> None:
        super().__init__()
        self.config = model
        # torch fills its own layers from the global stream first, which must not move what the caller draws from it
        with torch.random.fork_rng(devices=[]):
            self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
            self.layers = nn.ModuleList(Block(model, layer) for layer in range(model.num_hidden_layers))
            self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)
            tied = model.tie_word_embeddings
            self.lm_head = None if tied else nn.Linear(model.hidden_size, model.vocab_size, bias=False)
            self.mtp = nn.ModuleList(MultiTokenPrediction(model, depth) for depth in range(mtp_depths(model)))
        initialise(self, std=model.initializer_range, embedding_std=model.embedding_range, seed=seed)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
        lengths: Int[Tensor, " rows"] | None = None,
        mtp: bool = True,
    ) -> ModelOutput:
        """Logits for each position, and everything that was decided on the way. `mtp=False` leaves out multi-token
        prediction, as a cache does. `documents`: per row, where packed documents begin. `lengths`: per row, how many
        tokens stand before its padding, whose own outputs mean nothing.

        Raises:
            ValueError: for no tokens, tokens outside the vocabulary (checked on a CPU only), more positions than
                max_position_embeddings, lengths of other rows, or documents or lengths with a cache.
        """
        self._check(tokens, 0 if cache is None else cache.length)
        rule = "must be None with a cache, which continues one document per row"
        require(documents is None or cache is None, "documents", documents, rule, "leave out one of the two")
        self._check_lengths(lengths, tokens, cache)
        embedded = self.embed_tokens(tokens)
        hidden, routings, selections = embedded, [], []
        for layer, block in enumerate(self.layers):
            held = None if cache is None else cache.layers[layer]
            hidden, routing, kept = block(hidden, cache=held, documents=documents, lengths=lengths)
            routings.append(routing)
            selections += kept
        normed = self.norm(hidden)
        further: list[Tensor] = []
        if self.mtp and mtp and cache is None:
            assert self.config.mtp is not None, "modules of multi-token prediction come from model.mtp"
            first = normed if self.config.mtp.hidden == "post_norm" else hidden
            further, more_routings, more_selections = self._predict_further(first, embedded, documents, lengths)
            routings += more_routings
            selections += more_selections
        return ModelOutput(
            logits=self.head(normed),
            mtp_logits=tuple(further),
            routing=tuple(routing for routing in routings if routing is not None),
            selection=tuple(selections),
            cache=None if cache is None else cache.advance(tokens.shape[1]),
        )

    def head(self, normed: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Logits of normalised hidden states; a tied head is the embedding's own matrix."""
        return F.linear(normed, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(normed)

    def _predict_further(
        self, hidden: Tensor, embedded: Tensor, documents: Documents | None, lengths: Tensor | None
    ) -> tuple[list[Tensor], list[Routing | None], list[Selection | None]]:
        logits, routings = [], []
        selections: list[Selection | None] = []
        length = embedded.shape[1]
        for ahead, module in enumerate(self.mtp, start=1):
            if ahead >= length:
                # A row this short has no token that far ahead; its logits are an empty [B, 0, V].
                logits.append(embedded.new_zeros(embedded.shape[0], 0, self.config.vocab_size))
                continue
            begun = documents and [[start for start in row if start < length - ahead] for row in documents]
            left = None if lengths is None else (lengths - ahead).clamp(min=0)
            normed, hidden, routing, kept = module(
                hidden[:, : length - ahead], embedded[:, ahead:], documents=begun, lengths=left
            )
            logits.append(self.head(normed))
            routings.append(routing)
            selections += kept
        return logits, routings, selections

    def _check_lengths(self, lengths: Tensor | None, tokens: Tensor, cache: KeyValueCache | None) -> None:
        if lengths is None:
            return
        require(cache is None, "lengths", lengths, "must be None with a cache", "decode rows of one length together")
        rows, most = tokens.shape
        fits = lengths.shape == (rows,) and bool(((lengths >= 0) & (lengths <= most)).all())
        require(fits, "lengths", lengths, f"must be {rows} numbers in [0, {most}]", "count each row's tokens")

    def _check(self, tokens: Tensor, before: int) -> None:
        require(
            tokens.ndim == 2 and tokens.numel() > 0,
            "tokens.shape",
            tuple(tokens.shape),
            "must be [B, T] and not empty",
            "pass at least one token per row",
        )
        stop, most = before + tokens.shape[1], self.config.max_position_embeddings
        rule = f"must be at most max_position_embeddings={most}"
        require(stop <= most, "positions", stop, rule, "shorten the sequence or raise the maximum")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(end) for end in tokens.aminmax())
            rule = f"must be in [0, {self.config.vocab_size})"
            require(low >= 0 and high < self.config.vocab_size, "tokens", (low, high), rule, "check the tokenizer")
