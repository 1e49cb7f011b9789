"""Training steps to be measured: shapes, models with random weights, batches, and what a step spends on each part.

Shapes: B rows, L positions, D latent dimension, C Whisper mel bins, F Whisper mel frames.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedModel, WhisperConfig

from flowomni.configuration import FlowOmniConfig
from flowomni.encoder import Projector, SpeechEncoder
from flowomni.losses import Loss
from flowomni.modeling import FlowOmniModel
from flowomni.streams import NONE, SpeechState, Streams
from flowomni.tokenizers import MelTokenizerConfig
from flowomni.tokenizers.base import SpeechTokenizer
from training.train import parameter_groups

LATENT_DIM = 32
ENCODER_STACK = 4
FRAMES_PER_HEARD = 2 * ENCODER_STACK  # mel frames of one heard position
OTHER = "other"


@dataclass(frozen=True)
class Shape:
    """A model and the rows of its batch.

    A row is `num_prompt` positions of text, then the answer: two steps of delay, `num_spoken` speech tokens, one step
    that stops; the first `num_text` of these positions have text. With `num_text` 0 it is as PocketTTS has it: no text
    in the answer, which starts at the prompt's last position and ends with the last speech token.
    """

    llm: dict[str, Any]
    head: dict[str, Any]
    output_blocks: dict[str, Any]
    encoder: dict[str, Any]
    num_rows: int
    num_prompt: int
    num_spoken: int
    num_text: int
    peer: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.num_prompt + self.num_spoken + (3 if self.num_text else 0)

    @property
    def num_positions(self) -> int:
        return self.num_rows * self.length

    def __str__(self) -> str:
        llm, head, blocks = self.llm, self.head, self.output_blocks
        return (
            f"LLM {llm['num_hidden_layers']} x {llm['hidden_size']}, vocabulary {llm['vocab_size']:,}; "
            f"{blocks['num_layers']} output blocks; head {head['num_blocks']} x {head['width']}; "
            f"{self.num_rows} rows of {self.length} positions, {self.num_spoken} spoken"
        )


def llm_sizes(
    kind: str, width: int, layers: int, heads: int, inner: int, vocabulary: int, kv: int = 0
) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocabulary}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv or heads}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"model_type": kind, "tie_word_embeddings": True} | sizes | attention | ids


def whisper_sizes(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    sizes = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": inner}
    return sizes | {"num_mel_bins": 80, "max_source_positions": 1500}


def head_sizes(width: int, blocks: int) -> dict[str, Any]:
    return {"kind": "flow", "width": width, "num_blocks": blocks, "objective": "lsd"}


SHAPES = {
    # seconds of nothing, for tests
    "toy": Shape(
        llm=llm_sizes("qwen2", 32, 2, 2, 48, 64),
        head=head_sizes(16, 1),
        output_blocks={"num_layers": 1, "num_heads": 2},
        encoder=whisper_sizes(16, 1, 2, 32),
        num_rows=2,
        num_prompt=6,
        num_spoken=5,
        num_text=3,
        peer={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    ),
    # configs/tiny and the rows of its corpus: 2.6 s heard, 2.3 s spoken
    "small": Shape(
        llm=llm_sizes("qwen2", 256, 6, 4, 768, 698),
        head=head_sizes(256, 4),
        output_blocks={"num_layers": 2, "num_heads": 4, "intermediate_size": 768},
        encoder=whisper_sizes(256, 4, 4, 768),
        num_rows=32,
        num_prompt=37,
        num_spoken=27,
        num_text=8,
    ),
    # SmolLM2-135M with the default six output blocks and Whisper base
    "medium": Shape(
        llm=llm_sizes("llama", 576, 30, 9, 1536, 49_152, kv=3),
        head=head_sizes(512, 6),
        output_blocks={"num_layers": 6, "num_heads": 8},
        encoder=whisper_sizes(512, 6, 8, 2048),
        num_rows=8,
        num_prompt=37,
        num_spoken=40,
        num_text=14,
    ),
    # as large as PocketTTS, no output blocks: a layer has 0.2 % more parameters (2736 x 3 for 4096 x 2)
    "wide": Shape(
        llm=llm_sizes("llama", 1024, 6, 16, 2736, 4004),
        head=head_sizes(512, 6),
        output_blocks={"num_layers": 0},
        encoder=whisper_sizes(512, 6, 8, 2048),
        num_rows=8,
        num_prompt=17,
        num_spoken=60,
        num_text=20,
    ),
}


# ----------------------------------------------------------------------------------------------- models and batches


def tokenizer_config() -> MelTokenizerConfig:
    """The smallest tokenizer with latents of the right width: it only says what a speech token is."""
    sizes = {"width": 8, "intermediate_dim": 8, "frame_width": 8}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_frame_layers": 1}
    vocoder = {"dim": 8, "intermediate_dim": 8, "num_layers": 1}
    return MelTokenizerConfig(autoencoder={"latent_dim": LATENT_DIM} | sizes | layers, vocoder=vocoder)


def speech_model(shape: Shape, attention: str) -> FlowOmniModel:
    """A model without ears, in training mode."""
    values = {k: v for k, v in shape.llm.items() if k != "model_type"}
    config = FlowOmniConfig(
        llm=AutoConfig.for_model(shape.llm["model_type"], **values),
        speech_tokenizer=tokenizer_config().to_dict(),
        head=shape.head,
        output_blocks=shape.output_blocks,
    )
    return with_attention(FlowOmniModel(config), attention).train()


def with_attention(module: Any, attention: str) -> Any:
    """The module, whose transformers attend as stage `speech` lets them."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and not isinstance(part, FlowOmniModel | SpeechTokenizer):
            part.set_attn_implementation(attention)
    return module


