"""FlowOmniModel: a language model with ears (speech encoder, projector) and a voice (output blocks, heads, tokenizer).

Shapes: B batch, L positions, H hidden width, D latent dimension (X: D latents or K codes), C Whisper mel bins,
F Whisper mel frames, T encoder frames, E encoder width, P heard positions, N flattened target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from .cache import fork, growing_cache
from .configuration import FlowOmniConfig, LossConfig, OutputBlocksConfig
from .encoder import CtcAuxiliary, Projector, SpeechEncoder, TextCtcAuxiliary
from .heads import HeadLoss, build_head
from .heads.state import SpeechStateHead
from .losses import Loss
from .streams import NONE, Streams
from .strict import strict
from .tokenizers.base import SpeechTokenizer

# (streams as they were read, hidden_NH, target_NX, row_N, generator) -> what is taught to the head
HeadLossOf = Callable[[Streams, Tensor, Tensor, Tensor, torch.Generator | None], HeadLoss]


@dataclass(frozen=True)
class ModelState:
    """What the model remembers between steps. A value: `advance` returns a new one and leaves the old one usable.

    Attributes:
        llm_cache, blocks_cache: key-value caches of the LLM and of the output blocks.
        mask_BL: bool, which cached positions are real (rows of different lengths are padded inside).
        num_seen_B: real positions so far, which is the next position id of each row.
    """

    llm_cache: DynamicCache
    blocks_cache: DynamicCache
    mask_BL: Tensor
    num_seen_B: Tensor


class Letters(nn.Module):
    """How text tokens are spelled: the first K bytes of each, through a convolution, to the hidden width.

    Gives nothing until it is trained. The table of bytes is filled by `spell` and saved with the weights.
    """

    bytes_VK: Tensor

    def __init__(self, vocab_size: int, num_letters: int, hidden_size: int):
        super().__init__()
        width = hidden_size // 4
        self.register_buffer("bytes_VK", torch.zeros(vocab_size, num_letters, dtype=torch.uint8))  # 0: no letter
        self.embedding = nn.Embedding(256, width, padding_idx=0)
        self.neighbours = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.out = nn.Linear(num_letters * width, hidden_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def spell(self, text_tokenizer: Any) -> None:
        """Take the bytes of every token of the text tokenizer; special tokens have none."""
        first = text_tokenizer.encode("a", add_special_tokens=False)
        start = len(text_tokenizer.decode(first))
        special = set(text_tokenizer.all_special_ids)
        ids = [i for i in sorted(text_tokenizer.get_vocab().values()) if i < len(self.bytes_VK) and i not in special]
        # after another token, so that the text shows whether a token begins a word
        for i, text in zip(ids, text_tokenizer.batch_decode([[*first, i] for i in ids]), strict=True):
            letters = list(text[start:].encode())[: self.bytes_VK.shape[1]]
            self.bytes_VK[i, : len(letters)] = torch.tensor(letters, dtype=torch.uint8)

    def forward(self, text_BL: Tensor) -> Tensor:
        """Text ids [B, L], `NONE` where there is none -> [B, L, H], 0 there."""
        letters_BLK = self.bytes_VK[text_BL.clamp(min=0)].long() * (text_BL != NONE).unsqueeze(-1)
        embedded_NCK = self.embedding(letters_BLK).flatten(0, 1).transpose(1, 2)
        embedded_NCK = F.gelu(self.neighbours(embedded_NCK))
        spelled_BLH = self.out(embedded_NCK.flatten(1)).unflatten(0, text_BL.shape)
        return spelled_BLH * (text_BL != NONE).unsqueeze(-1)


class OutputBlocks(nn.Module):
    """A few causal transformer blocks from LLM hidden states to the states that condition the speech outputs."""

    def __init__(self, config: OutputBlocksConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.blocks = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=hidden_size,
                intermediate_size=config.intermediate_size or 3 * hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        # reads hidden states only; an unused table would distort parameter counts
        self.blocks.embed_tokens = None  # type: ignore[assignment]
        self.num_layers = config.num_layers
        self.letters = Letters(vocab_size, config.num_letters, hidden_size) if config.num_letters else None

    def forward(
        self,
        hidden_BLH: Tensor,
        text_BL: Tensor,
        mask_BL: Tensor | None,
        position_BL: Tensor,
        cache: DynamicCache | None,
    ) -> Tensor:
        """Hidden states [B, L, H] and the text that is read there [B, L] -> [B, L, H]."""
        if self.letters is not None:
            hidden_BLH = hidden_BLH + self.letters(text_BL).to(hidden_BLH.dtype)
        return self.blocks(
            inputs_embeds=hidden_BLH,
            attention_mask=mask_BL,
            position_ids=position_BL,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class FlowOmniModel(PreTrainedModel):
    """heard + text + own speech -> sum -> LLM -> text, and -> output blocks -> speech state and speech token.

    `forward(streams)` gives the losses, `embed` and `advance` are one (chunk of) step of generation.
    """

    config_class = FlowOmniConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []
    # Set in training for engines (DeepSpeed, FSDP) that need every process to call the same layers in every batch: then
    # no layer is left out because the batch has nothing for it.
    uniform = False
    fast: Any = None  # `fast.CompiledSteps`, where steps are compiled

    def __init__(self, config: FlowOmniConfig):
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.llm)
        self.speech_tokenizer: SpeechTokenizer = AutoModel.from_config(config.speech_tokenizer)
        self.speech_tokenizer.requires_grad_(False)
        hidden = config.hidden_size
        self.loss_config = strict(LossConfig, config.loss, "loss")
        if config.encoder is not None:
            self.encoder = SpeechEncoder(config.encoder)
            self.projector = Projector(config.encoder.d_model, hidden, config.encoder_stack)
            if self.loss_config.ctc_weight > 0:
                self.ctc = CtcAuxiliary(config.encoder.d_model)
            if self.loss_config.text_ctc_weight > 0:
                self.text_ctc = TextCtcAuxiliary(hidden)
        blocks = strict(OutputBlocksConfig, config.output_blocks, "output_blocks")
        vocab_size = config.llm.get_text_config().vocab_size
        self.output_blocks = OutputBlocks(blocks, hidden, vocab_size) if blocks.num_layers > 0 else None
        self.state_embedding = nn.Embedding(4, hidden)
        nn.init.normal_(self.state_embedding.weight, std=0.02)
        self.state_head = SpeechStateHead(hidden, self.loss_config.stop_weight)
        self.head = build_head(config.head, self.speech_tokenizer.spec, hidden)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves where they are built; a tensor missing from a checkpoint is an error instead."""

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def hear(self, features_BCF: Tensor, lengths_B: Tensor) -> Tensor:
        """Whisper log-mel [B, C, F] of clips -> the heard positions of all clips in order [N, H]."""
        hidden_BTE, lengths_B = self._encode(features_BCF, lengths_B)
        return _in_order(*self.projector(hidden_BTE, lengths_B))

    def _encode(self, features_BCF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.encoder is None:
            raise ValueError("this model has no speech encoder (config.encoder is None): it cannot hear audio")
        return self.encoder(features_BCF, lengths_B)

    def embed(self, streams: Streams, heard_NH: Tensor | None = None) -> Tensor:
        """Sum of the embeddings of all streams at each position: [B, L, H].

        Args:
            heard_NH: heard positions of all clips in order, one row per True in `streams.heard_BL`.
        """
        table = self.get_input_embeddings()
        text_BL = streams.text_BL
        x_BLH = table(text_BL.clamp(min=0)) * (text_BL != NONE).unsqueeze(-1)
        state_BL = streams.state_BL
        speaking = self.uniform or bool((state_BL != NONE).any())
        if speaking:
            states_BLH = self.state_embedding(state_BL.clamp(min=0)) * (state_BL != NONE).unsqueeze(-1)
            x_BLH = x_BLH + states_BLH.to(x_BLH.dtype)
        generating_BL = streams.generating_BL
        if speaking and (self.uniform or bool(generating_BL.any())):
            token_NX = streams.speech_BLX[generating_BL]
            x_BLH = x_BLH.index_put(
                generating_BL.nonzero(as_tuple=True), self.head.embed(token_NX).to(x_BLH.dtype), accumulate=True
            )
        if heard_NH is not None:
            x_BLH = x_BLH.index_put(streams.heard_BL.nonzero(as_tuple=True), heard_NH.to(x_BLH.dtype), accumulate=True)
        return x_BLH

    def forward(
        self, streams: Streams, generator: torch.Generator | None = None, head_loss: HeadLossOf | None = None
    ) -> dict[str, Loss]:
        """The loss of each part as sum and count: "text", "state", "speech", "ctc", "text_ctc", and the head's own.

        Args:
            streams: a batch with targets marked by its `*_loss` masks.
            generator: randomness of the head (times, noise, condition dropout) and of the perturbed feedback.
            head_loss: taken instead of the head's own loss, with what that would get and the perturbed streams.
        """
        losses: dict[str, Loss] = {}
        heard_NH = None
        silent = self.uniform and self.config.encoder is not None and streams.features_BCF is None
        if silent:
            streams = self._with_silence(streams)
        if streams.features_BCF is not None:
            assert streams.feature_lengths_B is not None
            hidden_BTE, lengths_B = self._encode(streams.features_BCF, streams.feature_lengths_B)
            if self.loss_config.ctc_weight > 0 and streams.ctc_BT is not None:
                losses["ctc"] = self.ctc(hidden_BTE, lengths_B, streams.ctc_BT)
            heard_BPH, lengths_B = self.projector(hidden_BTE, lengths_B)
            if self.loss_config.text_ctc_weight > 0 and streams.heard_text_BU is not None:
                table_VH = self.get_input_embeddings().weight
                losses["text_ctc"] = self.text_ctc(heard_BPH, lengths_B, table_VH, streams.heard_text_BU)
            heard_NH = _in_order(heard_BPH, lengths_B)[: 0 if silent else None]
        targets_BLX = streams.speech_BLX
        if self.training:
            streams, targets_BLX = self._perturb(streams, generator)
        hidden_BLH = self._read(streams, heard_NH)
        losses |= self._text_loss(hidden_BLH, streams)
        return losses | self._speech_losses(hidden_BLH, streams, targets_BLX, generator, head_loss)

    def conditions(self, streams: Streams) -> Tensor:
        """The hidden states [N, H] that speech tokens are taught or drawn from, one per True in `speech_loss_BL`."""
        heard_NH = None
        if streams.features_BCF is not None:
            assert streams.feature_lengths_B is not None
            heard_NH = self.hear(streams.features_BCF, streams.feature_lengths_B)
        speech_BLH = self._speak(self._read(streams, heard_NH), streams)
        return speech_BLH[:, :-1][streams.speech_loss_BL[:, 1:]]

    def _read(self, streams: Streams, heard_NH: Tensor | None) -> Tensor:
        """The LLM's hidden states [B, L, H]."""
        mask_BL, position_BL = _places(streams)
        return self.llm.base_model(
            inputs_embeds=self.embed(streams, heard_NH),
            attention_mask=mask_BL,
            position_ids=position_BL,
            use_cache=False,
        ).last_hidden_state

    def _speak(self, hidden_BLH: Tensor, streams: Streams) -> Tensor:
        """[B, L, H] -> what conditions the speech outputs [B, L, H]."""
        if self.output_blocks is None:
            return hidden_BLH
        return self.output_blocks(hidden_BLH, streams.text_BL, *_places(streams), None)

    def _with_silence(self, streams: Streams) -> Streams:
        """A short clip that nothing hears; it says nothing."""
        device, num_frames = streams.text_BL.device, 4 * self.config.encoder_stack
        fields = {**streams.__dict__}
        fields["features_BCF"] = torch.zeros(1, self.config.encoder.num_mel_bins, num_frames, device=device)
        fields["feature_lengths_B"] = torch.tensor([num_frames], device=device)
        fields["ctc_BT"] = fields["heard_text_BU"] = torch.full((1, 1), NONE, device=device)
        return Streams(**fields)

    def _perturb(self, streams: Streams, generator: torch.Generator | None) -> tuple[Streams, Tensor]:
        """Training noise on the speech tokens: what is fed back, and what is the target (the head knows its kind)."""
        fields = {**streams.__dict__}
        fields["speech_BLX"], targets_BLX = self.head.perturb(streams.speech_BLX, generator)
        return Streams(**fields), targets_BLX

    def _text_loss(self, hidden_BLH: Tensor, streams: Streams) -> dict[str, Loss]:
        target_BL = streams.text_loss_BL[:, 1:]
        if not bool(target_BL.any()):
            return {}
        logits_NV = self.text_logits(hidden_BLH[:, :-1][target_BL]).float()
        loss = F.cross_entropy(logits_NV, streams.text_BL[:, 1:][target_BL], reduction="sum")
        return {"text": Loss(loss, target_BL.sum())}

    def _speech_losses(
        self,
        hidden_BLH: Tensor,
        streams: Streams,
        targets_BLX: Tensor,
        generator: torch.Generator | None,
        head_loss: HeadLossOf | None,
    ) -> dict[str, Loss]:
        state_BL = streams.state_target_BL[:, 1:]
        if not self.uniform and not bool(state_BL.any()):
            return {}
        speech_BLH = self._speak(hidden_BLH, streams)
        losses = {"state": self.state_head.loss(speech_BLH[:, :-1][state_BL], streams.state_BL[:, 1:][state_BL])}
        token_BL = streams.speech_loss_BL[:, 1:]
        row_N = token_BL.nonzero()[:, 0]
        taught = speech_BLH[:, :-1][token_BL], targets_BLX[:, 1:][token_BL], row_N, generator
        head = self.head.loss(*taught) if head_loss is None else head_loss(streams, *taught)
        losses["speech"] = Loss(head.sum, head.count)
        return losses | {f"speech/{name}": Loss(*part) for name, part in head.parts.items()}

    def text_logits(self, hidden_NH: Tensor) -> Tensor:
        """LLM hidden states [.., H] -> text logits [.., V], as the LLM itself makes them."""
        config = self.config.llm.get_text_config()
        logits = self.llm.get_output_embeddings()(hidden_NH)
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def init_state(self, batch_size: int) -> ModelState:
        """Empty caches for `batch_size` rows."""
        return ModelState(
            llm_cache=growing_cache(),
            blocks_cache=growing_cache(),
            mask_BL=torch.zeros(batch_size, 0, dtype=torch.bool, device=self.device),
            num_seen_B=torch.zeros(batch_size, dtype=torch.int64, device=self.device),
        )

    def embed_steps(self, text_BL: Tensor, state_BL: Tensor, speech_BLX: Tensor, generating_BL: Tensor) -> Tensor:
        """`embed` of positions that hear nothing, without a decision that depends on the data: what can be compiled."""
        table = self.get_input_embeddings()
        x_BLH = table(text_BL.clamp(min=0)) * (text_BL != NONE).unsqueeze(-1)
        states_BLH = self.state_embedding(state_BL.clamp(min=0)) * (state_BL != NONE).unsqueeze(-1)
        generating_BL1 = generating_BL.unsqueeze(-1)
        speech_BLH = self.head.embed(torch.where(generating_BL1, speech_BLX, torch.zeros_like(speech_BLX)))
        return x_BLH + states_BLH.to(x_BLH.dtype) + (speech_BLH * generating_BL1).to(x_BLH.dtype)

    def read(
        self, streams: Streams, state: ModelState, heard_NH: Tensor | None = None
    ) -> tuple[Tensor, Tensor, ModelState]:
        """Read more positions: `advance` by what `embed` gives, or by a compiled step where that is possible."""
        if self.fast is not None and heard_NH is None and self.fast.takes(streams, state):
            return self.fast.read(streams, state)
        return self.advance(self.embed(streams, heard_NH), streams.mask_BL, state, streams.text_BL)

    def advance(
        self, embeds_BLH: Tensor, mask_BL: Tensor, state: ModelState, text_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor, ModelState]:
        """Read L more positions per row.

        A row is what it would be alone, whatever the padding inside the cache. The exception is an LLM with a sliding
        attention window, where padding takes up places of the window: it matters once a row is longer than the window.

        Args:
            embeds_BLH: their embeddings.
            mask_BL: bool, False at padding (a row may end earlier than others).
            state: from `init_state` or the previous call; not changed.
            text_BL: the text that is read there, for output blocks that read letters; None: no text.

        Returns:
            text hidden states [B, H] and speech hidden states [B, H] of each row's last real position; the new state.
        """
        position_BL = (state.num_seen_B.unsqueeze(1) + mask_BL.cumsum(1) - 1).clamp(min=0)
        all_BL = torch.cat([state.mask_BL, mask_BL], dim=1)
        attention = None if bool(all_BL.all()) else all_BL
        llm_cache, blocks_cache = fork(state.llm_cache), fork(state.blocks_cache)
        hidden_BLH = self.llm.base_model(
            inputs_embeds=embeds_BLH,
            attention_mask=attention,
            position_ids=position_BL,
            past_key_values=llm_cache,
            use_cache=True,
        ).last_hidden_state
        speech_BLH = hidden_BLH
        if self.output_blocks is not None:
            text_BL = torch.full_like(position_BL, NONE) if text_BL is None else text_BL
            speech_BLH = self.output_blocks(hidden_BLH, text_BL, attention, position_BL, blocks_cache)
        count_B = mask_BL.sum(1)
        last_B = (count_B - 1).clamp(min=0)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        new = ModelState(llm_cache, blocks_cache, all_BL, state.num_seen_B + count_B)
        return hidden_BLH[rows_B, last_B], speech_BLH[rows_B, last_B], new


def _in_order(heard_BPH: Tensor, lengths_B: Tensor) -> Tensor:
    """The heard positions of all clips in order [N, H], without padding."""
    return heard_BPH[torch.arange(heard_BPH.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(1)]


def _places(streams: Streams) -> tuple[Tensor | None, Tensor]:
    """The attention mask [B, L], None where nothing is padding, and the position ids [B, L]."""
    mask_BL = streams.mask_BL
    return None if bool(mask_BL.all()) else mask_BL, (mask_BL.cumsum(1) - 1).clamp(min=0)


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know FlowOmni."""
    from transformers import AutoConfig

    AutoConfig.register(FlowOmniConfig.model_type, FlowOmniConfig, exist_ok=True)
    AutoModel.register(FlowOmniConfig, FlowOmniModel, exist_ok=True)


__all__: list[Any] = ["FlowOmniModel", "ModelState", "OutputBlocks", "register"]
