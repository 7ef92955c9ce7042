"""Words of the invented encyclopedia of `prose`, and what it says about anything.

A pattern has slots in braces. The slots of an entry's facts mean the same throughout the entry;
all others are drawn anew for each sentence. ``a(n)`` becomes the right article.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";"))


NAME_STARTS: Final = _words(
    "Al Bar Bel Cor Dar Del Dor El Fal Fen Gar Gol Har Hel Ist Jor Kal Kar Kel Lan Lor Mar Mel Mor "
    "Nar Nor Or Pel Per Quin Ral Ros Sal Sel Tal Tar Tor Ul Val Ver Wen Yar Zel"
)
NAME_MIDDLES: Final = _words("a e i o an en in on ar er or il el ad eth and end os us")
NAME_ENDS: Final = _words(
    "bury by dale don fell ford gate ham holm ick land ley mere mouth ness port ridge stead ton "
    "vale wick worth"
)
FIRST_NAMES: Final = _words(
    "Ada Anselm Berta Bruno Clara Conrad Dora Edgar Elsa Emil Felix Greta Hugo Ida Ivo Jonas Karla "
    "Lena Leo Magnus Marta Nora Oskar Paula Quentin Rosa Silas Tilda Ulrich Vera Walter Yvonne"
)
FAMILY_STARTS: Final = _words(
    "Ash Black Brand Clay Crane Dun Falk Frost Grind Hale Holl Ker Lind Mill Oak Penn Rook Sand "
    "Stern Thorn Vogt Wald Wex Winter"
)
FAMILY_ENDS: Final = _words("berg croft ell er field hart ing low man mer ner ow son stone wood y")

FREE_SLOTS: Final[dict[str, tuple[str, ...]]] = {
    "material": _phrases(
        "oak; slate; brick; copper; cast iron; granite; tin; glass; limestone; bronze; pine; steel"
    ),
    "goods": _phrases(
        "wool; salt; barley; lamp oil; paper; honey; rope; leather; dried fish; clay pipes; seed "
        "corn; dyed cloth; candles; timber; apples; linen"
    ),
    "season": _words("spring summer autumn winter"),
    "month": _words(
        "January February March April May June July August September October November December"
    ),
    "side": _words("northern southern eastern western"),
    "job": _phrases(
        "clockmaker; surveyor; schoolteacher; miller; ship's cook; botanist; engraver; bookbinder; "
        "mason; pharmacist; ferryman; weaver; glassblower; judge; organist; cartographer"
    ),
    "people": _phrases(
        "the visitors; the farmers; the students; the sailors; the millers; the older members; the "
        "travellers; the engineers; the teachers; the neighbours; the merchants; the archivists"
    ),
    "quality": _phrases(
        "quiet; costly; unusual; narrow; heavy; reliable; modest; elaborate; stubborn; old; "
        "cheerful; plain; fragile; ingenious; practical; slow"
    ),
    "trouble": _phrases(
        "a flood; a long drought; a fire in the roof; a dispute over tolls; a shortage of coal; "
        "the collapse of a wall; a hard frost; an error in the accounts; a plague of moths; a "
        "landslide"
    ),
    "place": _phrases(
        "the town hall; the old harbour; the market square; a private garden; the reading room; "
        "the upper mill; the railway yard; a chapel on the hill; the customs house; the school "
        "attic"
    ),
    "document": _phrases(
        "a letter; a diary; a tax register; a travel guide; an almanac; a court record; the "
        "minutes of the council; a ship's log; a school essay; a catalogue; an inventory"
    ),
    "change": _phrases(
        "was rebuilt; was measured again; was painted green; was sold; was lent to a museum; was "
        "opened to the public; was moved by ten paces; was described in print; was repaired twice"
    ),
    "belief": _phrases(
        "brings rain; must never be counted; was won in a game of cards; sings before a storm; is "
        "older than the hills; was meant as a joke; keeps mice away; belongs to nobody"
    ),
}
"""Slots that any sentence may have; besides them there are ``town``, ``person``, ``year``, ``few``
(2 to 19) and ``many`` (20 to 980)."""


COMMON_SENTENCES: Final = (
    "In {month} {year} {people} wrote to the council of {town} about it.",
    "{person}, a(n) {job} from {town}, was the first to describe this in detail.",
    "According to {document} of {year}, it cost {many} crowns, which was thought too much.",
    "Since then it has changed hands {few} times.",
    "Some of {people} still say that it {belief}, though nobody can tell where the story began.",
    "The figure of {many} is often repeated, but {document} found in {place} gives {many2}.",
    "{person} counted {many} of them between {month} and {month2} of the same year.",
    "It is mentioned in {document} by {person}, who had lived in {town} for {few} years.",
    "Today about {many} people a year come to see it, most of them in {season}.",
    "When {person} asked for a second opinion, {people} answered that nothing was wrong.",
    "Trade in {goods} and {goods2} paid for most of this.",
    "Between {year} and the end of that century, {few} attempts to improve on it failed.",
    "A(n) {quality} version of the same idea was tried in {town}, with little success.",
    "The {side} part was the last to be finished, because {material} was hard to come by.",
    "In dry years the difference is {few} paces, in wet years it is closer to {few2}.",
    "It took {few} days to carry the {goods} from {place} to {town}.",
    "The older name was given up in {year}, when the maps of the {side} district were redrawn.",
    "Later writers, {person} among them, thought the account of {year} too {quality} to be true.",
    "In {season} the doors are closed, and the {material} is rubbed with oil.",
    "A small museum in {town} shows {few} of the tools, together with {document}.",
    "The rules were written down by {person} and fit on a single sheet of paper.",
)
"""About anything but a person."""

NEUTRAL_SENTENCES: Final = (
    "After {trouble} in {year}, {people} had to wait {few} months before work went on.",
    "A copy made of {material} stands in {place} of {town}.",
    "{people} from {town} contributed {many} hours of work and asked for nothing in return.",
    'What {person} called "the {quality} years" ended with {trouble}.',
    "There is no agreement on the reason; {document} blames {trouble}, and {person} blames "
    "{people}.",
    "{people} prefer to speak of {material} and {goods}, and to leave the rest to others.",
    "Every {few} years {people} meet in {place} to settle what is still open.",
    "{person} kept {document} of these events, which is now in {town}.",
    "Of the {many} drawings that {person} made, only {few} have survived.",
)
"""About whatever happened."""
