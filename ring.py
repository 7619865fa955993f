"""The ring: which broker comes after which, and the map of the city.

        server1 --next--> server2 --next--> server3
           ^                                   |
           +----------------next---------------+

A circular linked list: each broker knows the next one, and the last one's next is the
first. Whoever has no free spot asks the next broker, then that one's next, until
somebody says yes or the walk is back where it began: nobody is missed, nobody is asked
twice. This file also checks what others wrote: servers.json, the one file that
describes the city, and every JSON text from the network. It opens no socket.

Read next: cloud_server.py, which walks this ring for the brokers.
Left out on purpose: brokers that join or leave while the city runs.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

SERVERS = Path(__file__).with_name("servers.json")
ASK = 1.5   # s to wait for one broker's answer; its own stations have 1.2 s to give it
WALK = 4.0  # s for the whole walk: whoever asked the cloud waits for 4.5 s
FINITE = sys.float_info.max     # what is greater is infinite


# --- The circular linked list ---------------------------------------------------------

class Broker:
    """One node of the ring: a broker's name, its addresses, and the next broker."""

    def __init__(self, name: str, host: str, mqtt: int, http: int, tcp: int):
        self.name, self.host = name, host
        self.mqtt, self.http, self.tcp = mqtt, http, tcp
        self.next = self    # a ring of one: it is its own neighbour


class Ring:
    """A circular linked list of brokers. Iterating goes round once, from the first."""

    def __init__(self):
        self.last: Broker | None = None     # its next is the first

    def append(self, broker: Broker) -> None:
        """Put the broker between the last one and the first."""
        if self.last:
            broker.next, self.last.next = self.last.next, broker
        self.last = broker

    def __iter__(self) -> Iterator[Broker]:
        node = self.last
        while node:
            yield node.next
            node = node.next if node.next is not self.last else None

    def find(self, name: str) -> Broker | None:
        return next((node for node in self if node.name == name), None)


def walk(home: Broker, ask: Callable[[Broker, float], dict | None],
         seconds: float = WALK) -> tuple[dict | None, list[str]]:
    """Ask each broker after `home` in turn until one says yes or the round is over.

    `ask(broker, seconds)` returns an offer, a refusal, or None for no answer in time.
    Returns the offer, or else the last refusal (None: nobody answered), and the names
    of all who were asked, in order. Takes at most `seconds`.
    """
    end = time.monotonic() + seconds
    refusal, asked, node = None, [], home.next
    while node is not home and (left := end - time.monotonic()) > 0:
        asked.append(node.name)
        answer = ask(node, min(ASK, left))
        if answer and answer.get("station"):
            return answer, asked
        refusal = answer or refusal
        node = node.next
    return refusal, asked


# --- Checking what others wrote -------------------------------------------------------

def need(condition, fault: str, error: type = ValueError) -> None:
    """What must be true of what others wrote; for what we wrote, tests."""
    if not condition:
        raise error(fault)


def read_json(text: bytes | str, pairs: Callable | None = None):
    """The value of a JSON text in UTF-8. Raises ValueError for whatever is not one.

    `pairs` makes something else than a dict of an object's (name, value) pairs.
    """
    try:
        text = text if isinstance(text, str) else str(text, "utf-8")
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:      # of the text's making: no fault of ours
        raise ValueError("nested too deep") from None


def read_object(text: bytes | str) -> dict:
    """The same, for a JSON object."""
    value = read_json(text)
    need(isinstance(value, dict), "not a JSON object")
    return value


def is_name(text) -> bool:
    """Fit to be a name: it becomes a level of MQTT topics, a client id, a log line."""
    return (isinstance(text, str) and 1 <= len(text) <= 64 and text.isprintable()
            and not set(text) & set("/+#"))


def is_number(value, low: float, high: float) -> bool:
    """A number from low to high. NaN is none, nor are True and False (Python's are)."""
    return type(value) in (int, float) and low <= value <= high


# --- servers.json ---------------------------------------------------------------------

@dataclass(frozen=True)
class City:
    """What servers.json says, checked. Nobody ever changes it."""
    cloud: tuple[str, int]      # host, port
    ring: Ring
    places: dict[str, dict]     # {"P1": {"at": [1, 1], "broker": "server1", ...
    roads: list[list[str]]      # [["A", "P1"], ...]

    def km(self, a: str, b: str) -> float:
        """The straight distance between two places."""
        return math.dist(self.places[a]["at"], self.places[b]["at"])

    def stations(self, broker: str | None = None) -> list[str]:
        """The names of the stations, of all or of one broker's region."""
        return [name for name, place in self.places.items()
                if "spots" in place and broker in (None, place["broker"])]


def load(path) -> City:
    """Read and check a servers.json. Raises ValueError naming the file and fault."""
    try:
        data = read_json(Path(path).read_bytes(), unique_keys)
        need(isinstance(data, dict), "the file must hold one JSON object")
        for key, kind in {"cloud": dict, "brokers": list, "places": dict,
                          "roads": list}.items():
            need(isinstance(data.get(key), kind), f'"{key}" must be a {kind.__name__}')
        ring = read_brokers(data["brokers"])
        check_places(data["places"], ring)
        check_roads(data["roads"], data["places"])
        cloud = read_address(data["cloud"], "the cloud", "port")
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise ValueError(f"{path}: {why}") from None
    return City(cloud, ring, data["places"], data["roads"])


def unique_keys(pairs: list) -> dict:
    found = dict(pairs)
    need(len(found) == len(pairs),
         f"a key is given twice: {[key for key, _ in pairs]}")
    return found


def read_address(entry: dict, who: str, *ports: str) -> tuple:
    """The host, then the ports of these names."""
    host = entry.get("host")
    need(isinstance(host, str) and host and host.isprintable() and " " not in host,
         f'{who}: "host" must be a host name or an address')
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f'{who}: "host" is no host name') from None
    for port in ports:
        need(type(entry.get(port)) is int and 1 <= entry[port] <= 65535,
             f'{who}: "{port}" must be a port from 1 to 65535')
    return host, *(entry[port] for port in ports)


def read_brokers(entries: list) -> Ring:
    ring = Ring()
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        need(is_name(name), f"not a good name for a broker: {name!a:.99}")
        need(not ring.find(name), f"broker {name} is given twice")
        ring.append(Broker(name, *read_address(entry, name, "mqtt", "http", "tcp")))
    need(ring.last, "there are no brokers")
    return ring


def check_places(places: dict, ring: Ring) -> None:
    need(places, "there are no places")
    for name, place in places.items():
        need(is_name(name), f"not a good name for a place: {name!a:.99}")
        need(not ring.find(name), f"{name} is a broker and a place")
        need(isinstance(place, dict), f"place {name} must be a JSON object")
        at, broker, spots = place.get("at"), place.get("broker"), place.get("spots", 1)
        need(isinstance(at, list) and len(at) == 2
             and all(is_number(x, -FINITE, FINITE) for x in at),
             f'place {name}: "at" must be two finite numbers')
        need(isinstance(broker, str) and ring.find(broker),
             f"place {name} belongs to an unknown broker: {broker!a:.99}")
        need(type(spots) is int and 1 <= spots <= 1000,
             f'place {name}: "spots" must be a whole number from 1 to 1000')


def check_roads(roads: list, places: dict) -> None:
    for road in roads:
        need(isinstance(road, list) and len(road) == 2
             and all(isinstance(end, str) and end in places for end in road),
             f"a road to nowhere: {road!a:.99}")
        need(road[0] != road[1], f"a road from {road[0]} to itself")
