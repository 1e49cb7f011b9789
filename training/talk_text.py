"""The text of the talk corpus: what is asked and what is answered, in lower-case words without punctuation.

Every function is pure: the same arguments (and the same state of the `random.Random`) give the same text. A question
belongs to exactly one split, decided by a stable hash of its content (`split_of`), so that a generator of unlimited
training text can never produce a held-out question, whichever seed it runs with.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
# Easy for a recogniser: frequent, mostly of two syllables or more, and without homophones.
WORDS = tuple(
    """
    apple banana orange lemon cherry tomato potato onion garlic pepper butter cheese sugar honey chocolate coffee
    juice dinner breakfast sandwich pizza salad chicken rabbit tiger lion elephant giraffe zebra camel turtle spider
    butterfly eagle penguin dolphin puppy kitten squirrel dragon dinosaur mother father brother sister daughter
    cousin baby doctor teacher student farmer artist engineer lawyer pilot captain president singer writer driver
    king queen friend neighbor stranger village city castle palace temple church museum library hospital university
    market restaurant kitchen bedroom garden window table sofa carpet pillow blanket curtain candle lantern ladder
    hammer bucket basket bottle pocket button jacket sweater trousers slipper necklace umbrella pencil paper
    notebook picture camera computer telephone television radio guitar piano violin trumpet drum music river
    mountain valley island forest ocean volcano thunder lightning rainbow shadow sunshine summer winter evening
    tomorrow yesterday century moment minute history future language question answer problem letter sentence animal
    planet rocket spaceship airplane helicopter bicycle motorcycle tractor engine bridge tunnel highway railway
    station ticket suitcase passport holiday journey adventure birthday present party wedding festival circus
    football basketball tennis hockey soccer swimming running jumping dancing singing reading writing cooking travel
    follow listen remember forget believe promise discover explore protect develop improve happy angry hungry
    thirsty sleepy lazy clever famous friendly gentle honest lucky nervous patient polite popular powerful silent
    simple special strong terrible wonderful beautiful dangerous different difficult easy empty purple yellow silver
    golden crystal diamond iron copper plastic cotton leather quickly slowly always never maybe perhaps together
    over between behind beside across street office factory light magic secret treasure shoulder finger elbow
    stomach system method machine battery signal satellite energy gravity oxygen chemistry physics biology science
    economy business company manager customer money dollar budget government election freedom justice police
    temperature cloud storm bird frog milk salt soup desk clock gloves truck train
    """.split()  # noqa: SIM905
)
OPPOSITES = (
    ("hot", "cold"), ("cold", "hot"), ("big", "small"), ("small", "big"), ("up", "down"), ("down", "up"),
    ("left", "right"), ("open", "closed"), ("closed", "open"), ("happy", "sad"), ("sad", "happy"),
    ("young", "old"), ("old", "young"), ("fast", "slow"), ("slow", "fast"), ("early", "late"), ("late", "early"),
    ("full", "empty"), ("empty", "full"), ("rich", "poor"), ("strong", "weak"), ("dark", "light"),
    ("light", "dark"), ("hard", "soft"), ("soft", "hard"), ("wet", "dry"), ("dry", "wet"), ("clean", "dirty"),
    ("dirty", "clean"), ("good", "bad"), ("bad", "good"), ("day", "night"), ("night", "day"), ("black", "white"),
    ("love", "hate"), ("first", "last"), ("inside", "outside"), ("outside", "inside"), ("always", "never"),
    ("noisy", "quiet"),
)  # fmt: skip
CAPITALS = (
    ("france", "paris"), ("germany", "berlin"), ("italy", "rome"), ("spain", "madrid"), ("england", "london"),
    ("portugal", "lisbon"), ("greece", "athens"), ("austria", "vienna"), ("poland", "warsaw"), ("hungary", "budapest"),
    ("russia", "moscow"), ("sweden", "stockholm"), ("norway", "oslo"), ("finland", "helsinki"),
    ("denmark", "copenhagen"), ("ireland", "dublin"), ("scotland", "edinburgh"), ("belgium", "brussels"),
    ("holland", "amsterdam"), ("japan", "tokyo"), ("china", "beijing"), ("india", "new delhi"), ("egypt", "cairo"),
    ("kenya", "nairobi"), ("canada", "ottawa"), ("mexico", "mexico city"), ("cuba", "havana"), ("peru", "lima"),
    ("chile", "santiago"), ("brazil", "brasilia"), ("australia", "canberra"), ("turkey", "ankara"), ("iran", "tehran"),
    ("iraq", "baghdad"), ("israel", "jerusalem"), ("lebanon", "beirut"), ("jordan", "amman"), ("thailand", "bangkok"),
    ("vietnam", "hanoi"), ("ukraine", "kiev"),
)  # fmt: skip
COLORS = (
    ("grass", "green"), ("the sky", "blue"), ("snow", "white"), ("coal", "black"), ("blood", "red"),
    ("a banana", "yellow"), ("a lemon", "yellow"), ("a tomato", "red"), ("a carrot", "orange"), ("a pumpkin", "orange"),
    ("chocolate", "brown"), ("milk", "white"), ("the sun", "yellow"), ("a frog", "green"), ("a flamingo", "pink"),
    ("a raven", "black"), ("a swan", "white"), ("an elephant", "gray"), ("a mouse", "gray"), ("a cucumber", "green"),
    ("spinach", "green"), ("broccoli", "green"), ("a strawberry", "red"), ("a cherry", "red"), ("sugar", "white"),
    ("salt", "white"), ("coffee", "brown"), ("the ocean", "blue"), ("lavender", "purple"), ("an eggplant", "purple"),
    ("a canary", "yellow"), ("a bear", "brown"), ("wood", "brown"), ("a cloud", "white"), ("concrete", "gray"),
    ("a sapphire", "blue"), ("an emerald", "green"), ("a ruby", "red"), ("gold", "yellow"), ("a flame", "orange"),
)  # fmt: skip
GREETINGS = (
    (("hello", "hi", "hello there", "hi there", "hey there", "greetings"), "hello how can i help you"),
    (("good morning", "a very good morning"), "good morning to you"),
    (("good evening", "a very good evening"), "good evening to you"),
    (("how are you", "how are you today", "how do you do", "are you well"), "i am fine thank you"),
    (("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks"), "you are welcome"),
    (("who are you", "what are you", "what is your name", "tell me who you are"), "i am flow omni"),
    (("goodbye", "bye bye", "see you later", "good night"), "goodbye see you soon"),
)
# Speech the model has no answer to: templates, whose upper-case words stand for one entry of their list.
OUT_OF_DOMAIN = {
    "template": (
        "PERSON VERB the ADJECTIVE OBJECT",
        "PERSON VERB the OBJECT PLACE",
        "PERSON will VERB the OBJECT TIME",
        "please VERB the OBJECT",
        "please VERB the ADJECTIVE OBJECT PLACE",
        "can you VERB the OBJECT TIME",
        "why did PERSON VERB the OBJECT",
        "when will PERSON VERB the OBJECT",
        "where is the ADJECTIVE OBJECT",
        "who can VERB the OBJECT PLACE",
        "what is the price of the ADJECTIVE OBJECT",
        "what is the size of the OBJECT PLACE",
        "how much is the ADJECTIVE OBJECT",
        "how far is it from the OBJECT PLACE",
        "there is ADJECTIVE OBJECT PLACE",
        "the OBJECT was ADJECTIVE TIME",
        "i think the OBJECT PLACE is ADJECTIVE",
        "turn on the OBJECT PLACE TIME",
    ),
    "PERSON": ("my mother", "your father", "the teacher", "our neighbor", "the doctor", "they", "we", "the children"),
    "VERB": ("find", "move", "paint", "clean", "bring", "follow", "forget", "describe", "repair", "sell", "hide"),
    "ADJECTIVE": ("old", "broken", "expensive", "little", "strange", "new", "heavy", "lovely", "wooden", "dirty"),
    "OBJECT": (
        "window", "telephone", "bicycle", "table", "letter", "picture", "machine", "garden", "jacket", "radio",
        "ticket", "basket", "kitchen", "camera", "station", "umbrella",
    ),
    "PLACE": ("in the house", "near the river", "at the market", "behind the school", "under the bridge", "over there"),
    "TIME": ("today", "tomorrow", "last week", "this evening", "every morning", "on the weekend", "very soon"),
}  # fmt: skip
SORRY = "sorry i did not catch that"
SPLITS = ("train", "valid", "test")
HELD_OUT_PERCENT = 10
VALID_PERCENT = 2  # of all content: the part of the held-out tenth that is for validation, the rest is for the test


@dataclass(frozen=True)
class Pair:
    """One question with its answer. `question` is empty where nothing is said (silence, noise)."""

    family: str
    question: str
    answer: str
    split: str = "train"
    voice_group: str = "trained"  # who asks: trained | unseen | human | unseen_human


def number_words(n: int) -> str:
    """A number from -999 to 999 in words, without `and`: 144 is `one hundred forty four`, -4 is `minus four`."""
    if not -1000 < n < 1000:
        raise ValueError(f"n is {n}, but only -999 to 999 have words here")
    if n < 0:
        return f"minus {number_words(-n)}"
    if n >= 100:
        rest = f" {number_words(n % 100)}" if n % 100 else ""
        return f"{DIGITS[n // 100]} hundred{rest}"
    if n >= 20:
        return TENS[n // 10 - 2] + (f" {DIGITS[n % 10]}" if n % 10 else "")
    return DIGITS[n] if n < 10 else TEENS[n - 10]


def _arithmetic(operation: str, left: int, right: int) -> tuple[str, str]:
    value = {"plus": left + right, "minus": left - right, "times": left * right}[operation]
    expression = f"{number_words(left)} {operation} {number_words(right)}"
    return f"what is {expression}", f"{expression} is {number_words(value)}"


def _plus(rng: random.Random) -> tuple[str, str]:
    return _arithmetic("plus", rng.randrange(100), rng.randrange(100))


def _minus(rng: random.Random) -> tuple[str, str]:
    return _arithmetic("minus", rng.randrange(100), rng.randrange(100))


def _times(rng: random.Random) -> tuple[str, str]:
    return _arithmetic("times", rng.randrange(13), rng.randrange(13))


def _neighbour(names: tuple[str, ...], unit: str, rng: random.Random) -> tuple[str, str]:
    index, (side, step) = rng.randrange(len(names)), rng.choice((("after", 1), ("before", -1)))
    answer = f"{names[(index + step) % len(names)]} comes {side} {names[index]}"
    return f"what {unit} comes {side} {names[index]}", answer


def _day(rng: random.Random) -> tuple[str, str]:
    return _neighbour(DAYS, "day", rng)


def _month(rng: random.Random) -> tuple[str, str]:
    return _neighbour(MONTHS, "month", rng)


def _say(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6)))
    return f"say {words}", words


def _digits(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.choice(DIGITS) for _ in range(rng.randint(3, 6)))
    return words, f"you said {words}"


def _add(rng: random.Random) -> tuple[str, str]:
    values = [rng.randrange(10) for _ in range(rng.randint(2, 6))]
    return f"add {' '.join(DIGITS[value] for value in values)}", f"they add up to {number_words(sum(values))}"


def _opposite(rng: random.Random) -> tuple[str, str]:
    word, opposite = rng.choice(OPPOSITES)
    return f"what is the opposite of {word}", f"the opposite of {word} is {opposite}"


def _capital(rng: random.Random) -> tuple[str, str]:
    country, city = rng.choice(CAPITALS)
    return f"what is the capital of {country}", f"the capital of {country} is {city}"


def _color(rng: random.Random) -> tuple[str, str]:
    thing, color = rng.choice(COLORS)
    return f"what color is {thing}", f"{thing} is {color}"


def _greeting(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(GREETINGS)
    return rng.choice(questions), answer


def _other(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.35:
        return "", SORRY
    template = rng.choice(OUT_OF_DOMAIN["template"]).split()
    return " ".join(rng.choice(OUT_OF_DOMAIN.get(word, (word,))) for word in template), SORRY


# Family -> (share of the training pairs, sampler). Arithmetic is the hardest: 44 percent in all.
_FAMILIES: dict[str, tuple[float, Callable[[random.Random], tuple[str, str]]]] = {
    "plus": (0.18, _plus),
    "minus": (0.18, _minus),
    "times": (0.08, _times),
    "day": (0.02, _day),
    "month": (0.03, _month),
    "say": (0.15, _say),
    "digits": (0.10, _digits),
    "add": (0.07, _add),
    "opposite": (0.03, _opposite),
    "capital": (0.03, _capital),
    "color": (0.03, _color),
    "greeting": (0.03, _greeting),
    "other": (0.07, _other),
}
FAMILIES = tuple(_FAMILIES)
FAMILY_SHARES = {family: share for family, (share, _) in _FAMILIES.items()}
HELD_OUT_FAMILIES = ("plus", "minus", "times", "say", "digits", "add", "other")
HUMAN_SHARE = 1500 / 22_700  # of the training pairs: digits read by people
# Of further training pairs: a few thousand lists are learned by heart instead of word by word.
LIST_SHARES = {"say": 0.6, "digits": 0.2, "add": 0.2}
# Of pairs that are only typed, so that a model which learns to hear and to speak does not forget how to reckon.
TYPED_SHARES = {"minus": 0.35, "plus": 0.25, "add": 0.25, "times": 0.15}


def split_of(family: str, question: str) -> str:
    """`train`, `valid` or `test` by a stable hash of the question's content; `train` where nothing is held out.

    `digits` and `add` share one hash of the digits alone, so a digit sequence held out from one is held out from both.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, which is none of {', '.join(FAMILIES)}")
    if family not in HELD_OUT_FAMILIES or not question:
        return "train"
    kind = "digits" if family in ("digits", "add") else family
    content = question.removeprefix("add ") if kind == "digits" else question
    percent = int.from_bytes(hashlib.sha256(f"{kind}:{content}".encode()).digest()[:8], "big") % 100
    if percent >= HELD_OUT_PERCENT:
        return "train"
    return "valid" if percent < VALID_PERCENT else "test"


