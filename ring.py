"""The ring: which broker comes after which. And the city: places, roads and stations.

        server1 --next--> server2 --next--> server3
           ^                                   |
           +----------------next---------------+

The ring is a circular linked list: each broker knows the next one, and the last one's
next is the first. A broker without a free spot asks the next broker, then the one after
that, until one says yes, time is up, or the walk is back where it began.

The second chapter checks what others wrote: `fit` compares it with a shape. The third
one reads servers.json, the city, and finds the shortest ways on its roads.

Read next: cloud_server.py, which walks this ring.
Left out on purpose: brokers that join or leave while the city runs.
"""

import functools
import heapq
import json
import math
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Callable, NamedTuple

SERVERS = Path(__file__).with_name("servers.json")
BROKER_WAIT = 1.5   # s for one broker's answer; of these its stations may take 1 s
WALK_WAIT = 3.5     # s for a whole walk


# --- The circular linked list ---------------------------------------------------------

class Broker:
    """One node of the ring."""
    def __init__(self, name, host, mqtt, http, tcp):
        self.name = name
        self.host = host
        self.mqtt = mqtt            # the port of its door for stations and cars,
        self.http = http            # of the one for people, and (with the host)
        self.address = host, tcp    # the one for the cloud and the other brokers
        self.next = None            # see `link`


def link(brokers):
    """Make a circular linked list. Returns {name: broker}, in the same order."""
    for n, broker in enumerate(brokers):
        brokers[n - 1].next = broker        # before the first one comes the last one
    return {broker.name: broker for broker in brokers}


def walk(home):
    """Yields each other broker once, from the next one on, and the seconds to wait for
    its answer, until WALK_WAIT is over. Whoever walks stops at the first offer."""
    end = monotonic() + WALK_WAIT
    broker = home.next
    while broker is not home and monotonic() < end:
        yield broker, min(BROKER_WAIT, end - monotonic())
        broker = broker.next


# --- Checking what others wrote -------------------------------------------------------
# A shape looks like the messages that fit it: {"use": USE, "id?": ID} fits
# {"use": "held"}, where USE and ID say what the values must be. These are all shapes:
#
#     NAME                       one value, of a kind that passes a test
#     [NAME]                     a list of such values
#     (NAME,)                    such a value, or null
#     {NAME: USE}                an object with such keys and such values
#     {"id?": ID, "at": NAME}    an object with these fields; one with ? may be missing,
#                                and a field that the shape does not know is dropped

class Invalid(ValueError):
    """What came is not what it must be, or nothing came: the text says why."""


class Kind(NamedTuple):
    words: str          # what it must be, for the error message
    holds: Callable     # the test: value -> bool


def need(condition, why: str):
    if not condition:
        raise Invalid(why)


def fit(shape, value, what: str):
    """`value`, reduced to what its shape knows. Raises Invalid, which names the fault.
    This checks untrusted input; our own invariants are covered by tests."""
    if isinstance(shape, Kind):
        if not shape.holds(value):      # (so no text is made where all is well)
            raise Invalid(f"{what} must be {shape.words}")
        return value
    if isinstance(shape, list):
        need(isinstance(value, list), f"{what} must be a list")
        return [fit(shape[0], item, what) for item in value]
    if isinstance(shape, tuple):
        return None if value is None else fit(shape[0], value, what)
    need(isinstance(value, dict), f"{what} must be an object")
    found = {}
    for field, inner in shape.items():
        if isinstance(field, Kind):         # {NAME: USE}; it stands alone
            return {fit(field, name, what): fit(inner, item, f"{what}.{name}")
                    for name, item in value.items()}
        name = field.rstrip("?")
        if name in value:
            found[name] = fit(inner, value[name], f"{what}.{name}")
        else:
            need("?" in field, f"{what}.{name} is missing")
    return found


