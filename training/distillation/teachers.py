"""The teachers of distillation: any Hugging Face text model on transcripts, a Whisper-class or wave model on speech.

Both are frozen, in evaluation mode and float32.

Shape legend: S samples, N text tokens or speech frames, W words, L speech tokens, T width of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoTokenizer

from flowomni.audio import resample
from flowomni.build import is_whole_model, load_part_encoder
from flowomni.encoder import (
    HEARD_SAMPLE_RATE_HZ,
    HOP_SAMPLES,
    MEL_FRAMES_PER_ENCODER_FRAME,
    HeardFeatures,
    SpeechEncoder,
)

from .alignment import Unusable

_LOADING_ERRORS = (OSError, ValueError, KeyError, StrictDataclassError)


class TextTeacher:
    """Contextual vectors of a transcript's words.

    Args:
        path: folder or Hub name of a model that `AutoModel` loads, with a fast tokenizer; of an encoder-decoder the
            encoder is used.
        layers: "mean" of all hidden states, the embeddings included, as in DM-Codec, or the "last".

    Raises:
        ValueError: no such model, or no fast tokenizer; names the field distillation.text_teacher.
    """

    def __init__(self, path: str, layers: str = "mean") -> None:
        self._layers = layers
        config = _config(path, "text_teacher")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path, dtype=torch.float32)
        except _LOADING_ERRORS as error:
            raise _no_model(path, "text_teacher", error) from error
        self._model = (model.get_encoder() if config.is_encoder_decoder else model).eval().requires_grad_(False)
        if self._model.main_input_name != "input_ids":
            raise ValueError(
                f"distillation.text_teacher is {path!r} with model_type {config.model_type!r}, which does not read "
                "text: give a language model or a text encoder"
            )
        # Of a folder without tokenizer files transformers makes one that knows special tokens only.
        if not self._tokenizer.is_fast or len(self._tokenizer) <= len(set(self._tokenizer.all_special_ids)):
            raise ValueError(
                f"distillation.text_teacher is {path!r}, which has no tokenizer that tells the characters of each "
                "token: give a model with its tokenizer.json"
            )
        self._max_tokens = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.dim = int(config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Tells one set of weights from another."""
        return _fingerprint(self._model)

    def words(self, text: str, spans: Sequence[tuple[int, int]]) -> Tensor:
        """vectors_WT: of each word `text[first:end]` the mean over the tokens that cover it.

        Raises:
            Unusable: the text is longer than the model can read.
        """
        encoded = self._tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        hidden_NT = self._hidden(encoded)
        vectors = []
        for first, end in spans:
            tokens = [n for n, (start, stop) in enumerate(offsets) if start < end and stop > first]
            if not tokens:
                raise Unusable(f"the text teacher's tokenizer passes over {text[first:end]!r}")
            vectors.append(hidden_NT[tokens].mean(0))
        return torch.stack(vectors)

    def padded(self, text: str, num_steps: int) -> Tensor:
        """vectors_LT: a text token at each step from the start, special tokens included, then padding.

        What stands in the padding is what the model gives for padding tokens, as in DM-Codec's `extract_rep.py`.

        Raises:
            ValueError: the tokenizer has no padding token.
            Unusable: so many steps do not fit the model, or are too few for a token.
        """
        if self._tokenizer.pad_token is None:
            raise ValueError(
                "distillation.placement is 'padded', but distillation.text_teacher's tokenizer has no padding token: "
                "use 'aligned', or another teacher"
            )
        if num_steps <= self._tokenizer.num_special_tokens_to_add():
            raise Unusable(f"{num_steps} speech tokens are too few for a text token")
        encoded = self._tokenizer(
            text,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=num_steps,
            return_tensors="pt",
        )
        return self._hidden(encoded)

    @torch.no_grad()
    def _hidden(self, encoded: Any) -> Tensor:
        num_tokens = encoded["input_ids"].shape[1]
        if num_tokens > self._max_tokens:
            raise Unusable(f"{num_tokens} text tokens, but the text teacher reads {self._max_tokens} at most")
        output = self._model(**encoded, output_hidden_states=True)
        return _join(output.hidden_states, self._layers)


