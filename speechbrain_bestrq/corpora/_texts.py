"""Sentences for synthetic speech: stories, talk and dialogue, out of templates and lists of words."""

import re

import numpy as np

WORDS = {
    "name": """Martha Oliver Agnes Walter Judith Samuel Ingrid Patrick Helena Duncan Beatrice Raymond Sophie Victor Nora
        Leonard Clara Hugh Miriam Edmund Rosa Gilbert Frances Theo Wilma Jasper Louise Arthur Greta Philip""".split(),
    "person": """miller|schoolmaster|old boatman|young doctor|baker's daughter|judge|gardener|shepherd|captain
        |travelling musician|widow|clerk|stranger|carpenter|postman|cook|farmer's boy|painter|fisherman|night watchman
        |general|merchant|nurse|teacher of music|hunter|neighbour|little girl|shoemaker|porter|bishop""",
    "thing": """lantern|basket of apples|broken clock|letter|wooden chest|silver spoon|bundle of firewood|blue umbrella
        |violin|map|loaf of bread|pair of boots|fishing net|copper kettle|handkerchief|ladder|candle|ring|newspaper
        |bottle of ink|woollen coat|key|cup of tea|box of matches|photograph|hammer|saddle|jar of honey|mirror|ticket
        |painted chair|bag of flour|pocket knife|rusty bicycle|bunch of flowers|book of poems""",
    "place": """garden|market square|edge of the forest|harbour|upper room|village church|bridge|kitchen|valley|station
        |courtyard|school|river bank|stable|library|hilltop|cellar|lighthouse|narrow lane|orchard|mill|post office
        |far side of the lake|dining room|quarry|town hall|cottage|bakery""",
    "quality": """quiet heavy narrow golden foolish gentle bitter curious splendid crooked ancient pale cheerful hollow
        proud damp clever rough distant thirsty strange bright weary lonely brave sharp smooth humble yellow cold
        """.split(),
    "manner": """slowly|quietly|gladly|carefully|at last|without a word|in great haste|with a smile|once more
        |very early|by accident|as usual|against all advice|for the third time|with both hands""",
    "when": """in the morning|before sunrise|late that evening|on the first of March|after the storm|every Thursday
        |during the long winter|at noon|a week later|towards the end of summer|when the bells rang|that same night
        |in the year of the flood|as soon as the rain stopped|just after supper|one Sunday in October""",
    "took": """carried|found|lost|sold|hid|borrowed|examined|dropped|brought|noticed|wrapped|mended|threw away|bought
        |painted|kept|forgot|measured|praised|refused|remembered|pushed|stole|gave back""",
    "went": """walked|hurried|climbed|returned|wandered|rode|went|crept|ran|drove|sailed|marched""",
    "felt": """was afraid|laughed aloud|fell asleep|said nothing|could not sleep|began to sing|looked up
        |felt a little better|changed the subject|grew impatient|looked away|thought of home|waited for an answer
        |turned as white as chalk|kept the secret|hoped for the best""",
    "scene": """the wind blew from the north|snow lay on the roofs|the fire had gone out|nobody answered the door
        |the dogs were barking|the water was deep and clear|a bell rang twice|the road was full of people
        |there was no bread in the house|the moon rose over the hills|it had rained for three days
        |the windows were dark|all the shops were shut|the children were playing outside|smoke hung above the town
        |the last train had gone|the grass was wet|two ships lay at anchor|the ice began to crack|the lamps were lit""",
    "link": "and|but|because|while|although|so|until|before|for|as",
    "topic": """the theatre|my first film|football|the new album|growing up by the sea|cooking for friends
        |long journeys|politics|the second season|training every day|writing at night|working with children
        |the whole campaign|old jazz records|living abroad|the script|that famous interview|the charity
        |learning to drive|my grandmother""",
    "view": """it changes how you see yourself|you never really know what comes next|we were incredibly lucky
        |people forget how hard it is|I would do it all again|there is always someone better|the crew made it easy
        |it took about five years|nobody expected anything from us|I still get nervous|you have to trust each other
        |it was mostly a question of timing|we argued about every single line|the money was never the reason
        |I learned more from losing|it keeps me awake|they asked me twice|I can't watch it any more
        |everything happened at once|my family kept me going""",
    "opener": """well|you know|to be honest|I mean|look|that's a good question|actually|funnily enough|of course
        |yes""",
    "year": "nineteen eighty six|nineteen ninety one|two thousand and four|two thousand and twelve|last year",
    "remark": """I told you about it yesterday|you could have called me|they moved the date again
        |we are leaving at eight|the letter came this morning|I put it on the table|that is what she said
        |you were standing right there|nobody has seen the keys|he is waiting in the car|I have been here since five
        |we don't have to decide now|it's the same every time|they are going to sell the house
        |she didn't come back|I have read all of it
        |there are two people outside|you know how he is|the phone rang all night|it was on the front page
        |we have been through this before|somebody left the door open|I thought you knew|he wants to see us both""",
    "reply": """all right|I don't know|tell me again|listen to me|wait a minute|that's it|oh|come on|I see|what is it
        |are you sure|you heard me|not now|sit down|let me think|I know""",
    "matter": """the wedding|the money|my brother|the operation|your new job|the apartment|the dog|that woman
        |the airport|the exam|the accident|our holiday|the baby|the licence|the neighbours""",
}  # fmt: skip

