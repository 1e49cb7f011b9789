"""`python -m training.train --config FILE --plan`: parameters, and memory per GPU, before anything is allocated.

Shapes: B batch, L positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from flowomni.modeling import FlowOmniModel

from .outline import Sizes, outline
from .stages.hearing import HearingOptions, HearingTraining
from .stages.speech import TASKS, SpeechOptions
from .stages.text import TextOptions
from .stages.tokenizer import TokenizerTraining
from .stages.vocoder import STFT_SIZES, VocoderTraining
from .train import RunOptions

ENCODER_FRAMES_PER_SEC = 50
TEXT_TOKENS_PER_SEC = 4  # three words a second, four tokens for three words
TEMPLATE_TOKENS = 64  # chat template and instruction
TALK_TOKENS = 64  # longest conversation of stage `text`
LOGIT_BYTES = 14  # half precision, float32, its log-softmax, and the gradient of one
# layers whose input another one keeps already: queries, keys and values are made of one input, gate and up of one
SHARED_INPUT = ("k_proj", "v_proj", "up_proj")
# layers whose output is added to the residual stream, which no derivative needs
ADDED = ("o_proj", "out_proj", "down_proj", "fc2")
STFT_BYTES_PER_SAMPLE = 100  # measured: what the spectral losses keep, per sample and STFT size
GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Attributes:
        name: as printed.
        num_parameters, num_trainable: tied ones are counted once.
        activation_bytes: what a backward pass needs of it, for the longest micro-batch.
        in_flight_bytes: what comes and goes while its backward pass is at work.
    """

    name: str
    num_parameters: int
    num_trainable: int
    activation_bytes: int = 0
    in_flight_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a stage needs. Memory is per GPU, in bytes; every GPU holds the whole model.

    The loop keeps float32 weights and averages (EMA), so with P parameters of which T train:

        weights 4 P,  gradients 4 T,  Adam's two moments 8 T,  averages 4 T,
        half-precision copies of the weights that autocast keeps until the backward pass: 2 bytes for each parameter of
        a part that gradients flow through,
        activations: see `activations`, for the longest micro-batch that the options allow,
        in flight: see `in_flight`, of the part where it is most.

    Accumulation costs nothing. Several processes add 4 T, the buckets through which gradients are exchanged. Not
    counted: the CUDA context (about 0.5 GiB), fragmentation, a second copy of the trained parameters during an
    evaluation (when there are no activations), and what self-distillation adds (half of what the head keeps).

    Attributes:
        module: the outlined module, on the meta device.
        parts: in the order of the data's way through them.
        longest: the micro-batch that the activations are of, in words.
        half_bytes: see above; 0 without mixed precision.
        teacher_bytes: weights of a frozen teacher that stands beside the module.
        sources: checkpoints whose sizes were found elsewhere, and where.
    """

    module: nn.Module
    parts: list[Part]
    longest: str
    half_bytes: int = 0
    teacher_bytes: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_trainable(self) -> int:
        return sum(part.num_trainable for part in self.parts)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        trained = self.num_trainable
        teacher = {"weights of the teacher": self.teacher_bytes} if self.teacher_bytes else {}
        return {
            "weights": 4 * self.num_parameters,
            **teacher,
            "gradients": 4 * trained,
            "Adam states": 8 * trained,
            "averages (EMA)": 4 * trained,
            "half-precision copies": self.half_bytes,
            "activations (estimate)": sum(part.activation_bytes for part in self.parts),
            "in flight (estimate)": max(part.in_flight_bytes for part in self.parts),
        }


def activations(module: nn.Module | Iterable[nn.Module], num_positions: float, num_bytes: int, row: int = 0) -> int:
    """Estimated bytes that the backward pass through `module` keeps, gradients flowing through all of it.

        positions * sum over linear layers and convolutions of (c * inputs if it trains + c * outputs)
                  + sum over norms of 4 * width, and 4 * width more if it is an RMS norm that trains
                  + sum over attentions of (4 or, with mixed precision, 6) * heads * row

    A layer that trains keeps its input, and what follows it (attention, activation function, product) keeps its output;
    see `SHARED_INPUT` and `ADDED` for those that do not, and a gate is kept before and after its activation function.
    A norm keeps its input in float32, an RMS norm also the normalised one. `row` is for attention that makes the score
    matrix ("eager"): it keeps the probabilities (in float32, and in half precision where that multiplies), and keys and
    values once per query head; other attention recomputes. Within a tenth of what autograd keeps of a transformer.

    Args:
        module: one module, or several.
        num_positions: rows of a linear layer's input: B * L.
        num_bytes: c, 2 with mixed precision and 4 without.
        row: L, with eager attention, else 0.
    """
    total = 0
    for part in [module] if isinstance(module, nn.Module) else module:
        layer: Any
        for path, layer in part.named_modules():
            name = path.removesuffix(".base_layer").rpartition(".")[2]  # peft puts a layer inside its adapter
            kind = type(layer).__name__
            if isinstance(layer, nn.Linear):
                num_inputs = layer.in_features * (layer.weight.requires_grad and name not in SHARED_INPUT)
                num_outputs = layer.out_features * (0 if name in ADDED else 2 if name == "gate_proj" else 1)
                total += num_bytes * (num_inputs + num_outputs)
            elif isinstance(layer, nn.Conv1d):
                total += num_bytes * (layer.weight.requires_grad * layer.in_channels + layer.out_channels)
            elif kind.endswith("Norm") and getattr(layer, "weight", None) is not None:
                both = layer.weight.requires_grad and not isinstance(layer, nn.LayerNorm)
                total += (8 if both else 4) * layer.weight.numel()
            elif kind.endswith("Attention") and row:
                total += _score_bytes(layer, num_bytes) * row + num_bytes * _num_repeated(layer)
    return math.ceil(total * num_positions)


def _score_bytes(attention: Any, num_bytes: int) -> int:
    """Of one position's attention to one position, over all heads."""
    return (4 if num_bytes == 4 else 6) * attention.config.num_attention_heads