class SpeechTeacher:
    """Vectors of a recording's frames.

    Args:
        path: folder or Hub name of a Whisper checkpoint (as stage `hearing` saves it), a FlowOmni model's folder, whose
            encoder is meant, or a model on 16 kHz waves such as HuBERT, WavLM or wav2vec 2.0, with its
            preprocessor_config.json.
        layers: "mean" of all hidden states, as in DM-Codec, or the "last".

    Attributes:
        frame_sec: span of one frame; 20 ms in all of these.

    Raises:
        ValueError: no such model, or one of another kind; names the field distillation.speech_teacher.
    """

    def __init__(self, path: str, layers: str = "mean") -> None:
        self._layers = layers
        config = None if is_whole_model(path) else _config(path, "speech_teacher")
        self._model: nn.Module
        if config is None or config.model_type == "whisper":
            encoder = load_part_encoder(path)
            config = encoder.whisper.config
            self._features = HeardFeatures.from_whisper_config(config)
            self._model = encoder
            self._rate_hz, frame_samples = HEARD_SAMPLE_RATE_HZ, HOP_SAMPLES * MEL_FRAMES_PER_ENCODER_FRAME
        else:
            if not hasattr(config, "inputs_to_logits_ratio"):
                raise ValueError(
                    f"distillation.speech_teacher is {path!r} with model_type {config.model_type!r}: "
                    "give a Whisper, or a model on waves such as HuBERT, WavLM or wav2vec 2.0"
                )
            try:
                self._extractor = AutoFeatureExtractor.from_pretrained(path)
                self._model = AutoModel.from_pretrained(path, dtype=torch.float32)
            except _LOADING_ERRORS as error:
                raise _no_model(path, "speech_teacher", error) from error
            self._rate_hz, frame_samples = self._extractor.sampling_rate, config.inputs_to_logits_ratio
        self._model.eval().requires_grad_(False)
        self.frame_sec = frame_samples / self._rate_hz
        self.dim = int(config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Tells one set of weights from another."""
        return _fingerprint(self._model)

    @torch.no_grad()
    def frames(self, wav_S: np.ndarray, sample_rate_hz: int) -> Tensor:
        """vectors_NT of a mono clip; frame n covers `frame_sec` from n * frame_sec on.

        Raises:
            Unusable: the clip is longer than a Whisper's window, or shorter than a frame of a wave model.
        """
        wav_S = resample(wav_S, sample_rate_hz, self._rate_hz)
        if isinstance(self._model, SpeechEncoder):
            return self._whisper_frames(self._model, wav_S)
        if len(wav_S) < 2 * self.frame_sec * self._rate_hz:
            raise Unusable("shorter than a frame of the speech teacher")
        encoded = self._extractor(wav_S, sampling_rate=self._rate_hz, return_tensors="pt")
        return _join(self._model(**encoded, output_hidden_states=True).hidden_states, self._layers)

    def _whisper_frames(self, encoder: SpeechEncoder, wav_S: np.ndarray) -> Tensor:
        if len(wav_S) > self._features.max_samples:
            raise Unusable(f"longer than the speech teacher's window of {encoder.max_heard_sec:g} s")
        features_1CF = self._features.features(wav_S)[None]
        hidden: list[Tensor] = []  # what transformers would give as hidden_states: each layer's input, then the output
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
            for layer in encoder.whisper.layers
        ]
        try:
            output_1NT, _ = encoder(features_1CF, torch.tensor([features_1CF.shape[2]]))
        finally:
            for hook in hooks:
                hook.remove()
        return _join([*hidden, output_1NT], self._layers)


def _join(hidden_states: Sequence[Tensor], layers: str) -> Tensor:
    """Hidden states of one clip or text, each (1, N, T), to vectors_NT."""
    return hidden_states[-1][0] if layers == "last" else torch.stack(list(hidden_states)).mean(0)[0]


def _config(path: str, field: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except _LOADING_ERRORS as error:
        raise _no_model(path, field, error) from error


def _no_model(path: str, field: str, error: Exception) -> ValueError:
    reason = "it has no config.json" if Path(path).is_dir() and not Path(path, "config.json").is_file() else None
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(
        f"distillation.{field} is {path!r}, which cannot be loaded ({reason or first_line}): "
        "give the folder or the Hub name of a Hugging Face checkpoint"
    )


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha1()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
