"""Ask a model: `python -m inference.talk question.wav --out answer.wav`.

Spoken questions (any format, rate and number of channels that soundfile reads), a typed one (`--text`), or words to
read aloud (`--say`). One question's text is printed while it is generated; several are answered in batches.

Errors are one line on stderr and exit status 2. Of several questions a bad file is reported and the others are still
answered, with status 2 at the end. Ctrl-C is status 130. Every file is written whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowomni.commands import Parser, add_model_options, exit_status, load

if TYPE_CHECKING:  # torch and transformers take seconds to import: a bad command line is answered before
    from flowomni import Answer, FlowOmni, Question

BATCH_SIZE = 8
SHORT_SEC = 0.1
AUDIO_FORMATS = (".wav", ".flac")
NUM_ODE_STEPS = 16
JSON_HELP = """with --json, one object per question on a line of its own:
  file             the question's file, null if it was typed
  heard_sec        seconds of audio that the model heard
  text             the answer in words
  answer_file      where its voice is, null without --out
  answer_sec       seconds of speech
  first_audio_ms   from the end of the heard audio to the first sample; of several questions, from their batch's start
  realtime_factor  compute time over answer time, below 1 is faster than real time; of several questions, the whole
                   batch's compute time over its seconds of speech"""


@dataclass(frozen=True)
class Task:
    """One question of the command line: exactly one of `file` and `text`, and where the voice goes."""

    file: str | None
    text: str | None
    kind: str  # "answer" or "speak"
    out: Path | None


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what does not fit together ends the program."""
    parser = Parser(
        prog="python -m inference.talk",
        description="Ask a model by voice or text and hear its answer.",
        epilog=JSON_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", nargs="*", metavar="question.wav", help="audio files, each its own question")
    parser.add_argument("--text", help="a typed question, instead of audio")
    parser.add_argument("--say", metavar="TEXT", help="read this aloud (speech synthesis), instead of a question")
    parser.add_argument("--out", type=Path, help="write the answer's voice here (.wav or .flac)")
    parser.add_argument("--out-dir", type=Path, help="write DIR/a.wav for a.wav, and so on; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same voice (default: 0)")
    parser.add_argument("--temperature", type=float, help="of the sampled speech; 0 is no noise (default: 1)")
    parser.add_argument("--num-steps", type=int, help="solver steps (default: what the head was trained for)")
    parser.add_argument("--solver", help="euler, midpoint, dopri5 or map (default: what the head was trained for)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: 1)")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per question")
    parser.add_argument("--plot", type=Path, metavar="p.png", help="draw mel, speech states and text in time")
    options = parser.parse_args(args)
    given = [bool(options.questions), options.text is not None, options.say is not None]
    if sum(given) != 1:
        parser.error("give audio files, or --text, or --say" + (", not several of them" if any(given) else ""))
    if options.out and options.out_dir:
        parser.error("give --out or --out-dir, not both")
    if options.out and len(options.questions) > 1:
        parser.error(f"--out is one file for {len(options.questions)} questions: use --out-dir")
    if options.out_dir and not options.questions:
        parser.error("--out-dir names answers after audio files: use --out")
    if options.plot and len(options.questions) > 1:
        parser.error(f"--plot is one picture for {len(options.questions)} questions: ask one at a time")
    if options.say is not None and not (options.out or options.json or options.plot):
        parser.error("--say needs --out, the file to write the speech to")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed}; it must be at least 0 and below 2**63")
    return options


def plan(options: argparse.Namespace) -> list[Task]:
    """What is asked and where each answer goes, checked as far as that goes without any work.

    Raises:
        ValueError: an answer could not be written, two answers have one name, or one would replace its question.
    """
    if not options.questions:
        typed = options.text if options.say is None else options.say
        tasks = [Task(None, typed, "answer" if options.say is None else "speak", options.out)]
    elif options.out_dir:
        names = Counter(Path(file).stem for file in options.questions)
        for name, count in names.items():
            if count > 1:
                same = " and ".join([f for f in options.questions if Path(f).stem == name][:2])
                raise ValueError(f"{same} would both be answered in {options.out_dir / name}.wav: rename one of them")
        tasks = [Task(f, None, "answer", options.out_dir / f"{Path(f).stem}.wav") for f in options.questions]
    else:
        tasks = [Task(f, None, "answer", options.out) for f in options.questions]
    questions = {Path(task.file).resolve() for task in tasks if task.file}
    for task in tasks:
        if task.out:
            _check_output(task.out, AUDIO_FORMATS, questions, make_folder=bool(options.out_dir))
    if options.plot:
        outputs = {task.out.resolve() for task in tasks if task.out}
        _check_output(options.plot, (".png", ".pdf", ".svg"), questions | outputs, make_folder=False)
    return tasks


def _check_output(path: Path, endings: tuple[str, ...], taken: set[Path], make_folder: bool) -> None:
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} cannot be written: end its name in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder, give the name of a file")
    if path.resolve() in taken:
        raise ValueError(f"{path} would replace another file of this command: choose another name or folder")
    folder = path.parent
    while make_folder and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.exists():
        raise ValueError(f"{path} cannot be written: make the folder {folder} first")
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: you may not write to the folder {folder}")


def talk(options: argparse.Namespace) -> int:
    """Answer everything; returns the exit status.

    Raises:
        ValueError, OSError: with a message for the user.
    """
    tasks = plan(options)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    omni = load(options)
    speak = bool(options.out or options.out_dir or options.json or options.plot)
    settings = {"speak": speak, "seed": options.seed, "sampling": _sampling(options)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_read` says what is cut off, with the file's name
        if len(tasks) > 1 or options.json:
            return _answer_batches(omni, tasks, settings, options)
        question = _read(omni, tasks[0])
        if question is None:
            return 2
        _keep(omni, tasks[0], answer_live(omni, question, settings), options.plot)
        return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "num_steps", "solver", "guidance")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.solver in ("euler", "midpoint"):  # the default of a one-step head is too coarse for an ODE
        chosen.setdefault("num_steps", NUM_ODE_STEPS)
    return chosen


def _read(omni: FlowOmni, task: Task) -> Question | None:
    """The question of a task, or None where its file is bad, which is reported."""
    from flowomni import Question
    from flowomni.api import load_heard
    from flowomni.audio import AudioError

    if task.file is None:
        return Question(text=task.text, task=task.kind)
    window_sec = omni.processor.max_heard_sec
    try:
        heard = load_heard(task.file, window_sec)
    except AudioError as error:
        _report(f"error: {error}")
        return None
    if heard.cut_sec > 0:
        _report(
            f"warning: {task.file} is {heard.source_sec:.1f} s long and the model hears {window_sec:.1f} s: "
            f"the last {heard.cut_sec:.1f} s are cut off"
        )
    if heard.duration_sec < SHORT_SEC:
        _report(f"warning: {task.file} is only {heard.duration_sec * 1000:.2g} ms long: is it the right file?")
    elif not heard.wav_S.any():
        _report(f"warning: {task.file} is silent, all its samples are zero: check the recording")
    return Question(audio=heard, task=task.kind)


def answer_live(omni: FlowOmni, question: Question, settings: dict[str, Any]) -> Answer:
    """Answer one question and print its text, on one line, while it is generated."""
    events = omni.stream(question, **settings)
    printed = False
    try:
        while True:
            text = next(events).text
            text = text if printed else text.lstrip()
            print(text, end="", flush=True)
            printed = printed or bool(text)
    except StopIteration as end:
        return end.value
    finally:
        if printed:
            print(flush=True)


def _answer_batches(omni: FlowOmni, tasks: list[Task], settings: dict[str, Any], options: argparse.Namespace) -> int:
    from tqdm import tqdm

    status = 0
    with tqdm(total=len(tasks), unit="question", disable=None if len(tasks) > 1 else True) as progress:
        for batch in _chunks(tasks, BATCH_SIZE):
            asked = [(task, question) for task in batch if (question := _read(omni, task)) is not None]
            if len(asked) < len(batch):
                status = 2
            answers = omni.answers([question for _, question in asked], batch_size=BATCH_SIZE, **settings)
            for (task, _), answer in zip(asked, answers, strict=True):
                _keep(omni, task, answer, options.plot)
                line = json.dumps(_summary(task, answer)) if options.json else f"{task.file}: {answer.text}"
                progress.write(line, file=sys.stdout)
                sys.stdout.flush()
            progress.update(len(batch))
    return status


def _chunks(tasks: list[Task], size: int) -> Iterator[list[Task]]:
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


def _keep(omni: FlowOmni, task: Task, answer: Answer, plot: Path | None) -> None:
    """Write the voice and the picture, where they are wanted."""
    if task.out is not None:
        task.out.parent.mkdir(parents=True, exist_ok=True)
        answer.save(task.out)
    if plot is not None:
        from .plot import plot_answer

        plot_answer(plot, answer, 1 / omni.model.speech_tokenizer.spec.tokens_per_sec)


def _summary(task: Task, answer: Answer) -> dict[str, Any]:
    """What `--json` prints of one question."""

    def rounded(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    return {
        "file": task.file,
        "heard_sec": rounded(answer.heard_sec, 3),
        "text": answer.text,
        "answer_file": None if task.out is None else str(task.out),
        "answer_sec": rounded(answer.answer_sec, 3),
        "first_audio_ms": rounded(answer.first_audio_ms, 1),
        "realtime_factor": rounded(answer.realtime_factor, 3),
    }


def _report(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # beside a progress bar, not into it


def main(args: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    return exit_status(lambda: talk(parse(args)))


if __name__ == "__main__":
    sys.exit(main())
