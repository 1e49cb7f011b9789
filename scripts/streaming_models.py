"""Models with random weights to be measured while they speak: ours, and pocket-tts's own at the same sizes.

Shapes: B rows, L positions, S samples, H hidden width, X one speech token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from flowomni import FlowOmni
from flowomni.configuration import FlowOmniConfig
from flowomni.fast import accelerate
from flowomni.generation import GenerationOptions, generate
from flowomni.int8 import quantise
from flowomni.modeling import FlowOmniModel
from flowomni.processing import FlowOmniProcessor
from flowomni.streams import SpeechState, Streams
from flowomni.tokenizers import MelTokenizerConfig
from training.text_tokenizer import build_text_tokenizer

TEXT = "Hello world, this is a voice that speaks while it thinks and it does not stop before the end of the line."
WORDS = TEXT.lower().replace(",", "").replace(".", "").split()
NEVER = 1 - 1e-6  # stop threshold
NUM_IDS = 4000  # of pocket-tts's text tokenizer


@dataclass(frozen=True)
class Shape:
    """A backbone and a flow head that both sides can have.

    Attributes:
        llm: of our backbone: a gated feed-forward part of as many weights as pocket-tts's plain one.
        head: of our flow head.
        pocket: the name of pocket-tts's configuration.
    """

    llm: dict[str, Any]
    head: dict[str, Any]
    pocket: str = ""


def _llama(width: int, layers: int, heads: int, kv: int, inner: int, head_dim: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _head(width: int, num_blocks: int) -> dict[str, Any]:
    return {"kind": "flow", "width": width, "num_blocks": num_blocks, "objective": "lsd"}


SHAPES = {
    "100m": Shape(_llama(1024, 6, 16, 16, 2736, 64, NUM_IDS), _head(512, 6), "english_2026-10"),
    "7m": Shape(_llama(224, 8, 8, 2, 152, 64, NUM_IDS), _head(192, 4), "english_7m_2026-10"),
    "0.6b": Shape(_llama(1024, 28, 16, 8, 3072, 128, 151_936) | {"model_type": "qwen3"}, _head(512, 6)),
    "toy": Shape(_llama(32, 2, 2, 2, 48, 16, 256), _head(32, 1)),
}


def our_model(
    shape: Shape, int8: bool, compile: bool = True, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> FlowOmni:
    """FlowOmni without ears and output blocks: speech in one jump of the head, one step after the text."""
    torch.manual_seed(0)
    text_tokenizer = build_text_tokenizer(WORDS)
    config = FlowOmniConfig(
        llm=AutoConfig.for_model(**shape.llm),
        speech_tokenizer=MelTokenizerConfig().to_dict(),
        head=shape.head,
        output_blocks={"num_layers": 0, "num_heads": 1},
        layout={"speech_delay_tokens": 1, "instructions": dict.fromkeys(("answer", "transcribe", "speak"), "")},
        text_eos_id=text_tokenizer.eos_token_id,
    )
    model = FlowOmniModel(config).eval()
    model.llm.to(dtype)
    model.to(device)
    if int8:
        quantise(model)
    if compile:
        accelerate(model)
    return FlowOmni(model, FlowOmniProcessor(config, text_tokenizer, model.speech_tokenizer.spec))


def our_speech(omni: FlowOmni, num_sec: float) -> Iterator[Tensor]:
    """That many seconds of sound from `TEXT`, as it comes."""
    spec = omni.model.speech_tokenizer.spec
    options = GenerationOptions(stop_threshold=NEVER, max_steps=round(num_sec * spec.tokens_per_sec) + 1)
    prompt = omni.processor.prompt([omni.processor.turn("user", text=TEXT)], "speak")
    for step in generate(omni.model, omni.processor, [prompt], options, [torch.Generator().manual_seed(0)]):
        if len(step.wavs[0]):
            yield step.wavs[0]


def pocket_model(name: str, int8: bool, folder: Path) -> Any:
    """pocket-tts's own model of one of its configurations, with random weights and our text tokenizer."""
    from pocket_tts.models.tts_model import TTSModel
    from pocket_tts.quantization import RECOMMENDED_CONFIG, apply_dynamic_int8
    from pocket_tts.utils.config import CONFIGS_DIR, load_config

    torch.manual_seed(0)
    fillers = [f"word{number}" for number in range(NUM_IDS)]
    known = len(build_text_tokenizer(WORDS))
    tokenizer = build_text_tokenizer([*WORDS, *fillers[: NUM_IDS - known]])
    path = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path))
    config = load_config(CONFIGS_DIR / f"{name}.yaml")
    config.weights_path = config.weights_path_without_voice_cloning = None
    config.flow_lm.lookup_table.tokenizer = "tokenizers"
    config.flow_lm.lookup_table.tokenizer_path = str(path)
    config.flow_lm.lookup_table.n_bins = len(tokenizer)
    model = TTSModel._from_pydantic_config_with_weights(config, 0.3, 1, None, float("inf")).eval()
    if int8:
        apply_dynamic_int8(model.flow_lm, RECOMMENDED_CONFIG)
    return model