def is_held_out(family: str, question: str) -> bool:
    """True where training must never see this question: a tenth of all arithmetic pairs, sequences and sentences.

    Days, months, facts, greetings and silence have too few questions to hold any out; they are never held out.
    """
    return split_of(family, question) != "train"


def sample_family(family: str, rng: random.Random, split: str) -> Pair:
    """One pair of `family` whose question may occur in `split` (valid, test: held out where the family has that)."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, which is none of {', '.join(SPLITS)}")
    sampler = _FAMILIES[family][1]
    while True:
        question, answer = sampler(rng)
        if family not in HELD_OUT_FAMILIES or not question or split_of(family, question) == split:
            return Pair(family, question, answer, split)


def sample_pair(rng: random.Random, split: str) -> Pair:
    """One pair: train by `FAMILY_SHARES`, valid and test all families alike. Unlimited; depends on `rng` alone."""
    weights = list(FAMILY_SHARES.values()) if split == "train" else [1.0] * len(FAMILIES)
    return sample_family(rng.choices(FAMILIES, weights)[0], rng, split)


def _test_cells(with_human: bool) -> list[tuple[str, str]]:
    """Family and voice group of the test pairs in turn. The human cells, digits only, count twice."""
    cells = [(family, group) for family in FAMILIES for group in ("trained", "unseen")]
    return cells + [("digits", "human"), ("digits", "unseen_human")] * (2 if with_human else 0)


def _corpus_pair(split: str, index: int, seed: int, with_human: bool) -> Pair:
    """The pair at one place of the corpus: a pure function of its arguments."""
    rng = random.Random(f"{seed}:{split}:{index}")
    if split != "train":
        cells = _test_cells(with_human)
        if split == "valid":
            cells = [cell for cell in cells if cell[1] in ("trained", "human")]
        family, group = cells[index % len(cells)]
        pair = sample_family(family, rng, split)
        while group == "unseen" and not pair.question:  # silence has no voice
            pair = sample_family(family, rng, split)
        return replace(pair, voice_group=group)
    if with_human and rng.random() < HUMAN_SHARE:
        return replace(sample_family("digits", rng, split), voice_group="human")
    family = rng.choices(FAMILIES, _spoken_shares(with_human))[0]
    return sample_family(family, rng, split)


def _spoken_shares(with_human: bool) -> list[float]:
    """Family shares of the synthetic voices: the digits that people read count towards the share of digits."""
    human = HUMAN_SHARE if with_human else 0.0
    return [share - human if family == "digits" else share for family, share in FAMILY_SHARES.items()]


def corpus_pairs(num_pairs: int, seed: int, with_human: bool = True, num_lists: int = 0) -> list[Pair]:
    """All pairs of a corpus, train, then valid (1/80), then test (1/24, balanced over family x voice group).

    A pure function of its arguments. `with_human` gives a part of the digits to human speakers (voice groups `human`
    and, in the test alone, `unseen_human`). `num_lists` more training pairs by `LIST_SHARES` come last. Raises
    ValueError if `num_pairs` is too small to hold every split.
    """
    if num_pairs < 80:
        raise ValueError(f"num_pairs is {num_pairs}, but valid and test need at least 80 pairs; pass 80 or more")
    counts = {"valid": num_pairs // 80, "test": num_pairs // 24}
    counts = {"train": num_pairs - sum(counts.values()), **counts}
    pairs = [_corpus_pair(split, index, seed, with_human) for split in SPLITS for index in range(counts[split])]
    return pairs + _further_pairs(LIST_SHARES, num_lists, f"{seed}:lists")


def typed_pairs(num_pairs: int, seed: int) -> list[Pair]:
    """Training pairs by `TYPED_SHARES`: a pure function of its arguments."""
    return _further_pairs(TYPED_SHARES, num_pairs, f"{seed}:typed")


def _further_pairs(shares: dict[str, float], num_pairs: int, seed: str) -> list[Pair]:
    rngs = [random.Random(f"{seed}:{index}") for index in range(num_pairs)]
    return [sample_family(rng.choices(list(shares), list(shares.values()))[0], rng, "train") for rng in rngs]


def answer_vocabulary() -> list[str]:
    """Every word that can occur in an answer, sorted."""
    texts = [*DIGITS, *TEENS, *TENS, "hundred minus plus times is", SORRY, "you said they add up to", *WORDS]
    texts += [*DAYS, *MONTHS, "comes after before", "the opposite capital of"]
    texts += [f"{name} {value}" for name, value in (*OPPOSITES, *CAPITALS, *COLORS)]
    texts += [answer for _, answer in GREETINGS]
    return sorted(set(" ".join(texts).split()))


def vocabulary() -> list[str]:
    """Every word that can occur in a question or an answer, sorted."""
    texts = ["what is day month color say add", *(question for questions, _ in GREETINGS for question in questions)]
    texts += [phrase for name, phrases in OUT_OF_DOMAIN.items() if name != "template" for phrase in phrases]
    texts += [word for template in OUT_OF_DOMAIN["template"] for word in template.split() if word not in OUT_OF_DOMAIN]
    return sorted({*answer_vocabulary(), *" ".join(texts).split()})
