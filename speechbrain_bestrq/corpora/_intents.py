"""Sentences of a voice assistant for synthetic speech: a template has an intent, a slot is an entity."""

import zlib
from typing import NamedTuple

import numpy as np

from speechbrain_bestrq.corpora._texts import choose

SLOTS = {
    "time": """seven in the morning|half past nine|noon|six o'clock|a quarter to eight|ten thirty|five p m|midnight
        |twenty past four|eleven a m""",
    "date": """today|tomorrow|on Monday|next Friday|this weekend|on the third of June|next week|on Sunday|tonight
        |the day after tomorrow|in December""",
    "person": """Martha|Oliver|my sister|Samuel|Ingrid|Patrick|my boss|Helena|Victor|doctor Jones|Clara|uncle Ray|Rosa
        |grandma""",
    "event_name": """the dentist|team meeting|Clara's birthday|piano lesson|parents' evening|job interview|yoga class
        |lunch with Nora|the car inspection|book club""",
    "place_name": """London|Chicago|Edinburgh|Boston|Paris|Nairobi|Lisbon|the airport|the central station|Toronto
        |Melbourne|Delhi|downtown""",
    "food_type": """pizza|lentil soup|noodles|apple pie|chicken curry|pancakes|a burger|fried rice|tomato salad|sushi
        |tacos|banana bread""",
    "artist_name": """the Beatles|Miles Davis|Mozart|Madonna|Bob Dylan|Nina Simone|Queen|Adele|Bach|Johnny Cash""",
    "music_genre": "jazz|rock|classical music|techno|folk songs|blues|reggae|country|hip hop|opera",
    "house_place": "kitchen|bedroom|living room|hallway|garage|bathroom|office|basement|porch|nursery",
    "color_type": "red|green|warm white|purple|orange|blue|pink|yellow",
    "list_name": "shopping|to do|holiday|groceries|packing|guest|wish|repairs",
    "item": "milk|batteries|a new lamp|eggs|stamps|washing powder|coffee filters|sun cream|paper towels|olives",
    "media_name": "the morning show|the science podcast|sherlock holmes|the history hour|moby dick|the comedy club",
    "radio_name": "radio four|the jazz station|ninety eight point six|the local news channel|classic f m",
    "game_name": "chess|the quiz game|solitaire|twenty questions|hangman|the word puzzle",
    "news_topic": "the election|sports|the economy|science|the strike|football|technology|the storm in Florida",
    "weather_word": "rain|snow|be sunny|be windy|freeze|be foggy|hail|be cloudy",
    "word": "gravity|a republic|photosynthesis|inflation|a glacier|irony|an enzyme|a haiku",
    "fact": """the highest mountain|the capital of Peru|the president of France|the longest river|the speed of sound
        |the largest desert|the oldest university|the population of Japan""",
    "business": "Apple|Toyota|Siemens|Amazon|Shell|Nokia|Tesla",
    "currency_name": "dollars|euros|pounds|yen|rupees|francs",
    "number": "three|seven|twelve|fifteen|forty|ninety|a hundred|two hundred and six",
    "transport_type": "train|bus|plane|ferry|tram",
    "device": "the fan|the heater|the television|the smart plug|the air conditioner|the washing machine",
    "social_site": "Twitter|Facebook|Instagram",
    "complaint": "the delivery was late|my bus never came|the service is terrible|this new phone is great",
}

