"""Steps compiled by `torch.compile`: the same numbers, up to rounding, in a fraction of the time.

    accelerate(model)  # then generate as before; steps of 1, 2, 4 and 8 rows are compiled when they are first met

Graphs are {embeddings, language model, output blocks} in `CompiledSteps.read`, the head's solver step with its
modulation, and the text logits, apart because nobody needs them after the last word. The caches are those of `cache.py`
and are written in place. On a GPU all are replayed as CUDA graphs (`replay.py`). The tokenizer's decoder and vocoder
stay plain: compiled they took as long.

What cannot be compiled stays as it is, after one warning that says why. A model is compiled for generation: weights may
change in place afterwards, layers must not be replaced.

Shapes: B rows, R rows of a graph (B or more), L positions, C positions there is room for, H hidden width,
X one speech token (D latents or K codes).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache import GrowingLayer, fork
from .modeling import FlowOmniModel, ModelState
from .replay import Replayed
from .streams import NONE, Streams

MAX_FEW_ROWS = 8  # rows up to which a product is a loop over the weights, and for which graphs are made
_MAX_SOME_ROWS = 63  # up to which `_some_rows_linear` is faster
_TOLERANCE = 1e-3  # between the fixed-shape step and the plain one, relative
_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ matrix products


def _few_rows_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` as one loop that reads each weight once: bound by memory alone, where a library's product is not.

    Two threads, 302 MB of float32 weights, one row: 10 ms against 11 to 170 ms of MKL and oneDNN. Int8 weights are
    converted in that loop: 1.9 ms against 2.8 (fbgemm), 4.5 (oneDNN) and 28 ms (`_weight_int8pack_mm`).
    """
    rows = input.reshape(-1, input.shape[-1]).unbind(0)
    output = torch.stack([(row * weight).sum(-1) for row in rows]).reshape(*input.shape[:-1], -1)
    return output if bias is None else output + bias


