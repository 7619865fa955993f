"""An electric car: it drives, drains, asks for a spot, goes there, charges, drives on.

           +-----------------------------full----------------------------+
           v                                                             |
        driving --below 25 %--> asking --an offer--> going --plug--> charging
                                  ^ |                                    |
                                  | +--refused--> waiting                |
                                  +--5 s later-------+                   |
                                  +-------the spot is not ours-----------+

        CAR --request--> fog --reply--> CAR         where is the nearest free spot?
        CAR --plug--> station                       again and again while it charges
        CAR --leave-> station                       the spot is somebody else's now
        station --state--> CAR                      do I stand there as charging?

A car owns its battery and its plan. It is connected to one broker at a time: that of
the region it is in, or, when that one does not answer, the next in the ring.

    python3 car.py [NAME ...] [--at PLACE] ...     these cars; no name: car1
    python3 car.py --rush N                        N cars that ask at once, and a table

One thread a car runs `live` and touches all of its state: no lock.
Read next: test_system.py.
Left out on purpose: traffic, hills, and choosing a spot by anything but its distance.
"""

import argparse
import collections
import contextlib
import itertools
import logging
import math
import random
import select
import sys
import threading
import time

from broker import Link
from cloud_server import (Story, give_up, is_reply, positive, run_until_stopped,
                          start_up, until_stopped)
from ring import Broker, City, is_name, is_number, need, read_object

FULL = 60           # km on a full battery
LOW = 25            # %: below it the car asks for a spot
POWER = 10          # % a second that charging adds
TURN = 0.1          # s between two looks around
NEWS = 1.0          # s between two messages about the battery
RECONNECT = 1.0     # s before the next try to connect
PLUG = 1.0          # s before plugging in again, until the station says that we do
REPLY_WAIT = 10     # s for a reply; the broker has 9
PLUG_WAIT = 3       # s until the station's state must show the car as charging
STRANDED = 60       # s until a car asks again from where asking can hardly help
HOPS = {1: "by the own broker", 2: "one broker further", 3: "two brokers further"}


class Stop(Exception):
    """The user wants the car to end."""


