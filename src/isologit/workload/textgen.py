"""Instruction and answer pairs in plain English, written by rule from a seed: what the demo model learns and is asked.

An answer is a function of its instruction alone, so a small model can be sure of it. Many answers quote the
instruction, count, or repeat a pattern, as base models do; look-up speculation finds something to copy there.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ANIMALS = (
    "bear bee cat cow crow deer dog duck fish fox frog goat hare hawk hen horse lamb lion mouse otter owl seal wolf"
).split()
PLANTS = (
    "apple barley bean cherry clover corn daisy fern grape ivy lemon maple mint moss oak olive pear pine rose wheat"
).split()
TOOLS = (
    "axe basket bell boat bottle brush bucket cart chair clock cup hammer kettle key knife ladder lamp map net pen"
).split()
PLACES = (
    "bay beach cave city desert farm field forest garden harbor hill island lake market meadow river valley village"
).split()
PEOPLE = (
    "baker doctor driver farmer gardener king merchant miller painter pilot poet queen sailor singer teacher".split()
)
COLORS = "black blue brown gold gray green orange pink purple red silver white yellow".split()
TRAITS = (
    "brave calm clever gentle happy honest kind loud lucky patient proud quick quiet small strong tall warm wise"
).split()
DISHES = "bread cake jam pancakes pie porridge salad sandwich soup stew tea toast".split()
VERBS = [
    ("walk", "walked"), ("look", "looked"), ("work", "worked"), ("play", "played"), ("wait", "waited"),
    ("jump", "jumped"), ("talk", "talked"), ("rest", "rested"), ("listen", "listened"), ("return", "returned"),
]  # fmt: skip
GROUPS = {"animals": ANIMALS, "plants": PLANTS, "tools": TOOLS, "places": PLACES, "jobs": PEOPLE, "colors": COLORS}
SINGULAR = {
    "animals": "animal",
    "plants": "plant",
    "tools": "tool",
    "places": "place",
    "jobs": "job",
    "colors": "color",
}
USES = "to carry water,to cut wood,to cross the river,to light the room,to find the way,to keep food fresh".split(",")
REASONS = "it saves time,it keeps people healthy,it makes work easier,it brings people together,it costs little".split(
    ","
)
HABITS = (
    "enough sleep,fresh food,daily exercise,clean water,good friends,regular breaks,an open window,a short list".split(
        ","
    )
)
TOPICS = (
    "reading,walking,recycling,saving money,learning a language,planting trees,cooking at home,sharing tools".split(",")
)


@dataclass(frozen=True)
class Pair:
    """What is asked and what a trained model should answer."""

    instruction: str
    answer: str


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentence(rng: random.Random) -> str:
    """A plain statement, for inputs of any length."""
    who, where = rng.choice(ANIMALS + PEOPLE), rng.choice(PLACES)
    verb = rng.choice(VERBS)[0]
    return f"The {rng.choice(TRAITS)} {who} likes to {verb} near the {where}."


def _facts(rng: random.Random) -> Pair:
    name, group = _thing(rng)
    asked = rng.choice(["Describe the {}.", "Tell me about the {}.", "Write about the {}."]).format(name)
    own = _fixed(name)
    lines = [
        f"The {name} is a well known {SINGULAR[group]}.",
        f"It is often {own.choice(COLORS)} and {own.choice(TRAITS)}.",
    ]
    lines.append(f"You can find the {name} near the {own.choice(PLACES)}.")
    if own.random() < 0.7:
        lines.append(f"The {own.choice(PEOPLE)} likes the {name} because {own.choice(REASONS)}.")
    return Pair(asked, " ".join(lines))


def _list(rng: random.Random) -> Pair:
    group, count = rng.choice(list(GROUPS)), rng.randint(2, 10)
    items = GROUPS[group][:]
    _fixed(f"{group}{count}").shuffle(items)
    asked = rng.choice(["List {} {}.", "Name {} {}.", "Give me a list of {} {}."]).format(count, group)
    return Pair(asked, "\n".join(f"{i}. The {item}" for i, item in enumerate(items[:count], 1)))


def _sum(rng: random.Random) -> Pair:
    x, y = rng.randint(1, 12), rng.randint(1, 12)
    return Pair(f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}.")


def _count(rng: random.Random) -> Pair:
    low = rng.randint(1, 20)
    high = low + rng.randint(4, 60)
    return Pair(f"Count from {low} to {high}.", ", ".join(str(i) for i in range(low, high + 1)) + ".")


def _past(rng: random.Random) -> Pair:
    verb, past = rng.choice(VERBS)
    subject, where = f"The {rng.choice(TRAITS)} {rng.choice(PEOPLE)}", f"near the {rng.choice(PLACES)}"
    asked = f"Rewrite the sentence in the past tense:{subject} will {verb} {where}."
    return Pair(asked, f"{subject} {past} {where}.")


def _answer_yes_no(rng: random.Random) -> Pair:
    name, group = _thing(rng)
    other = rng.choice(list(GROUPS))
    return Pair(f"Is the {name} one of the {other}? Answer yes or no.", "Yes." if other == group else "No.")


def _group_of(rng: random.Random) -> Pair:
    name, group = _thing(rng)
    return Pair(f"Which group does the {name} belong to?", f"The {name} belongs to the {group}.")


def _compare(rng: random.Random) -> Pair:
    (one, group), (two, other) = _thing(rng), _thing(rng)
    if group == other:
        answer = f"The {one} and the {two} are both {group}."
    else:
        answer = f"The {one} belongs to the {group}, but the {two} belongs to the {other}."
    answer += f" The {one} is {_fixed(one).choice(COLORS)} and the {two} is {_fixed(two).choice(COLORS)}."
    return Pair(f"Compare the {one} and the {two}.", answer)


def _steps(rng: random.Random) -> Pair:
    dish = rng.choice(DISHES)
    own = _fixed(dish)
    things = own.sample(
        ["the flour", "the milk", "the salt", "the honey", "the butter", "the water", "the fruit"], own.randint(3, 6)
    )
    lines = [f"Wash your hands and clean the {own.choice(['table', 'pot', 'bowl'])}."]
    lines += [f"Add {thing} and stir for {own.randint(2, 9)} minutes." for thing in things]
    lines.append(f"Serve the {dish} while it is warm.")
    asked = rng.choice(["Explain how to make {}.", "How do I make {}?", "Give the steps to make {}."]).format(dish)
    return Pair(asked, "\n".join(f"Step {i}: {line}" for i, line in enumerate(lines, 1)))


def _story(rng: random.Random) -> Pair:
    who, friend, where = rng.choice(ANIMALS), rng.choice(PEOPLE), rng.choice(PLACES)
    own = _fixed(who + friend + where)
    lines = [f"Once upon a time, {a(who)} lived near the {where}.", f"Every day the {who} met the {friend}."]
    for day in own.sample(
        ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"], own.randint(2, 7)
    ):
        past = own.choice(VERBS)[1]
        spoken = f'"What {a(own.choice(TRAITS))} day," said the {who}.'
        lines.append(f"On {day} the {who} and the {friend} {past} near the {where}. {spoken}")
    lines.append(f"The {who} and the {friend} were happy, and they stayed friends for ever.")
    return Pair(f"Write a story about {a(who)} and {a(friend)} near the {where}.", "\n".join(lines))


def _advice(rng: random.Random) -> Pair:
    topic = rng.choice(TOPICS)
    own = _fixed(topic)
    reasons = own.sample(REASONS, own.randint(2, 5))
    text = f"{topic.capitalize()} is a good habit. " + " ".join(f"It is good because {reason}." for reason in reasons)
    asked = rng.choice(["Why is {} a good idea?", "Write a paragraph about {}.", "Explain the benefits of {}."]).format(
        topic
    )
    return Pair(asked, text)


def _tips(rng: random.Random) -> Pair:
    count = rng.randint(2, 7)
    habits = HABITS[:]
    _fixed(f"tips{count}").shuffle(habits)
    lines = [f"{i}. Make sure that you have {habit} every day." for i, habit in enumerate(habits[:count], 1)]
    return Pair(f"Give {count} tips for a healthy life.", "\n".join(lines))


def _repeat(rng: random.Random) -> Pair:
    text, times = sentence(rng), rng.randint(2, 12)
    return Pair(f"Repeat the sentence {times} times:{text}", "\n".join([text] * times))


def _copy_words(rng: random.Random) -> Pair:
    words = rng.sample(ANIMALS + PLANTS + TOOLS, rng.randint(3, 14))
    return Pair(f"Write the words as a list:{', '.join(words)}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1)))


def _use(rng: random.Random) -> Pair:
    tool = rng.choice(TOOLS)
    return Pair(f"What is {a(tool)} used for?", f"People use {a(tool)} {_fixed(tool).choice(USES)}.")


_WRITERS: list[Callable[[random.Random], Pair]] = [
    _facts, _list, _sum, _count, _past, _answer_yes_no, _group_of, _compare, _steps, _story, _story, _advice, _tips,
    _repeat, _repeat, _copy_words, _use,
]  # fmt: skip


def _thing(rng: random.Random) -> tuple[str, str]:
    group = rng.choice(["animals", "plants", "tools", "places", "jobs"])
    return rng.choice(GROUPS[group]), group


def _fixed(key: str) -> random.Random:
    """A generator that depends on the key alone: the facts of this small world do not change."""
    return random.Random(zlib.crc32(key.encode()))


def pairs(seed: int) -> Iterator[Pair]:
    """An endless stream of pairs; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(_WRITERS)(rng)
