"""The demo: three questions answered aloud, then one new answer taught by a LoRA fine-tune and spoken.

    python -m inference.demo

Everything it needs is in the repository: the model in the box and the recordings in `inference/demo_data`, whose split
`test` are the questions asked (the last one is new to the model) and whose split `train` are the lessons.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowomni.commands import exit_status

from .talk import answer_live

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help is answered before
    from flowomni import Answer, FlowOmni, Question

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "demo_data"
CONFIG = "configs/tiny/demo.yaml"
TYPED = ("what day comes after monday", "tuesday comes after monday")


def asked() -> list[tuple[Path, str, str]]:
    """(recording, its words, the right answer) of each question that the demo asks; the last is the new one."""
    lines = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = [line["turns"] for line in lines if line["split"] == "test"]
    return [(DATA / question["audio"], question["text"], answer["text"]) for question, answer in turns]


def ask(omni: FlowOmni, question: Question, words: str, out: Path) -> Answer:
    """Ask one question, print question and answer, write the voice."""
    print(f"  {'typed' if question.audio is None else 'heard'}:  {words}")
    print("  answer: ", end="", flush=True)
    answer = answer_live(omni, question, {})
    answer.save(out)
    print(f"  voice:  {out}\n")
    return answer


def teach(model: str | None, max_steps: int | None, folder: Path) -> Path:
    """Fine-tune in a process of its own, as anyone would on the command line; returns the taught model's folder.

    Raises:
        ValueError: the training failed, which has said why, or `folder` holds something else.
    """
    if folder.exists():
        if not (folder / "log.jsonl").is_file():
            raise ValueError(f"{folder} is in the way and no training run: move it or choose another --out-dir")
        shutil.rmtree(folder)  # a finished run would not start again
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *launch, "-m", "training.train"]
    command += ["--config", CONFIG, "--output_dir", str(folder)]
    if model is not None:
        command += ["--options.model", str(Path(model).resolve())]
    if max_steps is not None:
        command += ["--max_steps", str(max_steps)]
    print(f"  accelerate launch -m training.train --config {CONFIG}\n", flush=True)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_LOG_LEVEL": "ERROR"}
    status = subprocess.run(command, cwd=ROOT, env=os.environ | quiet).returncode
    if status != 0:
        raise ValueError(f"the fine-tune ended with status {status}; its last lines above say why")
    return folder / "final"


def demo(model: str | None, out: Path, max_steps: int | None) -> None:
    """The whole story; writes wavs and a picture into `out`.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    from transformers.utils import logging

    from flowomni import FlowOmni, Question

    from .plot import plot_answer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    *known, (new_file, new_words, new_answer) = asked()
    omni = FlowOmni.from_pretrained(model)

    print("\n1. Three questions, two of them spoken by voices that training never heard\n")
    questions = [(Question(audio=file), words, answer) for file, words, answer in known]
    questions.append((Question(text=TYPED[0]), *TYPED))
    for number, (question, words, _) in enumerate(questions, 1):
        answer = ask(omni, question, words, out / f"answer_{number}.wav")
        plot_answer(out / f"answer_{number}.png", answer, 1 / omni.model.speech_tokenizer.spec.tokens_per_sec)

    print(f'2. A question whose answer it was never told; it shall be "{new_answer}"\n')
    before = ask(omni, Question(audio=new_file), new_words, out / "before.wav").text

    print("3. Teaching it: eight other voices ask that question, and old ones so that none is forgotten\n")
    taught_since = time.perf_counter()
    taught = FlowOmni.from_pretrained(teach(model, max_steps, out.resolve() / "taught"))
    print(f"\n  taught in {time.perf_counter() - taught_since:.0f} s\n")

    print("4. The same question again, in a voice that was not in the lessons\n")
    after = ask(taught, Question(audio=new_file), new_words, out / "after.wav").text
    again = taught.answers([question for question, _, _ in questions], speak=False)
    kept = sum(answer.text == right for answer, (_, _, right) in zip(again, questions, strict=True))

    print(f"  before:  {before}\n  after:   {after}\n  old questions still answered right: {kept} of {len(again)}")
    print(f"\nListen to {out}/*.wav and look at {out}/*.png; {time.perf_counter() - began:.0f} s in all.")
    print("Your own: python -m inference.talk question.wav --out answer.wav")


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m inference.demo", description="Hear the model and teach it.")
    parser.add_argument("--model", help="model folder (default: the model in the box)")
    parser.add_argument("--out-dir", type=Path, default=Path("demo_out"), help="default: demo_out")
    parser.add_argument("--max-steps", type=int, help=f"of the fine-tune (default: what {CONFIG} says)")
    options = parser.parse_args(args)
    return exit_status(lambda: demo(options.model, options.out_dir, options.max_steps))


if __name__ == "__main__":
    sys.exit(main())