def speech_batch(shape: Shape, seed: int = 0) -> Streams:
    """Equal rows, filled to the last position. Text is a target where the answer has it, every speech token is one."""
    generator = torch.Generator().manual_seed(seed)
    size, place_L = (shape.num_rows, shape.length), torch.arange(shape.length)
    first = shape.num_prompt + (2 if shape.num_text else 0)
    answer_L, spoken_L = place_L >= shape.num_prompt, (place_L >= first) & (place_L < first + shape.num_spoken)
    state_L = torch.full((shape.length,), NONE)
    state_L[answer_L] = int(SpeechState.PAD)
    state_L[first - 1], state_L[spoken_L] = int(SpeechState.START), int(SpeechState.GENERATING)
    if shape.num_text:
        state_L[-1] = int(SpeechState.STOP)
    text_BL = torch.randint(shape.llm["vocab_size"], size, generator=generator)
    text_BL[:, place_L >= shape.num_prompt + shape.num_text] = NONE
    latent_BLD = torch.randn(*size, LATENT_DIM, generator=generator)
    latent_BLD[:, ~spoken_L] = float("nan")
    return Streams(
        text_BL=text_BL,
        state_BL=state_L.repeat(shape.num_rows, 1),
        speech_BLX=latent_BLD,
        heard_BL=torch.zeros(size, dtype=torch.bool),
        mask_BL=torch.ones(size, dtype=torch.bool),
        text_loss_BL=(text_BL != NONE) & answer_L,
        state_loss_BL=answer_L.repeat(shape.num_rows, 1),
    )


def total_loss(losses: Mapping[str, Loss]) -> Tensor:
    """The parts that train, with weight 1 each, per target."""
    return torch.stack([loss.sum / loss.count for name, loss in losses.items() if "/" not in name]).sum()


# --------------------------------------------------------------------------------------------------------- steps