def _num_repeated(attention: Any) -> int:
    """By how much keys and values grow when each query head gets its own."""
    heads = attention.config.num_attention_heads
    num_added = heads - (getattr(attention.config, "num_key_value_heads", None) or heads)
    return 2 * num_added * attention.head_dim if num_added else 0


def in_flight(module: nn.Module, num_positions: float, num_bytes: int, row: int = 0) -> int:
    """Estimated bytes that come and go in the backward pass through `module`: twice its largest gradient.

    Args:
        num_positions, num_bytes, row: as for `activations`.
    """
    sizes = [0]
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            sizes.append(num_bytes * layer.out_features)
        elif type(layer).__name__.endswith("Attention") and row:
            sizes.append(_score_bytes(layer, num_bytes) * row)
    return math.ceil(2 * max(sizes) * num_positions)


def plan(run: RunOptions, options: Any, sizes: Sizes | None = None) -> Plan:
    """Parameters and memory of the stage with these options.

    Raises:
        ValueError: the options do not fit together, or a checkpoint's size is nowhere to be found.
    """
    sizes = sizes or Sizes()
    module = outline(options, sizes)
    num_bytes = 4 if run.mixed_precision == "no" else 2
    if isinstance(module, FlowOmniModel):
        parts, flowing, longest = _speech(module, options, num_bytes)
    elif isinstance(options, TextOptions):
        parts, flowing, longest = _text(module, options, num_bytes)
    elif isinstance(module, HearingTraining):
        parts, flowing, longest = _hearing(module, options, num_bytes)
    else:
        assert isinstance(module, VocoderTraining | TokenizerTraining)
        parts, flowing, longest = _tokenizer(module, num_bytes)
    result = Plan(module, parts, longest, 0 if num_bytes == 4 else 2 * flowing, sources=sizes.sources)
    if getattr(options, "distill_guidance", None) is not None:  # the teacher is the model as it was
        result = replace(result, teacher_bytes=4 * result.num_parameters)
    assert result.num_parameters == sum(p.numel() for p in module.parameters()), (
        "a parameter belongs to no part, or to two"
    )
    return result


def _part(name: str, modules: Iterable[nn.Module | None], activation_bytes: int = 0, in_flight_bytes: int = 0) -> Part:
    parameters = {id(p): p for module in modules if module is not None for p in module.parameters()}.values()
    num_trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Part(name, sum(p.numel() for p in parameters), num_trainable, activation_bytes, in_flight_bytes)