class Car:
    """Touched by its own thread only, the one that runs `live`."""

    def __init__(self, name: str, city: City, at: str, battery: float, speed: float,
                 charges: float):
        self.name, self.city, self.speed, self.charges = name, city, speed, charges
        self.at, self.came_from = at, at    # the place it last passed, the one before
        self.ahead, self.offset = at, 0.0       # where to, and km driven since `at`
        self.behind = 0.0                       # km to drive back to `at` first
        self.battery = battery                  # %
        self.doing = "driving"
        self.broker = self.home()
        self.numbers = itertools.count(int(time.time() * 10) % 10**6)   # new each life
        self.request_id, self.reply, self.retry = "", None, 0.0
        self.offer: dict | None = None          # the spot it goes to, or charges at
        self.legs: list[str] = []               # the places still ahead of it
        self.seen: str | None = None            # what the station says that we do
        self.next_news = 0.0                    # on the monotonic clock
        self.tell = Story(name)
        self.stopping = threading.Event()       # set by the main thread

    def live(self) -> None:
        """Connection after connection; what the car is doing outlives each of them."""
        told, failures = set(), 0
        while self.charges and not self.stopping.is_set():
            try:
                self.connect()
                told, failures = set(), 0
                with contextlib.suppress(Stop):
                    while self.charges:
                        self.become(self.LIFE[self.doing](self))
                self.say_goodbye()
            except ConnectionError as fault:
                failures += 1
                trouble = f"-> {self.broker.name:<8} {fault}"
                if trouble not in told:     # each new one once
                    self.tell(trouble)
                told.add(trouble)
                if failures > 1:
                    self.turn_to_next()
                self.stopping.wait(RECONNECT)

    # --- its connection

    def home(self) -> Broker:
        """The broker of the region the car is in."""
        return self.city.ring.find(self.city.places[self.at]["broker"])

    def topic(self, *levels: str) -> str:
        return "/".join([self.broker.name, "cars", self.name, *levels])

    def connect(self) -> None:
        """Raises ConnectionError if the broker does not answer."""
        self.link = Link(self.broker, self.name, self.topic("state"),
                         self.state("offline"))
        self.link.subscribe(self.topic("reply"))
        self.watch_station()
        self.publish_state()
        whose = "" if self.broker is self.home() else f", not {self.home().name}"
        self.tell(f"-> {self.broker.name:<8} connected at {self.at}{whose}")

    def watch_station(self) -> None:
        """Its state tells whether we are charging there: its word counts, not ours."""
        if self.offer and self.offer["broker"] == self.broker.name:
            station = self.offer["station"]
            self.link.subscribe(f"{self.broker.name}/stations/{station}/state")

    def move_to(self, broker: Broker) -> None:
        """Leave nothing behind at the old broker, and connect to another one."""
        self.tell(f"-> {broker.name:<8} roams there from {self.broker.name}")
        self.link.publish(self.topic("state"), None, retain=True)
        self.link.close()
        self.broker = broker
        self.connect()

    def turn_to_next(self) -> None:
        """Our broker does not answer: what it promised is worth nothing now."""
        self.broker = self.broker.next
        if self.doing != "driving":
            self.offer, self.doing = None, "asking"

    def state(self, doing: str) -> dict:
        return {"car": self.name, "at": self.at, "battery": round(self.battery, 1),
                "doing": doing}

    def publish_state(self) -> None:
        self.next_news = time.monotonic() + NEWS
        self.link.publish(self.topic("state"), self.state(self.doing), qos=0,
                          retain=True)

    def become(self, doing: str) -> None:
        """The next step of its life begins."""
        self.doing = doing
        self.publish_state()

    def say_goodbye(self) -> None:
        """Nobody shall have to wait for our lease, or be told by our will."""
        if self.offer:
            self.give_back(self.offer)
        self.link.publish(self.topic("state"), self.state("offline"), retain=True)
        self.link.close()

    def pause(self) -> float:
        """Look after the connection for a moment. Returns the seconds that went by."""
        began = time.monotonic()
        self.link.turn(TURN)
        while self.link.inbox:
            self.hear(self.link.inbox.popleft())
        if time.monotonic() >= self.next_news:
            self.publish_state()
        if self.stopping.is_set():
            raise Stop
        return time.monotonic() - began

    def hear(self, message) -> None:
        """Only note it: the step of life that waits for it will see it."""
        try:
            fields = read_object(message.payload)
            if message.topic == self.topic("reply"):
                if is_reply(self.city, fields, self.request_id):
                    self.reply = fields
            elif self.offer and fields.get("station") == self.offer["station"]:
                need(isinstance(fields.get("cars"), dict), "no cars")
                self.seen = fields["cars"].get(self.name, "")
        except ValueError as fault:
            self.tell(f"<- a message makes no sense: {fault!s:.99}")

    # --- its life: each step returns what the car does next

    def drive(self) -> str:
        """To a neighbouring place, and not back if there is another way."""
        if self.battery < LOW:
            return "asking"
        roads = [place for road in self.city.roads if self.at in road
                 for place in road if place != self.at]
        if not roads:
            self.pause()        # a place without roads
            return "driving"
        onward = [place for place in roads if place != self.came_from]
        self.travel(self.ahead if self.offset else random.choice(onward or roads), LOW)
        if self.battery < LOW:
            return "asking"
        self.tell(f"{self.bar()} at {self.at}")
        if self.home().name != self.city.places[self.came_from]["broker"]:
            self.move_to(self.home())
        return "driving"

    def ask(self) -> str:
        """Ask for a spot. The broker repeats its reply to the same id, so asking a
        second time can do no harm; after that the broker counts as dead."""
        self.request_id, self.reply = f"{self.name}-{next(self.numbers)}", None
        km = max(0.0, self.battery / 100 * FULL - self.offset - self.behind)
        self.tell(f"-> {self.broker.name:<8} {self.request_id} asks for a spot at "
                  f"{self.at} (range {km:.1f} km)")
        for _ in range(2):      # a second time with the same id: the first may be lost
            self.link.publish(self.topic("request"), {
                "id": self.request_id, "at": self.at, "range": round(km, 3)})
            end = time.monotonic() + REPLY_WAIT
            while not self.reply and time.monotonic() < end:
                self.pause()
            if self.reply:
                return self.understand(self.reply)
        self.turn_to_next()
        raise ConnectionError("no reply")

    def understand(self, reply: dict) -> str:
        """Go there; or wait; or, where asking again from here is in vain, drive on."""
        if reply["station"]:
            self.accept(reply)
            return "going"
        self.retry = STRANDED if reply.get("retry") is None else reply["retry"]
        if self.offset and reply.get("retry") is None:
            self.tell(f"<- {self.broker.name:<8} {self.request_id} {reply['reason']}: "
                      f"drives on to {self.ahead} to ask there")
            self.travel(self.ahead)
            return "asking"
        self.tell(f"<- {self.broker.name:<8} {self.request_id} {reply['reason']}: "
                  f"waits {self.retry:g} s")
        return "waiting"

    def accept(self, offer: dict) -> None:
        """A car has one spot: the one it had before is somebody else's from now on."""
        self.tell(f"<- {self.broker.name:<8} {self.request_id} {offer['station']} at "
                  f"{offer['broker']}, {offer['km']} km by {'-'.join(offer['route'])} "
                  f"(asked {', '.join(offer['asked'])})")
        old, self.offer, self.seen = self.offer, offer, None
        if old and old["station"] != offer["station"]:
            self.give_back(old)
        self.legs = offer["route"][1:]
        self.behind, self.offset = self.behind + self.offset, 0.0
        self.watch_station()

    def wait(self) -> str:
        """As long as the broker has said; the car stays where it is."""
        end = time.monotonic() + self.retry
        while time.monotonic() < end:
            self.pause()
        return "asking"

    def go(self) -> str:
        """The offered way. First it connects to the broker there: while it drives, a
        hold is all that keeps its spot, and plugging in needs that broker."""
        if self.offer["broker"] != self.broker.name:
            self.move_to(self.city.ring.find(self.offer["broker"]))
        while self.behind > 0:
            self.behind -= self.burn(self.behind)
        while self.legs:
            self.travel(self.legs[0])
            self.legs.pop(0)
            self.tell(f"{self.bar()} at {self.at}")
        return "charging"

    def charge(self) -> str:
        """Plug in and renew; charge only while the station says that we do."""
        station, lease = self.offer["station"], self.offer["lease"]
        plugged, next_plug = False, 0.0
        end = time.monotonic() + PLUG_WAIT
        while self.battery < 100:
            if time.monotonic() >= next_plug:
                self.link.publish(self.topic("plug", station), {})
                next_plug = time.monotonic() + (lease / 3 if plugged else PLUG)
            seconds = self.pause()
            if self.seen == "charging":
                if not plugged:
                    self.tell(f"-> {station:<8} {self.request_id} "
                              f"charging at {station}")
                plugged = True
                self.battery = min(100.0, self.battery + POWER * seconds)
            elif plugged or time.monotonic() > end:
                self.tell(f"<- {station:<8} {self.request_id} not ours: asks anew")
                return "asking"
        self.tell(f"{self.bar()} {self.request_id} leaves {station}")
        self.give_back(self.offer)
        self.offer, self.charges = None, self.charges - 1
        return "driving"

    LIFE = {"driving": drive, "asking": ask, "waiting": wait, "going": go,
            "charging": charge}

    def give_back(self, offer: dict) -> None:
        """At another broker than ours nobody would hear it: there the lease ends it."""
        if offer["broker"] == self.broker.name:
            self.link.publish(self.topic("leave", offer["station"]), {})

    def travel(self, place: str, low: float = 0) -> None:
        """Along the road to a place, or until the battery is below `low`."""
        length, self.ahead = self.city.km(self.at, place), place
        while self.offset < length and self.battery >= low:
            self.offset += self.burn(length - self.offset)
        if self.offset >= length:
            self.came_from, self.at, self.offset = self.at, place, 0.0

    def burn(self, most: float) -> float:
        """Drive on for a moment. Returns the km, `most` at the most."""
        km = min(most, self.pause() * self.speed)
        self.battery = max(0.0, self.battery - km / FULL * 100)
        return km

    def bar(self) -> str:
        full = round(self.battery / 10)
        return f"[{'#' * full}{'.' * (10 - full)}] {self.battery:3.0f} %"


