"""Verse to send to a server: fourteen lines at a time, from a small grammar and a seed.

The paper sends Shakespeare's sonnets. These have the length of those (about 115 words) and their
rhyme scheme; what they say does not matter. No two of one call begin alike, so that nothing can be
shared between prompts.
"""

import random
from pathlib import Path

SCHEME = "ababcdcdefefgg"

RHYMES = (
    ("day", "clay", "May", "decay", "bay", "delay", "way"),
    ("night", "light", "sight", "flight", "height", "delight"),
    ("stone", "throne", "bone", "moan", "loan", "tone"),
    ("sea", "tree", "bee", "key", "plea", "decree", "knee"),
    ("air", "hair", "despair", "stair", "prayer", "chair"),
    ("rain", "grain", "chain", "pain", "lane", "disdain"),
    ("gold", "cold", "fold", "mould", "hold"),
    ("fire", "desire", "wire", "choir", "lyre", "spire"),
    ("heart", "art", "chart", "part", "dart", "cart"),
    ("wing", "spring", "king", "string", "ring", "thing"),
    ("shore", "door", "floor", "war", "store", "oar"),
    ("flower", "hour", "tower", "power", "shower", "bower"),
    ("name", "flame", "shame", "frame", "fame", "game"),
    ("snow", "crow", "woe", "foe", "glow", "bow"),
)
WORDS = {
    kind: words.split()
    for kind, words in {
        "adjective": (
            "amber ancient barren bitter bold brief bright broken careless common crooked "
            "crystal dusty eager early empty faded fair faithful false fearful foolish frozen "
            "gentle golden green hidden hollow humble idle lonely lovely mellow narrow noble "
            "pale patient proud quiet ragged restless sacred secret silver simple sleepless "
            "slender sober stubborn sudden tender timid weary wild"
        ),
        "plural": (
            "apples ashes autumns banners blossoms candles children crowns debts dreams echoes "
            "embers eyes feathers fields footsteps gardens ghosts harbours harvests hours "
            "lanterns leaves letters lovers meadows mirrors mornings oaths orchards painters "
            "pilgrims promises ravens rivers roses sailors scholars shadows shepherds sparrows "
            "stars storms strangers summers swallows thorns tides tongues travellers troubles "
            "valleys verses violins voices waves willows winters wishes"
        ),
        "verb": (
            "adorn answer borrow break bury carry conceal count cross defy despise devour dream "
            "echo envy follow forget forgive gather guard hear honour keep know leave lend "
            "measure mourn outlive paint praise remember repay rule seek serve shelter steal "
            "summon trust unlock visit warm weigh"
        ),
        "singular": (
            "April beauty candour childhood courage doubt fortune grief honesty hunger justice "
            "kindness laughter love memory mercy midnight music nature patience pride reason "
            "silence sleep slumber sorrow summer time truth twilight virtue winter wisdom "
            "wonder youth"
        ),
    }.items()
}
PATTERNS = (
    "When {adjective} {plural} {verb} the {adjective} {end}",
    "And {singular} must {verb} the {plural} of the {end}",
    "O {adjective} {singular}, why {verb} my {end}",
    "Yet all my {plural} {verb} thy {adjective} {end}",
    "Shall {plural} and {plural} {verb} no {adjective} {end}",
    "Nor do the {plural} {verb} thee for thy {end}",
    "Till {singular} itself shall {verb} the {adjective} {end}",
    "So {adjective} {plural} {verb}, and so my {end}",
    "For what is {singular} but {plural} and a {end}",
    "Where {plural} {verb} and {adjective} {plural} {verb} the {end}",
    "Thy {singular} and my {singular} {verb} one {end}",
    "If {adjective} {plural} could {verb} but a {end}",
    "But I, whom {adjective} {plural} {verb}, have {singular} and {end}",
    "And {plural} {verb} what {plural} {verb} in the {end}",
)


def verses(count: int, seed: int | str) -> list[str]:
    """`count` poems of fourteen lines, the same for the same seed; all first lines differ."""
    rng = random.Random(f"verse {seed}")
    poems: list[str] = []
    openings: set[str] = set()
    while len(poems) < count:
        poem = _poem(rng)
        opening = poem.split("\n", 1)[0]
        if opening not in openings:
            openings.add(opening)
            poems.append(poem)
    return poems


def read_verses(path: Path) -> list[str]:
    """The texts of a file, blank lines between them.

    Raises:
        ValueError: there is none.
        OSError: the file cannot be read.
    """
    blocks = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n")
    poems = [block.strip() for block in blocks if block.strip()]
    if not poems:
        raise ValueError(f"{path}: no text in it; expected poems with blank lines between them")
    return poems


def _poem(rng: random.Random) -> str:
    rhymes = dict(zip(dict.fromkeys(SCHEME), rng.sample(RHYMES, len(set(SCHEME))), strict=True))
    ends = {letter: rng.sample(words, SCHEME.count(letter)) for letter, words in rhymes.items()}
    marks = [",", ",", ",", ";"] * 3 + [",", "."]
    lines = [_line(rng, ends[letter].pop()) for letter in SCHEME]
    return "\n".join(line + mark for line, mark in zip(lines, marks, strict=True))


def _line(rng: random.Random, end: str) -> str:
    words = []
    for word in rng.choice(PATTERNS).split():
        bare = word.strip("{},")
        choice = end if bare == "end" else rng.choice(WORDS[bare]) if bare in WORDS else bare
        words.append(choice + "," * word.endswith(","))
    return " ".join(words)