TEMPLATES = {
    "story": (
        "{name} {took} {the} {quality} {thing} {when}",
        "{the} {person} {took} {the} {thing}",
        "{when} {name} {went} to the {place}",
        "{the} {quality} {person} {went} to the {place} {manner}",
        "{scene}",
        "{name} {felt}",
        "{the} {person} {felt} {when}",
        "near the {place} {scene}",
        "{name} asked {the} {person} about {the} {thing}",
        "{the} {thing} in the {place} was {quality} and {quality}",
        "neither {name} nor {name} knew that {scene}",
        "{the} {person} and {the} {person} {went} to the {place}",
    ),
    "talk": (
        "{view}",
        "{opener} {view}",
        "when it comes to {topic} {view}",
        "{topic} was different because {view}",
        "in {year} {view}",
        "I always loved {topic}",
        "for me it was never about {topic}",
        "what I remember about {topic} is that {view}",
        "{opener} people ask me about {topic} all the time",
        "{name} told me that {view}",
        "we talked about {topic} and about {topic}",
    ),
    "dialogue": (
        "{remark}",
        "{reply}",
        "{reply} {remark}",
        "it is about {matter}",
        "{name} asked about {matter} and {remark}",
        "{remark} because of {matter}",
        "I know what happened with {matter}",
        "I heard about {matter} from {name}",
    ),
}


def _split(words: str | list[str]) -> tuple[str, ...]:
    return tuple(words if isinstance(words, list) else (" ".join(word.split()) for word in words.split("|")))


_LISTS = {slot: _split(words) for slot, words in WORDS.items()} | {"the": ("the", "the", "a")}


def choose(generator: np.random.Generator, options: tuple[str, ...]) -> str:
    """Draw one of some texts."""
    return options[int(generator.integers(len(options)))]


def fill(template: str, lists: dict[str, tuple[str, ...]], generator: np.random.Generator) -> str:
    """Put words into a template's slots, and "an" for "a" before a vowel."""
    text = re.sub(r"\{(\w+)\}", lambda slot: choose(generator, lists[slot[1]]), template)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def compose(kind: str, words: int, generator: np.random.Generator) -> str:
    """Make a text of about so many words.

    Arguments
    ---------
    kind : str
        ``story``, ``talk`` or ``dialogue``.
    words : int
        Clauses are added until there are so many; one clause has at most 16.
    generator : numpy.random.Generator
        Where chance comes from.

    Returns
    -------
    str
        One or more sentences, with capitals and punctuation.

    Example
    -------
    >>> compose("dialogue", 6, np.random.default_rng(3))
    'I know what happened with the money.'
    """
    text = ""
    while True:
        clause = fill(choose(generator, TEMPLATES[kind]), _LISTS, generator)
        chance = generator.random()
        if not text or chance < 0.35:
            text += (". " if text else "") + clause[0].upper() + clause[1:]
        else:
            text += f", {choose(generator, _LISTS['link'])} {clause}" if chance < 0.9 else f"; {clause}"
        if len(text.split()) >= words:
            return text + "."


def transcript(text: str) -> str:
    """Turn a text into LibriSpeech's form.

    Example
    -------
    >>> transcript("The baker's daughter laughed aloud, but Rosa fell asleep.")
    "THE BAKER'S DAUGHTER LAUGHED ALOUD BUT ROSA FELL ASLEEP"
    """
    return " ".join(re.findall(r"[A-Z']+", text.upper()))