def read_json(text: bytes, pairs=None):
    """The value of a JSON text in UTF-8. Raises Invalid for whatever is not one.
    `pairs` makes something other than a dict of an object's (key, value) pairs."""
    try:
        return json.loads(str(text, "utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as fault:
        # Bad UTF-8, bad JSON, a number of 5,000 digits; or it is nested too deep.
        raise Invalid(f"bad JSON: {fault}") from None


def read_object(text: bytes) -> dict:
    value = read_json(text)
    need(isinstance(value, dict), "not a JSON object")
    return value


def to_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def printable(words: str, longest: int, without="") -> Kind:
    """Text without control characters or lone surrogates: they are not printable."""
    def is_printable(value):
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            return False
        for character in without:
            if character in value:
                return False
        return value.isprintable()
    return Kind(words, is_printable)


def number(words: str, low: float, high: float, types=(int, float)) -> Kind:
    """NaN does not pass, as it compares false with all; nor does True, which Python
    takes for 1."""
    def is_between(value):
        return type(value) in types and low <= value <= high
    return Kind(words, is_between)


def whole(low: int, high: int) -> Kind:
    return number(f"a whole number from {low} to {high}", low, high, [int])


def one_of(*texts: str) -> Kind:
    return Kind(" or ".join(texts), lambda value: value in texts)


# A name becomes a level of MQTT topics, a client id, and a word in the log.
NAME = printable("a name: 1 to 64 printable characters without / + #", 64, "/+#")
ID = printable("1 to 64 printable characters", 64)
KM = number("a number of km", 0, 1e9)
PERCENT = number("a number from 0 to 100", 0, 100)
COUNTER = whole(0, 2**53)
SPOTS = whole(1, 200)


# --- The city -------------------------------------------------------------------------

def is_host(text) -> bool:
    with suppress(UnicodeError):
        if isinstance(text, str) and text.isprintable():
            return text.encode("idna") != b""   # as the resolver does first
    return False


COORDINATE = number("a finite number of km", -1e150, 1e150)
HOST = Kind("a host name or an address", is_host)
PORT = whole(1, 65535)
FILE = {    # servers.json
    "cloud": {"host": HOST, "port": PORT},
    "brokers": [{
        "name": NAME,
        "host": HOST,
        "mqtt": PORT,       # its ports
        "http": PORT,
        "tcp": PORT,
    }],
    "places": {NAME: {
        "at": [COORDINATE],
        "broker": NAME,
        "spots?": SPOTS,    # this makes a station of it
    }},
    "roads": [[NAME]],
}


class Way(NamedTuple):
    km: float
    route: list[str]    # from the start to the place: ["A", "C", "P3"]


class City:
    """What servers.json says. Nobody ever changes it, so every thread may read it."""
    def __init__(self, data):
        cloud = data["cloud"]
        self.cloud = cloud["host"], cloud["port"]       # its address
        self.places = data["places"]    # {"P1": {"at": [1, 1], "broker": "server1", ...
        self.roads = data["roads"]      # [["A", "P1"], ...]
        self.ring = link([Broker(**entry) for entry in data["brokers"]])
        # Each place's neighbours, and how far they are (km; roads are straight).
        self.neighbours = {place: {} for place in self.places}
        for a, b in self.roads:
            self.neighbours[a][b] = self.neighbours[b][a] = self.km(a, b)

    def km(self, a, b):
        return math.dist(self.places[a]["at"], self.places[b]["at"])

    def broker_of(self, place):
        return self.ring[self.places[place]["broker"]]

    def stations(self, broker=None):
        """The names of the stations, of all or of one broker's region."""
        return [name for name, place in self.places.items()
                if "spots" in place and broker in (None, place["broker"])]

    @functools.cache    # roads never change, so we search once from each start
    def ways(self, start):
        """Dijkstra's algorithm: the shortest way from `start` to each station that can
        be reached, the nearest one first."""
        found = {}
        frontier = [Way(0.0, [start])]      # a heap: its least tuple, the shortest way
        while frontier:
            way = heapq.heappop(frontier)
            here = way.route[-1]
            if here not in found:
                found[here] = way
                for place, km in self.neighbours[here].items():
                    route = [*way.route, place]
                    heapq.heappush(frontier, Way(way.km + km, route))
        return {place: found[place] for place in found if "spots" in self.places[place]}

    def within_range(self, start, km):
        """The ways to the stations that are at most `km` away, the nearest one first:
        {"P3": Way(7.335, ["A", "C", "P3"]), ...}."""
        return {name: way for name, way in self.ways(start).items()
                if way.km <= km}


def load(path):
    """Read and check a servers.json. Raises Invalid, naming the file and the fault."""
    try:
        data = fit(FILE, read_json(Path(path).read_bytes(), unique_keys),
                   "the file")
        check_city(data)
    except (OSError, Invalid) as fault:
        raise Invalid(f"{path}: {fault}") from None
    return City(data)


def unique_keys(pairs: list) -> dict:
    found = dict(pairs)
    need(len(found) == len(pairs),
         f"a key is given twice, one of {list(found)!s:.99}")
    return found


def check_city(data: dict):
    """What the shape of the file cannot say."""
    places = data["places"]
    brokers = [entry["name"] for entry in data["brokers"]]
    need(brokers and places, "there must be brokers and places")
    for name in brokers:
        need([*brokers, *places].count(name) == 1,
             f"{name} is given twice")
    for name, place in places.items():
        need(len(place["at"]) == 2,
             f"place {name}: at must be two numbers")
        need(place["broker"] in brokers,
             f"place {name}: its broker is unknown")
    for road in data["roads"]:
        ends = places.keys() & road         # each of the map's places among them, once
        need(len(road) == len(ends) == 2,
             f"a road must join two places of the map: {road}")