def _speech(model: FlowOmniModel, options: SpeechOptions, num_bytes: int) -> tuple[list[Part], int, str]:
    """Parts of a FlowOmni model. The longest row is `max_example_sec` of audio: all heard, or all spoken."""
    config, spec = model.config, model.speech_tokenizer.spec
    wanted = [TASKS[name] for name, share in options.tasks.items() if share]
    ears = [model.encoder, model.projector] if config.encoder is not None else []
    heard_sec = 0.0
    if ears and any(user == "audio" for user, _, _ in wanted):
        heard_sec = min(options.max_example_sec, config.encoder.max_source_positions / ENCODER_FRAMES_PER_SEC)
    spoken_sec = options.max_example_sec if any(answer == "speech" for _, answer, _ in wanted) else 0.0
    num_frames = heard_sec * ENCODER_FRAMES_PER_SEC
    num_heard, num_spoken = num_frames / config.encoder_stack, spoken_sec * spec.tokens_per_sec
    num_text = options.max_example_sec * TEXT_TOKENS_PER_SEC
    length = math.ceil(TEMPLATE_TOKENS + num_text + max(num_heard, num_spoken))
    budget = options.max_tokens_per_batch
    rows = options.batch_size if budget is None else max(1, budget // length)
    eager = options.attention == "eager"

    def kept(module: nn.Module | None, row: float, bytes_each: int = num_bytes) -> tuple[int, int]:
        if module is None:
            return 0, 0
        size = rows * row, bytes_each, math.ceil(row) if eager else 0
        return activations(module, *size), in_flight(module, *size)

    hears = bool(ears) and _trains(model.encoder)
    upstream = [*ears, model.head, model.state_embedding, model.llm]
    flows = any(_trains(module) for module in upstream)
    body = model.llm.base_model
    table: Any = model.get_input_embeddings()
    vocabulary = table.weight.shape[0]
    ctc, text_ctc = getattr(model, "ctc", None), getattr(model, "text_ctc", None)
    text_scores = rows * math.ceil(num_heard) * (vocabulary + 1) * LOGIT_BYTES
    draws = getattr(model.head.config, "num_draws", 1)
    of_llm, llm_in_flight = kept(body, length) if flows else (0, 0)
    parts = [
        _part("encoder", ears[:1], *(kept(ears[0], num_frames) if hears else (0, 0))),
        _part("projector", ears[1:], *(kept(ears[1], num_heard) if ears else (0, 0))),
        _part("ctc", [ctc], rows * math.ceil(num_frames) * ctc.num_classes * LOGIT_BYTES if ctc is not None else 0),
        _part("text ctc", [text_ctc], text_scores if text_ctc is not None else 0),
        _part("llm", [model.llm], of_llm + int(rows * num_text * vocabulary * LOGIT_BYTES), llm_in_flight),
        _part("output blocks", [model.output_blocks], *(kept(model.output_blocks, length) if spoken_sec else (0, 0))),
        _part("state embedding", [model.state_embedding]),
        _part("state head", [model.state_head], *kept(model.state_head, num_spoken)),
        _part("head", [model.head], *kept(model.head, num_spoken * draws, 4)),  # in float32 always
        *_tokenizer_parts(model.speech_tokenizer),
    ]
    flowing = [p.num_parameters for p in parts[:-2] if not (p.name == "encoder" and not hears)]
    longest = f"{rows} conversations of {options.max_example_sec:g} s, {length} positions each"
    return parts, sum(flowing), longest


def _text(module: nn.Module, options: TextOptions, num_bytes: int) -> tuple[list[Part], int, str]:
    llm: Any = module.llm
    num_positions = options.batch_size * TALK_TOKENS
    size = num_positions, num_bytes, TALK_TOKENS if options.attention == "eager" else 0
    logits = num_positions * llm.get_input_embeddings().weight.shape[0] * LOGIT_BYTES
    part = _part("llm", [llm], activations(llm.base_model, *size) + logits, in_flight(llm.base_model, *size))
    return [part], part.num_parameters, f"{options.batch_size} conversations of {TALK_TOKENS} positions"


def _hearing(module: HearingTraining, options: HearingOptions, num_bytes: int) -> tuple[list[Part], int, str]:
    """Encoder and classifier. The longest clip fills the encoder's window, and what is longer is cut to it."""
    num_frames = module.encoder.config.max_source_positions
    num_positions = options.batch_size * num_frames
    size = num_positions, num_bytes, num_frames if options.attention == "eager" else 0
    parts = [
        _part("encoder", [module.encoder], activations(module.encoder, *size), in_flight(module.encoder, *size)),
        _part("ctc", [module.ctc], num_positions * module.ctc.num_classes * LOGIT_BYTES),
    ]
    longest = f"{options.batch_size} clips of {module.encoder.max_heard_sec:g} s, {num_frames} encoder frames each"
    return parts, sum(part.num_parameters for part in parts), longest


def _tokenizer(module: VocoderTraining | TokenizerTraining, num_bytes: int) -> tuple[list[Part], int, str]:
    """Crops through the vocoder and the spectral losses, or through encoder and decoder."""
    tokenizer, options = module.tokenizer, module.options
    autoencoder, vocoder = _tokenizer_parts(tokenizer)
    if isinstance(module, VocoderTraining):
        num_frames = module.options.batch_size * module.options.crop_frames
        num_samples = num_frames * tokenizer.front.config.hop_length
        kept = activations(tokenizer.vocoder, num_frames, num_bytes)
        kept += num_samples * STFT_BYTES_PER_SAMPLE * len(STFT_SIZES)
        parts = [autoencoder, Part("speech tokenizer: vocoder", *_counts(vocoder), kept)]
        return parts, vocoder.num_parameters, f"{options.batch_size} crops of {module.options.crop_frames} mel frames"
    num_tokens, per_token = module.options.batch_size * module.options.crop_tokens, tokenizer.frames_per_token
    assert tokenizer.encoder is not None and tokenizer.decoder is not None
    kept = activations([tokenizer.encoder, tokenizer.decoder], num_tokens, num_bytes)
    kept += activations(tokenizer.decoder.frame_blocks, num_tokens * (per_token - 1), num_bytes)
    parts = [Part("speech tokenizer: autoencoder", *_counts(autoencoder), kept), vocoder]
    flowing = autoencoder.num_parameters
    if module.options.wave:
        num_frames = num_tokens * per_token
        kept = activations(tokenizer.vocoder, num_frames, num_bytes)
        kept += num_frames * tokenizer.front.config.hop_length * STFT_BYTES_PER_SAMPLE * len(STFT_SIZES)
        parts[1] = Part(vocoder.name, *_counts(vocoder), kept)
        flowing += vocoder.num_parameters
    if module.adversary is not None:  # its activations are not counted: they depend on sizes that vocos fixes
        parts.append(_part("discriminators", [module.adversary]))
        flowing += parts[-1].num_parameters
    if module.distillation is not None:
        kept = activations(module.distillation, num_tokens, num_bytes)
        parts.append(_part("projections to teachers", [module.distillation], kept))
        flowing += parts[-1].num_parameters
    return (
        parts,
        flowing,
        f"{options.batch_size} crops of {module.options.crop_tokens} speech tokens",
    )


def _tokenizer_parts(tokenizer: nn.Module) -> list[Part]:
    """What makes the tokens, and what makes them sound."""
    children = dict(tokenizer.named_children())
    vocoder = children.pop("vocoder", None)
    return [
        _part("speech tokenizer: autoencoder", children.values()),
        _part("speech tokenizer: vocoder", [vocoder]),
    ]


def _counts(part: Part) -> tuple[int, int]:
    return part.num_parameters, part.num_trainable


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def print_plan(run: RunOptions, options: Any, sizes: Sizes | None = None) -> None:
    """Print `plan` as tables.

    Raises:
        ValueError: as `plan`.
    """
    found = plan(run, options, sizes)
    print(f"stage {run.stage}, {run.output_dir}: {run.max_steps:,} steps\n")
    width = max(30, *(len(part.name) for part in found.parts))
    print(f"{'parameters':{width}} {'all':>15} {'trained':>15}")
    for part in [*found.parts, Part("total", found.num_parameters, found.num_trainable)]:
        print(f"{part.name:{width}} {part.num_parameters:>15,} {part.num_trainable:>15,}")
    print(f"\n{'memory per GPU':{width}} {'GiB':>15}")
    for name, size in [*found.memory.items(), ("total", sum(found.memory.values()))]:
        print(f"{name:{width}} {size / GIB:>15.2f}")
    print(f"{'with several GPUs, besides':{width}} {4 * found.num_trainable / GIB:>15.2f}")
    print(f"\nlongest micro-batch: {found.longest}; precision {run.mixed_precision}")
    budget = getattr(options, "max_tokens_per_batch", None)
    size, unit = (options.batch_size, "") if budget is None else (budget, " positions at most")
    total = f"{run.accumulation * size:,}{unit} on each GPU"
    print(f"one optimizer step: {run.accumulation} micro-batches of {size:,} = {total}")
    for name, source in found.sources.items():
        print(f"sizes of {name}: {source}")