def pocket_speech(model: Any, num_sec: float) -> Iterator[Tensor]:
    """That many seconds of sound from `TEXT`, as it comes, by its own streaming with its own two threads."""
    import threading

    from pocket_tts.modules.stateful_module import init_states

    stop, num_left = threading.Event(), num_sec * model.sample_rate
    state = init_states(model.flow_lm, batch_size=1, sequence_length=1)
    for chunk in model.generate_audio_stream(state, TEXT, copy_state=False, stop=stop):
        yield chunk
        num_left -= len(chunk)
        if num_left <= 0:
            stop.set()


def spoken(chunks: Iterator[Tensor], rate_hz: int) -> tuple[float, float, list[float]]:
    """(times real time, seconds to the first chunk, gaps between chunks in seconds)."""
    began = time.perf_counter()
    times, num_samples = [], 0
    for chunk in chunks:
        times.append(time.perf_counter())
        num_samples += len(chunk)
    speed = num_samples / rate_hz / (time.perf_counter() - began)
    return speed, times[0] - began, [b - a for a, b in zip(times, times[1:], strict=False)]


def num_bytes(*modules: torch.nn.Module) -> int:
    """Of all weights, a shared one counted once; tables that are only looked up are not read."""
    tensors = {t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers())}
    tables = {e.weight.data_ptr() for m in modules for e in m.modules() if isinstance(e, torch.nn.Embedding)}
    return sum(t.numel() * t.element_size() for pointer, t in tensors.items() if pointer not in tables)


def step_parts(omni: FlowOmni, num_positions: int = 64, num_rows: int = 1) -> dict[str, tuple[Callable[[], Any], int]]:
    """The parts of one step after `num_positions`: what runs them, and the bytes of the weights that they read."""
    model = omni.model
    one_BL = torch.ones(num_rows, num_positions, dtype=torch.bool, device=model.device)
    x_BLH = torch.randn(num_rows, num_positions, model.config.hidden_size) * 0.02
    state = model.advance(x_BLH.to(model.device, model.dtype), one_BL, model.init_state(num_rows))[2]
    empty_X = model.speech_tokenizer.spec.empty_token()
    token_BLX = torch.zeros(num_rows, 1, *empty_X.shape, dtype=empty_X.dtype, device=model.device)
    step = Streams(
        text_BL=torch.ones_like(one_BL[:, :1], dtype=torch.int64),
        state_BL=torch.full_like(one_BL[:, :1], int(SpeechState.GENERATING), dtype=torch.int64),
        speech_BLX=token_BLX,
        heard_BL=~one_BL[:, :1],
        mask_BL=one_BL[:, :1],
        text_loss_BL=~one_BL[:, :1],
        state_loss_BL=~one_BL[:, :1],
    )
    hidden_BH, _, after = model.read(step, state)
    remembered = {"model": after, "voice": model.speech_tokenizer.init_state(num_rows)}
    sampling, generator = model.head.default_sampling(), torch.Generator().manual_seed(0)

    def read() -> None:
        *_, remembered["model"] = model.read(step, remembered["model"])

    def sound() -> None:
        _, remembered["voice"] = model.speech_tokenizer.step(token_BLX, remembered["voice"])

    output = model.llm.get_output_embeddings()
    voice = model.speech_tokenizer
    blocks = [] if model.output_blocks is None else [model.output_blocks]
    vocoder = [getattr(voice, name) for name in ("decoder", "vocoder") if getattr(voice, name, None) is not None]
    return {
        "language model": (read, num_bytes(model.llm.base_model, *blocks)),
        "text logits": (lambda: model.text_logits(hidden_BH), sum(t.nbytes for t in output.state_dict().values())),
        "head": (lambda: model.head.sample(hidden_BH, sampling, generator), num_bytes(model.head)),
        "decoder, vocoder": (sound, num_bytes(*vocoder)),
    }
