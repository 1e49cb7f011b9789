"""Speak what `inference/demo_data` holds: the questions of the demo, and the lessons that teach its new answer.

    python -m scripts.make_demo_data

Needs flite and espeak-ng, as the corpus does. It writes a small corpus in the corpus' own format: split `test` are the
questions that the demo asks, in voices that no training heard, the new one last; split `train` are the lessons: the new
question in eight trained voices, and old questions of every family, so that learning the new answer costs no old
one. Every other old answer is text alone, which halves what the repository carries of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import soundfile

from flowomni.commands import exit_status
from scripts.make_talk_corpus import Question, answer_path, speak_answers, speak_questions
from training.talk_text import Pair

NEW = ("color", "what color is the dragon", "the dragon is golden")
LESSON_VOICES = (
    "flite-kal16", "espeak-en-us", "flite-awb", "espeak-en-us+f1", "flite-slt", "espeak-en-us+m3", "espeak-en-gb",
    "espeak-en-gb+f5",
)  # fmt: skip
OLD = (
    ("color", "what color is the sky", "the sky is blue"),
    ("color", "what color is a frog", "a frog is green"),
    ("color", "what color is the sun", "the sun is yellow"),
    ("color", "what color is snow", "snow is white"),
    ("color", "what color is a bear", "a bear is brown"),
    ("color", "what color is an elephant", "an elephant is gray"),
    ("color", "what color is gold", "gold is yellow"),
    ("plus", "what is nine plus six", "nine plus six is fifteen"),
    ("minus", "what is twenty minus five", "twenty minus five is fifteen"),
    ("times", "what is seven times eight", "seven times eight is fifty six"),
    ("day", "what day comes after friday", "saturday comes after friday"),
    ("month", "what month comes before june", "may comes before june"),
    ("say", "say dragon golden button", "dragon golden button"),
    ("say", "say golden bridge", "golden bridge"),
    ("digits", "four two nine", "you said four two nine"),
    ("add", "add five three", "they add up to eight"),
    ("opposite", "what is the opposite of hot", "the opposite of hot is cold"),
    ("capital", "what is the capital of italy", "the capital of italy is rome"),
    ("capital", "what is the capital of japan", "the capital of japan is tokyo"),
    ("greeting", "who are you", "i am flow omni"),
    ("greeting", "thank you", "you are welcome"),
    ("other", "where is the broken bicycle", "sorry i did not catch that"),
)
ASKED = (
    ("plus", "what is twenty three plus seventeen", "twenty three plus seventeen is forty", "flite-rms"),
    ("capital", "what is the capital of france", "the capital of france is paris", "espeak-en-us+f2"),
    (*NEW, "flite-rms"),
)


def plan_demo(seed: int) -> list[Question]:
    """Lessons and asked questions with their voices."""
    lessons = [(*NEW, voice) for voice in LESSON_VOICES]
    lessons += [(*old, LESSON_VOICES[index % len(LESSON_VOICES)]) for index, old in enumerate(OLD)]
    found = []
    for split, items in (("train", lessons), ("test", ASKED)):
        group = "trained" if split == "train" else "unseen"
        for index, (family, question, answer, voice) in enumerate(items):
            found.append(Question(f"{split}-{index:06d}", Pair(family, question, answer, split, group), voice, seed))
    return found


def make_demo_data(out: Path, seed: int) -> int:
    """Speak whatever is not there yet and write the manifest; returns the number of conversations."""
    questions = plan_demo(seed)
    for folder in ("answers", "questions/train", "questions/test"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    spoken = {q.pair.answer for place, q in enumerate(questions) if q.pair.split == "train" and _answers_aloud(place)}
    speak_answers(sorted(spoken), out)
    for voice in sorted({question.voice for question in questions}):
        speak_questions([question for question in questions if question.voice == voice], out, fsdd=None)
    lines = [_line(question, question.pair.answer in spoken, out) for question in questions]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(questions)


def _answers_aloud(place: int) -> bool:
    return place < len(LESSON_VOICES) or place % 2 == 0


def _line(question: Question, aloud: bool, out: Path) -> dict:
    def turn(role: str, text: str, audio: str) -> dict:
        seconds = round(soundfile.info(out / audio).duration, 3)
        return {"role": role, "text": text, "audio": audio, "duration_sec": seconds}

    pair = question.pair
    answer = {"role": "assistant", "text": pair.answer}
    return {
        "id": question.id,
        "split": pair.split,
        "family": pair.family,
        "voice": question.voice,
        "voice_group": pair.voice_group,
        "turns": [
            turn("user", pair.question, question.path),
            turn("assistant", pair.answer, answer_path(pair.answer)) if aloud else answer,
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 something the user can mend."""
    parser = argparse.ArgumentParser(description="Speak the questions and lessons of the demo.")
    parser.add_argument("--out", type=Path, default=Path("inference/demo_data"), help="default: inference/demo_data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    return exit_status(lambda: print(f"{make_demo_data(options.out, options.seed)} conversations in {options.out}"))


if __name__ == "__main__":
    sys.exit(main())
