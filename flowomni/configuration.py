"""FlowOmniConfig: everything that defines a FlowOmni model, as a transformers config with strict sections."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig

from .strict import check_keys, strict


@dataclass(frozen=True)
class LayoutConfig:
    """How a conversation becomes streams.

    Attributes:
        kind: "turn": the prompt, then text and speech of the answer in parallel.
        speech_delay_tokens: steps by which speech starts after text (>= 1: the last of them is the start state).
        instructions: system text per task ("answer", "transcribe", "speak"); an empty string means none.
        max_answer_tokens: hard limit of answer steps at generation.
    """

    kind: str = "turn"
    speech_delay_tokens: int = 2
    instructions: dict[str, str] = field(
        default_factory=lambda: {
            "answer": "",
            "transcribe": "Write down what you hear.",
            "speak": "Read the text aloud.",
        }
    )
    max_answer_tokens: int = 512

    def __post_init__(self) -> None:
        if self.kind != "turn":
            raise ValueError(f"kind is {self.kind!r}; the only layout is 'turn'")
        if self.speech_delay_tokens < 1:
            raise ValueError(f"speech_delay_tokens is {self.speech_delay_tokens}; it must be at least 1")
        if self.max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens is {self.max_answer_tokens}; it must be at least 1")
        missing = {"answer", "transcribe", "speak"} - set(self.instructions)
        if missing:
            raise ValueError(f"instructions misses {', '.join(sorted(missing))}")


@dataclass(frozen=True)
class OutputBlocksConfig:
    """The transformer blocks between the LLM's hidden states and the speech outputs (the paper's Figure 2).

    Attributes:
        num_layers: 0 means that the heads read the LLM's hidden states directly.
        num_heads: attention heads; must divide the LLM's hidden size.
        intermediate_size: feed-forward width; None means three times the hidden size.
        num_letters: how many of its UTF-8 bytes each text token also brings the blocks, so that words which are one
            token each share what is known of pronunciation. 0: none.
    """

    num_layers: int = 6
    num_heads: int = 8
    intermediate_size: int | None = None
    num_letters: int = 0

    def __post_init__(self) -> None:
        if self.num_letters < 0 or (self.num_letters and not self.num_layers):
            raise ValueError(
                f"num_letters is {self.num_letters} with num_layers {self.num_layers}; letters are read by the blocks, "
                "and are not negative"
            )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the training objective, applied to per-target means.

    Attributes:
        text_weight, state_weight, speech_weight: weight of each part.
        ctc_weight, text_ctc_weight: of what the ears are taught beside it: letters on the encoder's frames, and the
            language model's text tokens on the heard positions. 0 leaves a part out.
        stop_weight: class weight of the stop state, which is one step per answer.
    """

    text_weight: float = 1.0
    state_weight: float = 1.0
    speech_weight: float = 1.0
    ctc_weight: float = 0.0
    text_ctc_weight: float = 0.0
    stop_weight: float = 1.0


class FlowOmniConfig(PreTrainedConfig):
    """Configuration of `FlowOmniModel`.

    Args:
        llm: a transformers config of any causal LM, or its dict with "model_type".
        encoder: a WhisperConfig or its dict. None: the model does not hear.
        speech_tokenizer: config dict of the speech tokenizer, with its "model_type".
        head: {"kind": "flow", ...}, see `flowomni.heads`.
        output_blocks, layout, loss: dicts of the dataclasses above.
        encoder_stack: encoder frames (20 ms each) joined into one heard position.
        text_eos_id: text id that ends an answer; None takes the text tokenizer's eos at load.

    Raises:
        ValueError: naming the field, on an unknown key or on sections that do not fit together.
    """

    model_type = "flowomni"

    def __init__(
        self,
        llm: Any = None,
        encoder: Any = None,
        speech_tokenizer: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        output_blocks: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        encoder_stack: int = 4,
        text_eos_id: int | None = None,
        **kwargs: Any,
    ):
        self.llm = _as_config(llm, "llm")
        self.encoder = WhisperConfig(**_without_type(encoder)) if isinstance(encoder, dict) else encoder
        self.speech_tokenizer = _as_config(speech_tokenizer, "speech_tokenizer")
        self.head = dict(head or {"kind": "flow"})
        self.output_blocks = dataclasses.asdict(strict(OutputBlocksConfig, output_blocks, "output_blocks"))
        self.layout = dataclasses.asdict(strict(LayoutConfig, layout, "layout"))
        self.loss = dataclasses.asdict(strict(LossConfig, loss, "loss"))
        self.encoder_stack = encoder_stack
        self.text_eos_id = text_eos_id
        check_keys(FlowOmniConfig, kwargs)
        super().__init__(**kwargs)
        if self.llm is not None:
            self._cross_check()

    def _cross_check(self) -> None:
        from .heads import HEADS, head_config  # late: heads need no config, config checks heads

        width, heads = self.hidden_size, self.output_blocks["num_heads"]
        if self.output_blocks["num_layers"] > 0 and width % (2 * heads):
            raise ValueError(
                f"output_blocks.num_heads is {heads} but llm.hidden_size is {width}: "
                "the hidden size must be a multiple of twice the number of heads"
            )
        if self.head.get("kind") not in HEADS:
            raise ValueError(f"head.kind is {self.head.get('kind')!r}; known kinds: {', '.join(HEADS)}")
        head_config(self.head)
        if self.speech_tokenizer is not None:
            kind = self.head["kind"]
            HEADS[kind].check_spec(kind, HEADS[kind].token_kind, self.speech_tokenizer.token_spec)
        if self.encoder_stack < 1:
            raise ValueError(f"encoder_stack is {self.encoder_stack}; it must be at least 1")

    @property
    def hidden_size(self) -> int:
        """Width of the LLM's hidden states."""
        return self.llm.get_text_config().hidden_size

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in ("llm", "encoder", "speech_tokenizer"):
            part = getattr(self, name)
            output[name] = part.to_dict() if isinstance(part, PreTrainedConfig) else part
        return output


def _as_config(value: Any, where: str) -> Any:
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        raise ValueError(f"{where}: expected a config with a model_type, got {value!r}")
    return AutoConfig.for_model(value["model_type"], **_without_type(value))


def _without_type(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k not in ("model_type", "transformers_version")}