# --- Rush hour ------------------------------------------------------------------------

class Rush:
    """Many cars that ask at once, over one connection for each MQTT server."""

    def __init__(self, city: City, count: int, seed: int):
        dice, places, stamp = random.Random(seed), list(city.places), time.time_ns()
        self.city = city
        self.cars = {f"rush-{n}": dice.choice(places) for n in range(1, count + 1)}
        self.ids = {f"{car}-{stamp % 10**9}": car for car in self.cars}
        self.since: dict[str, float] = {}       # request id: when it was sent
        self.replies: dict[str, dict] = {}      # request id: its first reply
        self.times = collections.defaultdict(list)      # how they fared: [seconds]
        self.links: dict[str, Link] = {}        # by broker; brokers may share a server

    def run(self) -> int:
        """Returns the exit status: 1 if a reply is missing, or something came twice."""
        self.connect()
        for number, request_id in enumerate(self.ids):
            self.ask(request_id)
            if number % 8 == 0:     # hear the first replies while the last still ask
                self.listen(0)
        end = time.monotonic() + REPLY_WAIT
        while len(self.replies) < len(self.ids) and time.monotonic() < end:
            self.listen(TURN)
        seconds = time.monotonic() - min(self.since.values())
        self.give_back()
        return self.report(seconds)

    def connect(self) -> None:
        """One connection for each server, however many brokers share it."""
        servers = {}
        for broker in self.city.ring:
            address = broker.host, broker.mqtt
            servers[address] = servers.get(address) or Link(
                broker, "rush", f"{broker.name}/cars/rush/state", None)
            servers[address].subscribe(f"{broker.name}/cars/+/reply")
            self.links[broker.name] = servers[address]

    def ask(self, request_id: str) -> None:
        car = self.ids[request_id]
        broker = self.city.places[self.cars[car]]["broker"]
        self.since[request_id] = time.monotonic()
        self.links[broker].publish(f"{broker}/cars/{car}/request", {
            "id": request_id, "at": self.cars[car], "range": FULL})

    def listen(self, seconds: float) -> None:
        """Wait for all brokers at once, and hear whichever has something to say."""
        links = {link.client.socket(): link for link in self.links.values()}
        if None in links:
            raise ConnectionError("a broker has hung up")
        for ready in select.select(list(links), [], [], seconds)[0]:
            links[ready].turn(0)
            while links[ready].inbox:
                with contextlib.suppress(ValueError):   # nonsense is no reply to us
                    self.hear(read_object(links[ready].inbox.popleft().payload))

    def hear(self, reply: dict) -> None:
        """Note how a car fared, and when."""
        request_id = reply.get("id")
        if request_id not in self.ids or not is_reply(self.city, reply, request_id):
            return      # another car's, or an earlier rush's
        fared = "refused" if not reply["station"] else HOPS.get(
            len(reply["asked"]), "by a broker further on")
        if request_id in self.replies:
            fared = "twice"
        self.replies.setdefault(request_id, reply)
        self.times[fared].append(time.monotonic() - self.since[request_id])
        if len(self.replies) % max(100, len(self.ids) // 10) == 0:
            logging.info("%d of %d have their reply", len(self.replies), len(self.ids))

    def give_back(self) -> None:
        for request_id, reply in self.replies.items():
            if broker := reply["station"] and reply["broker"]:
                car = f"{broker}/cars/{self.ids[request_id]}"
                self.links[broker].publish(f"{car}/leave/{reply['station']}", {})
        for link in set(self.links.values()):
            link.close()

    def report(self, seconds: float) -> int:
        """The table. A spot promised to two of our cars counts as `twice`, too."""
        replies = self.replies.values()
        promised = collections.Counter(reply["station"] for reply in replies)
        over = sum(max(0, promised[station] - self.city.places[station]["spots"])
                   for station in self.city.stations())
        never, twice = len(self.ids) - len(self.replies), len(self.times["twice"])
        logging.info("%-24s%6s%12s%12s%12s", "", "cars", "median", "99 %", "slowest")
        for fared in [*HOPS.values(), "by a broker further on", "refused"]:
            times = [1000 * took for took in sorted(self.times[fared])]
            figures = [times[int(len(times) * part)] for part in (0.5, 0.99, 1 - 1e-9)
                       ] if times else []
            logging.info(f"%-24s%6d{'%9.1f ms' * len(figures)}", fared, len(times),
                         *figures)
        logging.info("%-24s%6d", "twice", twice + over)
        logging.info("%-24s%6d", "never", never)
        logging.info("%d replies in %.2f s: %.0f a second", len(self.replies), seconds,
                     len(self.replies) / seconds)
        return int(bool(never or over or twice))


def rush_hour(city: City, count: int, seed: int) -> None:
    if not 1 <= count <= 50_000:
        give_up("--rush takes 1 to 50000 cars")
    with until_stopped():
        try:
            sys.exit(Rush(city, count, seed).run())
        except ConnectionError as fault:
            sys.exit(f"rush hour needs the whole city: {fault}")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Electric cars of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="cars (car1)")
    parser.add_argument("--at", metavar="PLACE", help="where they start (first place)")
    parser.add_argument("--battery", metavar="PERCENT", type=float, default=50,
                        help="how full they start (50)")
    parser.add_argument("--speed", metavar="KM_PER_S", type=positive, default=2,
                        help="how fast they drive (2)")
    parser.add_argument("--charges", metavar="N", type=int, default=math.inf,
                        help="stop after so many charges (never)")
    parser.add_argument("--rush", metavar="N", type=int, help="N cars that ask at once")
    parser.add_argument("--seed", metavar="N", type=int, default=1,
                        help="of the places in the rush (1)")
    return parser


def main() -> None:
    parser = command_line()
    args, city = start_up(parser)
    at = args.at or next(iter(city.places))
    names = list(dict.fromkeys(args.names or ["car1"]))
    if at not in city.places:
        give_up(f"{args.config}: there is no place {at!a}")
    for name in names:
        if not is_name(name) or name in city.places or city.ring.find(name):
            give_up(f"{args.config}: {name!a} is no good name for a car here")
    if not is_number(args.battery, 0, 100) or args.charges < 1:
        parser.error("--battery is 0 to 100, --charges 1 or more")
    if args.rush is not None:
        rush_hour(city, args.rush, args.seed)
    run_until_stopped([Car(name, city, at, args.battery, args.speed, args.charges)
                       for name in names])


if __name__ == "__main__":
    main()