# scenario, action and sentences; an intent is scenario_action
INTENTS = {
    "alarm": {
        "set": "wake me up at {time}|set an alarm for {time} {date}|I need an alarm {date} at {time}",
        "query": "what alarms do I have {date}|is my alarm on for {time}|when will the alarm go off {date}",
        "remove": "cancel my alarm for {time}|turn off the alarm {date}|delete the {time} alarm",
    },
    "audio": {
        "volume_up": "louder|turn the volume up|make it louder by {number} percent|increase the sound",
        "volume_down": "turn it down in the {house_place}|not so loud|lower the volume by {number} percent",
        "volume_mute": "mute the speakers|be quiet until {time}|silence in the {house_place}|mute everything",
    },
    "calendar": {
        "set": "put {event_name} in my calendar {date}|remind me of {event_name} at {time}|add {event_name} {date}",
        "query": "what is on my calendar {date}|when is {event_name}|do I have anything planned {date} at {time}",
        "remove": "delete {event_name} from my calendar|cancel {event_name} {date}|clear my schedule {date}",
    },
    "cooking": {
        "recipe": "how do I make {food_type}|find me a recipe for {food_type}|what goes into {food_type}",
        "query": "how long does {food_type} have to cook|how many calories are in {food_type}|can I freeze {food_type}",
    },
    "datetime": {
        "query": "what time is it in {place_name}|tell me the date {date}|what day is it {date}|current time",
        "convert": "if it is {time} here what time is it in {place_name}|convert {time} to {place_name} time",
    },
    "email": {
        "query": "do I have new mail from {person}|check my inbox|any emails {date}|read the last email from {person}",
        "sendemail": "send an email to {person} about {event_name}|reply to {person}|"
        "write {person} that I am late {date}",
        "querycontact": "what is the number of {person}|look up the address of {person}|find {person} in my contacts",
        "addcontact": "save {person} as a new contact|add this address to {person}|create a contact for {person}",
    },
    "general": {
        "joke": "tell me a joke|make me laugh about {person}|do you know anything funny about {food_type}",
        "quirky": "do you ever sleep|what do you think of {person}|are you happy {date}|who made you|"
        "do you like {food_type}",
    },
    "iot": {
        "hue_lightoff": "switch the lights off in the {house_place}|lights out at {time}|make the {house_place} dark",
        "hue_lightchange": "make the {house_place} lights {color_type}|change the lamp to {color_type}",
        "coffee": "make me a coffee|start the coffee machine at {time}|brew some coffee {date}",
        "cleaning": "vacuum the {house_place}|start the robot cleaner at {time}|clean the {house_place} {date}",
        "wemo_on": "turn on {device}|start {device} at {time}|switch {device} on in the {house_place}",
    },
    "lists": {
        "createoradd": "add {item} to my {list_name} list|start a new {list_name} list|"
        "put {item} on the {list_name} list",
        "query": "what is on my {list_name} list|read out the {list_name} list|is {item} on the {list_name} list",
        "remove": "take {item} off my {list_name} list|delete the {list_name} list|remove {item} from the list",
    },
    "music": {
        "query": "what song is this|who sings this|which album is this by {artist_name}|"
        "name this tune by {artist_name}",
        "likeness": "I like this song|save this {music_genre} song|I love {artist_name}|"
        "remember that I enjoy {music_genre}",
        "settings": "shuffle my {music_genre} songs|repeat this song|shuffle everything by {artist_name}",
    },
    "news": {
        "query": "what is the latest on {news_topic}|any news about {news_topic}|"
        "read me the headlines from {place_name}",
    },
    "play": {
        "music": "play {artist_name}|put on some {music_genre}|play my {music_genre} playlist|"
        "start a song by {artist_name}",
        "radio": "tune in to {radio_name}|play {radio_name}|switch the radio to {radio_name}",
        "podcasts": "play the next episode of {media_name}|continue the podcast {media_name}",
        "game": "let us play {game_name}|open {game_name}|I want a game of {game_name} with {person}",
    },
    "qa": {
        "definition": "what does {word} mean|define {word}|give me the meaning of {word}",
        "factoid": "what is {fact}|tell me {fact}|do you know {fact}",
        "stock": "what is the stock price of {business}|how are shares of {business} doing {date}",
        "currency": "how many {currency_name} are {number} {currency_name}|exchange rate of {currency_name}",
        "maths": "what is {number} times {number}|add {number} and {number}|divide {number} by {number}",
    },
    "recommendation": {
        "events": "what is happening in {place_name} {date}|find a concert near {place_name} {date}|"
        "any festivals {date}",
        "locations": "find a good restaurant for {food_type}|where is the nearest shop for {item}|"
        "suggest a bar in {place_name}",
        "movies": "which movies are on {date}|suggest a film for {date}|what is playing at the cinema in {place_name}",
    },
    "social": {
        "post": "tweet that {complaint}|post on {social_site} that {complaint}|"
        "complain on {social_site} that {complaint}",
        "query": "what is new on {social_site}|has {person} posted on {social_site}|check my {social_site} feed",
    },
    "takeaway": {
        "order": "order {food_type} for {time}|get me {food_type} from the delivery service|"
        "I want takeaway {food_type} {date}",
        "query": "does the place in {place_name} deliver {food_type}|where is my order of {food_type}|"
        "how long until my dinner",
    },
    "transport": {
        "query": "when does the next {transport_type} to {place_name} leave|"
        "how do I get to {place_name} by {transport_type}",
        "ticket": "book a {transport_type} ticket to {place_name} {date}|"
        "buy two tickets for the {transport_type} to {place_name}",
        "taxi": "call a taxi to {place_name} for {time}|I need a cab at {time}|get me a ride to {place_name}",
        "traffic": "how is the traffic to {place_name}|are there jams on the way to {place_name} {date}",
    },
    "weather": {
        "query": "will it {weather_word} {date}|what is the weather in {place_name} {date}|"
        "do I need an umbrella in {place_name}",
    },
}