class Step:
    """Forward, backward, clipping and AdamW, as `training.train` does them.

    Args:
        module: what trains; what is frozen in it has no optimizer state.
        loss: one forward pass.
        watched: what belongs to which part, as (owner, name of a method, part); see `ByPart`.
        num_positions: of the batch.
        half: bf16 autocast.
        in_float32: parts that compute in float32 nevertheless.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[], Tensor],
        watched: Sequence[tuple[Any, str, str]],
        num_positions: int,
        half: bool = False,
        in_float32: Sequence[str] = (),
    ):
        self.module, self.loss, self.num_positions = module, loss, num_positions
        self.half, self.in_float32 = half, in_float32
        self.watched = [*watched, (self, "update", "clip and optimizer")]
        self.optimizer = torch.optim.AdamW(parameter_groups(module, 0.01), lr=1e-5, betas=(0.9, 0.99))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def __call__(self) -> None:
        device = next(self.module.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            total = self.loss()
        total.backward()
        self.update()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def watched_parts(model: FlowOmniModel) -> list[tuple[Any, str, str]]:
    """What `ByPart` tells apart in a speech step."""
    blocks = [] if model.output_blocks is None else [(model.output_blocks, "forward", "output blocks")]
    return [
        (model, "embed", "embeddings"),
        (model.llm.base_model, "forward", "LLM"),
        (model, "_text_loss", "text head"),
        *blocks,
        (model.state_head, "loss", "state head"),
        (model.head, "loss", "speech head"),
    ]


def speech_step(model: FlowOmniModel, shape: Shape, half: bool = False) -> Step:
    """A step of everything but the encoder: the prompt is text."""
    batch, generator = speech_batch(shape).to(model.device), torch.Generator(model.device).manual_seed(0)
    loss = lambda: total_loss(model(batch, generator))  # noqa: E731
    return Step(model, loss, watched_parts(model), shape.num_positions, half, in_float32=["speech head"])


def text_step(model: FlowOmniModel, shape: Shape, half: bool = False) -> Step:
    """A step of the plain language model on rows as long, where every position is a text target."""
    llm = model.llm
    ids_BL = torch.randint(shape.llm["vocab_size"], (shape.num_rows, shape.length), device=llm.device)
    watched = [(llm, "forward", "text head"), (llm.base_model, "forward", "LLM")]
    loss = lambda: llm(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss  # noqa: E731
    return Step(llm, loss, watched, shape.num_positions, half)


def encoder_step(shape: Shape, attention: str, half: bool = False) -> Step:
    """A step of encoder and projector alone, on the clips that would fill the prompts."""
    config = WhisperConfig(**shape.encoder)
    encoder = SpeechEncoder(config)
    encoder.whisper.embed_positions.requires_grad_(False)
    projector = Projector(config.d_model, shape.llm["hidden_size"], ENCODER_STACK)
    ears = with_attention(nn.ModuleList([encoder, projector]), attention).train()
    num_frames = FRAMES_PER_HEARD * shape.num_prompt
    features_BCF = torch.randn(shape.num_rows, config.num_mel_bins, num_frames)
    lengths_B = torch.full((shape.num_rows,), num_frames)
    loss = lambda: projector(*encoder(features_BCF, lengths_B))[0].square().mean()  # noqa: E731
    watched = [(encoder, "forward", "encoder"), (projector, "forward", "projector")]
    return Step(ears, loss, watched, shape.num_rows * shape.num_prompt, half)


def peer_config(shape: Shape) -> Any:
    """PocketTTS of a shape's width and head.

    Raises:
        ValueError: this transformers is too old to have it.
    """
    try:
        from transformers import PocketTTSConfig
    except ImportError as error:
        raise ValueError(f"transformers {transformers.__version__} has no PocketTTS: install 5.21 or newer") from error
    head = {"hidden_size": shape.head["width"], "num_hidden_layers": shape.head["num_blocks"]}
    flow = {"condition_dim": shape.llm["hidden_size"], "latent_dim": LATENT_DIM} | head
    return PocketTTSConfig(flow_head_config=flow, latent_dim=LATENT_DIM, **shape.peer)


def peer_steps(shape: Shape, half: bool = False) -> dict[bool, Step]:
    """PocketTTS's steps, without and with self-distillation; a row is `num_prompt` of text and `num_spoken` of speech.

    The text's last position is the one that starts the speech. Which steps distil is drawn by the model, a quarter of
    them by default; here it is told. Attention is the model's default; "eager" is no faster at this size.
    """
    config = peer_config(shape)
    from transformers import PocketTTSForConditionalGeneration

    model = PocketTTSForConditionalGeneration(config).train()
    ids_BL = torch.randint(4, config.audio_prompt_token_id, (shape.num_rows, shape.length))
    ids_BL[:, shape.num_prompt - 1] = config.audio_bos_token_id
    ids_BL[:, shape.num_prompt :] = config.audio_latent_token_id
    latent_BLD = torch.randn(shape.num_rows, shape.num_spoken, LATENT_DIM)

    def loss(distils: bool) -> Tensor:
        model.config.lsd_distill_probability = float(distils)
        return model(input_ids=ids_BL, labels=latent_BLD, use_cache=False).loss

    watched = [(model, "forward", "speech head"), (model.model, "forward", "LLM")]
    plain = Step(model, partial(loss, False), watched, shape.num_positions, half)
    distilling = Step(model, partial(loss, True), watched, shape.num_positions, half)
    distilling.optimizer = plain.optimizer  # one model, one state
    return {False: plain, True: distilling}


# --------------------------------------------------------------------------------------------------------- meters


class ByPart:
    """Shares out what a meter counts during a step over the parts that are at work.

    A part begins when one of its methods is called, and ends there; in the backward pass it begins when the gradient of
    what the method returned is taken on, and ends where the next part's does. Autograd works on what was made last
    first, so that is the forward pass in reverse.

    Args:
        read: the meter's present count.
    """

    def __init__(self, read: Callable[[], float]):
        self.read, self.counts = read, defaultdict[str, float](float)
        self._part, self._since = OTHER, 0.0
        self._made: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __call__(self, step: Step) -> dict[str, float]:
        """Run one step: the count of each part."""
        self.counts.clear()
        self._part, self._since = OTHER, self.read()
        with self.watching(step.watched):
            step()
            self.begin(OTHER)
        return dict(self.counts)

    def begin(self, part: str) -> str:
        """From now on it counts for `part`; returns the part that it counted for."""
        now, before = self.read(), self._part
        self.counts[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def watching(self, watched: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Within the context each of these methods begins its part."""
        for owner, name, part in watched:
            setattr(owner, name, self._wrapped(getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, _ in watched:
                delattr(owner, name)  # the class's method is there again

    def _wrapped(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def backward(gradient: Tensor) -> None:
            self.begin(part)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before = self.begin(part)
            try:
                result = method(*args, **kwargs)
                for tensor in _tensors(result):
                    # what a part inside this one has made, and this one hands on, stays that one's
                    if tensor.requires_grad and self._made.get(id(tensor)) is not tensor:
                        self._made[id(tensor)] = tensor
                        tensor.register_hook(backward)
                return result
            finally:
                self.begin(before)

        return wrapper


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def flops_by_part(step: Step) -> dict[str, float]:
    """Floating-point operations of the matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        return ByPart(counter.get_total_flops)(step)


def seconds_by_part(step: Step, repeats: int) -> dict[str, float]:
    """Median seconds of each part."""
    found = [ByPart(time.perf_counter)(step) for _ in range(repeats)]
    return {part: statistics.median(each.get(part, 0.0) for each in found) for part in found[-1]}


def matmul_peak(dtype: torch.dtype, size: int, repeats: int, device: str = "cpu") -> float:
    """Floating-point operations per second of the best of `repeats` products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return max(2 * size**3 / seconds(lambda: a @ b) for _ in range(repeats + 1))


# --------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, with what it leaves a GPU to do."""
    wait_for_gpu()
    start = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    """Until a GPU that this process has used is idle."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(steps: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs all of them in turn. The round that warms up is not counted."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        gc.collect()
        for name, step in steps.items():
            found[name].append(seconds(step))
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of each round's two values."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
