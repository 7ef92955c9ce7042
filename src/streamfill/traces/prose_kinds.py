"""The kinds of entries in the invented encyclopedia of `prose`, with their sentence patterns.

`prose_words` explains the slots of a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class FactPattern:
    """One fact of an entry.

    Attributes:
        slot: where its value goes, and how the value is drawn: a slot, perhaps with a number
            behind it, such as ``year1``.
        sentences: ways to say it; the first word is never the slot.
        question: asks for the value.
    """

    slot: str
    sentences: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class EntryKind:
    """One kind of entry: what it is called, its lead sentences, its facts and what else is said.

    Attributes:
        is_thing: whether ``it`` is the word for it.
    """

    titles: tuple[str, ...]
    leads: tuple[str, ...]
    facts: tuple[FactPattern, ...]
    sentences: tuple[str, ...]
    is_thing: bool = True


KINDS: Final = (
    EntryKind(
        titles=("{place_name}", "Upper {place_name}", "{place_name} Cross", "Port {place_name}"),
        leads=(
            "{name} is a market town on the {side1} bank of the {river}.",
            "{name} is a(n) {quality1} town known for its {goods1}.",
            "{name} is a harbour town that lives on the trade in {goods1}.",
        ),
        facts=(
            FactPattern(
                "year1",
                ("It received its charter in {year1}.", "The charter dates from {year1}."),
                "In which year did {name} receive its charter?",
            ),
            FactPattern(
                "person1",
                ("The town was laid out by {person1}.", "Its streets were planned by {person1}."),
                "Who planned the streets of {name}?",
            ),
            FactPattern(
                "many1",
                ("Its bell tower has {many1} steps.", "There are {many1} steps in its bell tower."),
                "How many steps has the bell tower of {name}?",
            ),
        ),
        sentences=(
            "The road to {town} crosses the marsh on {many} piles of {material}.",
            "On market days {goods} and {goods2} are sold in front of {place}.",
            "The walls of {name} were taken down in {year} to make room for {goods} stores.",
            "Its {side} quarter burned in {year} and was rebuilt in {material}.",
            "Children learn to swim in the mill pond, which freezes in most years.",
            "{name} has {few} bakeries and one {quality} theatre.",
        ),
    ),
    EntryKind(
        titles=("{family} engine", "{family} loom", "{place_name} press", "{family} pump"),
        leads=(
            "The {name} is a machine that sorts {goods1} by weight.",
            "The {name} is a(n) {quality1} machine built of {material1} and leather.",
            "The {name} was the first machine to be driven by both wind and water.",
        ),
        facts=(
            FactPattern(
                "person1",
                ("It was invented by {person1}.", "Its inventor was {person1}."),
                "Who invented the {name}?",
            ),
            FactPattern(
                "few1",
                (
                    "One worker and {few1} gears are enough to run it.",
                    "The whole motion rests on {few1} gears.",
                ),
                "How many gears does the {name} have?",
            ),
            FactPattern(
                "town1",
                (
                    "The first one was set up in {town1}.",
                    "The only workshop that built it was in {town1}.",
                ),
                "In which town was the first {name} set up or built?",
            ),
        ),
        sentences=(
            "Its main shaft turns {many} times a minute when the belt is dry.",
            "Oil is given every {few} hours through a tube of {material}.",
            "A lever on the {side} face stops the wheel before anything can break.",
            "Engineers admired the {name} for the way in which it used its own waste heat.",
            "Spare parts were cast in {town} until {year}.",
            "A full load of {goods} takes {few} minutes.",
        ),
    ),
    EntryKind(
        titles=("{person_name}",),
        leads=(
            "{name} was a(n) {job1} who spent most of a long life in {town2}.",
            "{name} was a traveller and collector of {goods1}.",
            "{name} is remembered as the {job1} who mapped the {side1} hills.",
        ),
        facts=(
            FactPattern(
                "town1",
                (
                    "The family came from {town1}.",
                    "Born in {town1}, the child learned to read late.",
                ),
                "From which town did {name} come?",
            ),
            FactPattern(
                "year1",
                (
                    "The first book appeared in {year1}.",
                    "In {year1} a first book was printed, at the author's own cost.",
                ),
                "In which year did the first book of {name} appear?",
            ),
            FactPattern(
                "many1",
                (
                    "The collection grew to {many1} boxes.",
                    "At the end {many1} boxes of notes were left.",
                ),
                "How many boxes did {name} leave?",
            ),
        ),
        sentences=(
            "Friends described {name} as {quality}, though never in public.",
            "A journey to {town} in {year} was cut short by {trouble}.",
            "For {few} years the only income came from lessons and from the sale of {goods}.",
            "{person} and {name} exchanged {many} letters and never met.",
            "A street near {place} bears the name.",
            "The house in {town} is built of {material} and can be visited in {season}.",
            "In {month} {year} {name} was offered a post in {town} and refused it.",
            "According to {document} of {year}, {name} could walk {many} paces without a word.",
            "Some of {people} still tell how {name} lost {few} hats in one {season}.",
            "A portrait in {place} shows {name} with a model made of {material}.",
            "On the way back from {town} {name} met {person}, a(n) {job}, and they became friends.",
            "{name} never wrote about {goods} again after {trouble} in {year}.",
            "{people} of {town} made {name} a member for life, which {person} thought a mistake.",
            "{name} believed that careful notes are worth more than {goods}.",
            "In later years {name} taught {few} pupils, of whom {person} became the best known.",
        ),
        is_thing=False,
    ),
    EntryKind(
        titles=("{family} measure", "{place_name} ell", "{place_name} bushel", "{family} scale"),
        leads=(
            "The {name} is an old measure for {goods1}.",
            "The {name} is a unit that was used on the {side1} coast.",
            "The {name} is a(n) {quality1} unit of length, still found on some maps.",
        ),
        facts=(
            FactPattern(
                "many1",
                ("One of them holds {many1} spoons.", "It was divided into {many1} grains."),
                "What is the number of parts in one {name}?",
            ),
            FactPattern(
                "year1",
                ("It was abolished in {year1}.", "Its use was forbidden in {year1}."),
                "When was the {name} given up?",
            ),
            FactPattern(
                "town1",
                (
                    "The standard is kept in {town1}.",
                    "A bar in {town1} serves as its standard.",
                ),
                "Where is the standard of the {name} kept?",
            ),
        ),
        sentences=(
            "Sellers of {goods} liked it because it can be halved {few} times with nothing left.",
            "In {town} it was {few} parts larger than anywhere else.",
            "An inspector compared {many} copies made of {material} and found {few} that agreed.",
            "Tables for its conversion were printed in {town} and sold together with {goods}.",
            "{person} proposed to replace it by the weight of a cup of {goods}.",
            "Tailors used it until the {season} of {year}.",
        ),
    ),
    EntryKind(
        titles=("{place_name} Bridge", "{place_name} Lock", "{place_name} Lighthouse"),
        leads=(
            "{name} is a(n) {quality1} structure of {material1} near {town2}.",
            "{name} was built to bring {goods1} across the {river}.",
            "{name} stands where two rivers meet, on the {side1} edge of the plain.",
        ),
        facts=(
            FactPattern(
                "many1",
                ("It is {many1} paces long.", "From end to end it measures {many1} paces."),
                "How many paces long is {name}?",
            ),
            FactPattern(
                "person1",
                ("The plans are by {person1}.", "It was designed by {person1}."),
                "Who designed {name}?",
            ),
            FactPattern(
                "year1",
                ("Work ended in {year1}.", "It was opened in {year1}."),
                "When was {name} finished?",
            ),
        ),
        sentences=(
            "The toll was {few} pence for a cart and nothing for {people}.",
            "Its {side} pier rests on a bed of {material}.",
            "A keeper lived there with {few} goats and a barometer.",
            "During {trouble} the water rose to the second arch.",
            "The lamp burns {goods} and can be seen from {town} on a clear night.",
            "It {change} in {year}, against the advice of {person}.",
        ),
    ),
    EntryKind(
        titles=("{place_name} thistle", "{family} heron", "{place_name} plum", "{family} beetle"),
        leads=(
            "The {name} is found only in the {side1} valleys.",
            "The {name} is a(n) {quality1} species of wet meadows.",
            "The {name} was thought to be extinct until {person2} saw it near {town2}.",
        ),
        facts=(
            FactPattern(
                "few1",
                (
                    "It lives for {few1} years.",
                    "Few of them grow older than {few1} years.",
                ),
                "How many years does the {name} live?",
            ),
            FactPattern(
                "month1",
                (
                    "It is first seen in {month1}.",
                    "Its season begins in {month1}.",
                ),
                "In which month does the season of the {name} begin?",
            ),
            FactPattern(
                "person1",
                (
                    "It was named by {person1}.",
                    "The name was proposed by {person1}.",
                ),
                "Who named the {name}?",
            ),
        ),
        sentences=(
            "In a good year up to {many} can be counted on one hillside.",
            "Farmers near {town} plant hedges for it along their fields of barley.",
            "Its colour turns from grey to a dull red in {season}.",
            "It avoids {material} and anything that smells of {goods}.",
            "A drawing of {year} shows it on the roof of {place}.",
            "Young ones stay close to water for {few} weeks.",
        ),
    ),
    EntryKind(
        titles=("{place_name} Fair", "Guild of {place_name}", "{place_name} Library"),
        leads=(
            "The {name} is the oldest institution of its kind on the {river}.",
            "The {name} brings together {people1} and whoever likes {goods1}.",
            "The {name} began as a(n) {quality1} meeting in {place1}.",
        ),
        facts=(
            FactPattern(
                "year1",
                ("It was founded in {year1}.", "Its first meeting took place in {year1}."),
                "When was the {name} founded?",
            ),
            FactPattern(
                "many1",
                ("It has {many1} members.", "Its list of members has {many1} names."),
                "How many members does the {name} have?",
            ),
            FactPattern(
                "person1",
                ("Its first president was {person1}.", "It was led by {person1} at first."),
                "Who led the {name} at first?",
            ),
        ),
        sentences=(
            "Members pay {few} crowns a year, or the same worth in {goods}.",
            "Its seal shows a heron between two columns of {material}.",
            "The doors open on the first Monday of {month} and close {few} days later.",
            "In {year} the whole of {place} was rented for a dinner that nobody attended.",
            "A vote needs {few} hands, and the chair may not raise one.",
            "{person} left it {many} books and a debt.",
        ),
    ),
)