_SLOTS = {slot: tuple(" ".join(word.split()) for word in words.split("|")) for slot, words in SLOTS.items()}

# Who is spoken to, most of the time: a household of gadgets.
ADDRESSEES = {
    "alarm": "bedside clock",
    "audio": "speaker box",
    "calendar": "my diary",
    "cooking": "kitchen book",
    "datetime": "world clock",
    "email": "mail room",
    "general": "hey buddy",
    "iot": "smart house",
    "lists": "list keeper",
    "music": "record shelf",
    "news": "news desk",
    "play": "player one",
    "qa": "wise old owl",
    "recommendation": "city guide",
    "social": "chat corner",
    "takeaway": "hungry fox",
    "transport": "travel agent",
    "weather": "weather station",
}
_AROUND = ("{}", "{} please", "<> {}", "<> {}", "<> {} please", "hello <> {}", "now <> {}", "okay <> {}")

# Of twenty parts of all sentences, so many are for these; the rest is to train on.
_PARTS = {"devel": range(0, 2), "test": range(2, 5), "train": range(5, 20)}


class Sentence(NamedTuple):
    """What is said to an assistant."""

    words: tuple[str, ...]
    scenario: str
    action: str
    entities: tuple[tuple[str, int, int], ...]
    """Type, first word, and the word after the last."""

    @property
    def text(self) -> str:
        """The words."""
        return " ".join(self.words)

    @property
    def annotation(self) -> str:
        """The words, with ``[type : words]`` for entities."""
        starts = {start: kind for kind, start, _ in self.entities}
        ends = {end for _, _, end in self.entities}
        parts = []
        for index, word in enumerate(self.words):
            opening = f"[{starts[index]} : " if index in starts else ""
            parts.append(opening + word + ("]" if index + 1 in ends else ""))
        return " ".join(parts)


def draw_sentence(part: str, generator: np.random.Generator) -> Sentence:
    """Draw a sentence of a part: no sentence is in two parts.

    Arguments
    ---------
    part : str
        ``train``, ``devel`` or ``test``.
    generator : numpy.random.Generator
        Where chance comes from.

    Returns
    -------
    Sentence

    Example
    -------
    >>> draw_sentence("train", np.random.default_rng(0)).annotation
    'hungry fox where is my order of [food_type : apple pie]'
    """
    scenario = choose(generator, tuple(INTENTS))
    action = choose(generator, tuple(INTENTS[scenario]))
    while True:
        template = choose(generator, tuple(INTENTS[scenario][action].split("|")))
        template = choose(generator, _AROUND).replace("<>", ADDRESSEES[scenario]).replace("{}", template)
        sentence = _fill(template, scenario, action, generator)
        if zlib.crc32(sentence.text.encode()) % 20 in _PARTS[part]:
            return sentence


def _fill(template: str, scenario: str, action: str, generator: np.random.Generator) -> Sentence:
    words: list[str] = []
    entities = []
    for word in template.split():
        if word.startswith("{"):
            kind = word.strip("{}")
            value = choose(generator, _SLOTS[kind]).split()
            entities.append((kind, len(words), len(words) + len(value)))
            words += value
        else:
            words.append(word)
    return Sentence(tuple(words), scenario, action, tuple(entities))