def _some_rows_linear(layer: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer whose product is taken the other way round for a prompt's few positions.

    Two threads, 302 MB of float32 weights, 27 rows: 24 ms against 37 (MKL); from 64 rows on there is no difference.
    """
    num_rows = math.prod(input.shape[:-1])
    if not MAX_FEW_ROWS < num_rows <= _MAX_SOME_ROWS or input.dtype != torch.float32 or input.device.type != "cpu":
        return torch.nn.functional.linear(input, layer.weight, layer.bias)
    output = (layer.weight @ input.reshape(num_rows, -1).t()).t().reshape(*input.shape[:-1], -1)
    return output if layer.bias is None else output + layer.bias


def _compile(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """All shapes are fixed, but for those marked as dynamic; linear layers of few rows on a CPU are as above."""
    compiler = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any, **options: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is torch._C._nn.linear:
                example = node.args[0].meta["example_value"]
                num_rows = math.prod(example.shape[:-1])
                if isinstance(num_rows, int) and num_rows <= MAX_FEW_ROWS and example.device.type == "cpu":
                    node.target = _few_rows_linear
        graph.recompile()
        return compiler(graph, inputs)

    # guards on all weights would take longer than the step itself
    options: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(function, backend=compile_graph, fullgraph=True, dynamic=False, options=options)


def _replayed(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return Replayed(function) if device.type == "cuda" else function


# ----------------------------------------------------------------------------------------------------- the model


class _Slot(CacheLayerMixin):
    """One layer's room, written at one position."""

    keys: Any
    values: Any

    def __init__(self, keys_RNCW: Tensor, values_RNCW: Tensor, slot_1: Tensor):
        super().__init__()
        self.keys, self.values, self.slot_1 = keys_RNCW, values_RNCW, slot_1
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the room is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot_1, key_states)
        self.values.index_copy_(2, self.slot_1, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # unknown in a graph; position ids and the mask say where things stand

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def not_compilable_because(config: PreTrainedConfig) -> str:
    """Why the layers of a language model cannot share one mask and one kind of cache; empty if they can."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"the language model has layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and not getattr(text, "layer_types", None):
        return f"the language model has a sliding window of {window} positions"
    return ""


class CompiledSteps:
    """`FlowOmniModel.read` for one position a row, with all shapes fixed but the room in the caches."""

    def __init__(self, model: FlowOmniModel, backend: str = "inductor"):
        self._model = model
        self._compiled = _compile(self._step, backend)
        self._run = _replayed(self._run_compiled, model.device)

    def takes(self, streams: Streams, state: ModelState) -> bool:
        """Whether that is such a step: one real position a row, after others."""
        layers = [*state.llm_cache.layers, *state.blocks_cache.layers]
        length = state.mask_BL.shape[1]
        return (
            streams.text_BL.shape[1] == 1
            and 0 < len(streams.text_BL) <= MAX_FEW_ROWS
            and length > 0
            and all(isinstance(layer, GrowingLayer) and layer.get_seq_length() == length for layer in layers)
            and bool(streams.mask_BL.all())
        )

    def read(self, streams: Streams, state: ModelState) -> tuple[Tensor, Tensor, ModelState]:
        """See `FlowOmniModel.advance`. Where the compiler gives up, the plain step is taken from then on."""
        try:
            return self._read(streams, state, self._run)
        except Exception as error:  # its errors have no class of their own
            reason = str(error).split("\n")[0]
            _log.warning("steps are no longer compiled: %s: %s", type(error).__name__, reason)
            self._model.fast = None
            return self._model.read(streams, state)

    def _read(self, streams: Streams, state: ModelState, run: Callable[..., Any]) -> tuple[Tensor, Tensor, ModelState]:
        num_rows, length = state.mask_BL.shape
        num_padded = _bucket(num_rows) - num_rows
        caches = fork(state.llm_cache), fork(state.blocks_cache)
        layers: list[Any] = [layer for cache in caches for layer in cache.layers]
        rooms = [layer.reserve(1, num_rows + num_padded) for layer in layers]
        capacity = rooms[0].keys_RNCW.shape[2]
        dtype, device = self._model.dtype, self._model.device
        shape = num_rows + num_padded, 1, 1, capacity
        mask_R11C = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        mask_R11C[:num_rows, 0, 0, :length].masked_fill_(state.mask_BL, 0.0)
        mask_R11C[..., length] = 0.0
        hidden_RH, speech_RH = run(
            _more_rows(streams.text_BL, num_padded),
            _more_rows(streams.state_BL, num_padded),
            _more_rows(streams.speech_BLX, num_padded),
            _more_rows(streams.generating_BL, num_padded),
            [room.keys_RNCW for room in rooms],
            [room.values_RNCW for room in rooms],
            mask_R11C,
            torch.tensor([length], device=device),
            _more_rows(state.num_seen_B.unsqueeze(1), num_padded),
        )
        for layer in layers:
            layer.fill(1, num_rows)
        mask_BL = torch.cat([state.mask_BL, streams.mask_BL], dim=1)
        return hidden_RH[:num_rows], speech_RH[:num_rows], ModelState(*caches, mask_BL, state.num_seen_B + 1)

    def _run_compiled(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        keys, values, mask_R11C = arguments[4:7]
        for room in (*keys, *values):
            torch._dynamo.mark_dynamic(room, 2)
        torch._dynamo.mark_dynamic(mask_R11C, 3)
        return self._compiled(*arguments)

    def _step(
        self,
        text_R1: Tensor,
        state_R1: Tensor,
        speech_R1X: Tensor,
        generating_R1: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        mask_R11C: Tensor,
        slot_1: Tensor,
        position_R1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        model = self._model
        x_R1H = model.embed_steps(text_R1, state_R1, speech_R1X, generating_R1)
        layers: list[Any] = [_Slot(k, v, slot_1) for k, v in zip(keys, values, strict=True)]
        num_blocks = 0 if model.output_blocks is None else model.output_blocks.num_layers
        num_layers = len(layers) - num_blocks
        hidden_R1H = model.llm.base_model(
            inputs_embeds=x_R1H,
            attention_mask=mask_R11C,
            position_ids=position_R1,
            past_key_values=Cache(layers=layers[:num_layers]),
            use_cache=True,
        ).last_hidden_state
        speech_R1H = hidden_R1H
        if model.output_blocks is not None:
            blocks_cache = Cache(layers=layers[num_layers:])
            speech_R1H = model.output_blocks(hidden_R1H, text_R1, mask_R11C, position_R1, blocks_cache)
        return hidden_R1H[:, 0], speech_R1H[:, 0]

    @torch.inference_mode()
    def check(self) -> str:
        """Why this step is not the plain step for this language model; empty if it is."""
        model = self._model
        if reason := not_compilable_because(model.config.llm):
            return reason
        empty_X = model.speech_tokenizer.spec.empty_token()
        nothing = torch.zeros(1, 3, dtype=torch.bool)
        prompt = Streams(
            text_BL=torch.tensor([[1, 0, 1]]),
            state_BL=torch.full((1, 3), NONE),
            speech_BLX=empty_X.expand(1, 3, *empty_X.shape),
            heard_BL=nothing,
            mask_BL=~nothing,
            text_loss_BL=nothing,
            state_loss_BL=nothing,
        ).to(model.device)
        one = Streams(**{k: v[:, :1] if isinstance(v, Tensor) else v for k, v in prompt.__dict__.items()})
        *_, state = model.advance(model.embed(prompt), prompt.mask_BL, model.init_state(1), prompt.text_BL)
        if not self.takes(one, state):
            return "its cache is of another kind"
        try:
            got = self._read(one, self._read(one, state, self._step)[2], self._step)
        except Exception as error:  # whatever a family does with its caches
            return f"the language model does not run with a cache of fixed size ({type(error).__name__}: {error})"
        for _ in range(2):
            *wanted, state = model.advance(model.embed(one), one.mask_BL, state, one.text_BL)
        for want_BH, got_BH in zip(wanted, got[:2], strict=True):
            if float((want_BH - got_BH).abs().max()) > _TOLERANCE * float(want_BH.abs().max()):
                return "the language model gives other numbers with a cache of fixed size"
        return ""


def _bucket(num_rows: int) -> int:
    """Rows of the graph that takes `num_rows`: 1, 2, 4, 8, .."""
    return 1 << (num_rows - 1).bit_length()


# ------------------------------------------------------------------------------------------------ the other parts


def _more_rows(x: Tensor, num_rows: int) -> Tensor:
    return pad(x, (0, 0) * (x.dim() - 1) + (0, num_rows))


class _Replaced:
    """A method of one object, compiled for few rows; the plain one otherwise, and for good if it does not compile.

    Its tensors and what it gives have B rows; rows are added to make a batch of 1, 2, 4 or 8.
    """

    def __init__(self, owner: Any, name: str, backend: str, device: torch.device):
        self._plain: Callable[..., Any] = getattr(owner, name)
        self._compiled: Callable[..., Any] | None = _replayed(_compile(self._plain, backend), device)
        self._name = f"{type(owner).__name__}.{name}"
        setattr(owner, name, self)

    def __call__(self, first: Tensor, *others: Any) -> Any:
        num_rows = len(first)
        if self._compiled is None or not 0 < num_rows <= MAX_FEW_ROWS:
            return self._plain(first, *others)
        num_padded = _bucket(num_rows) - num_rows
        arguments = [first, *others]
        if num_padded:
            arguments = [_more_rows(a, num_padded) if isinstance(a, Tensor) else a for a in arguments]
        try:
            found = self._compiled(*arguments)
        except Exception as error:
            _log.warning("%s is not compiled: %s: %s", self._name, type(error).__name__, str(error).split("\n")[0])
            self._compiled = None
            return self._plain(first, *others)
        return found[:num_rows] if num_padded else found


def accelerate(model: FlowOmniModel, backend: str = "inductor") -> None:
    """Compile the steps of a model that generates. Graphs are made when they are first needed, and kept on disk.

    What cannot be compiled stays plain, with a warning.

    Args:
        backend: of `torch.compile`; "aot_eager" makes the graphs and runs them without a compiler, for tests.
    """
    model.eval()
    for part in (model.llm, model.output_blocks):
        for layer in () if part is None else part.modules():
            if type(layer) is nn.Linear:
                vars(layer)["forward"] = functools.partial(_some_rows_linear, layer)
    steps = CompiledSteps(model, backend)
    if reason := steps.check():
        _log.warning("steps are not compiled: %s", reason)
    else:
        model.fast = steps
    _Replaced(model, "text_logits", backend, model.device)
    for name in model.head.compilable:
        _Replaced(model.head, name, backend, model.device)
