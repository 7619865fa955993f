"""A charging station: it owns its spots, and nobody else does.

        fog --hold--> STATION --held: yes / no--> fog       a spot is kept for a car
        car --plug--> STATION     again and again: renews   the car charges
        car --leave-> STATION <--release-- fog              the spot is free again
                      STATION --state, online--> all       (retained)

The life of a spot:  free -> held (60 s) -> charging (15 s after the last plug) -> free

Every promise ends by itself: a hold or a plug is a lease, and a car that is never heard
of again loses its spot when the lease has run out. What a station said last is kept by
its broker (a retained message); after a crash it reads that back before it promises
anything.

    python3 station.py [NAME ...] [--hold S] [--lease S]    these stations; no name: all

One thread a station owns all of its state, and looks after its connection too: no lock.
Read next: car.py. Left out on purpose: kilowatts, prices, a memory of its own on disk.
"""

import argparse
import dataclasses
import threading
import time

from broker import Link
from cloud_server import Story, give_up, is_id, positive, run_until_stopped, start_up
from ring import City, is_name, need, read_object

HOLD = 60       # s a spot is kept for a car on its way; a drive takes less
LEASE = 15      # s a plug counts; the car renews it every third of that
TURN = 0.1      # s between two looks at the leases
RESTORE = 5     # s for our own words to come back: a busy broker may need one
RECONNECT = 1   # s before a lost broker is tried again


@dataclasses.dataclass
class Spot:
    """A spot that is not free."""
    use: str        # "held" or "charging"
    hold_id: str    # of the last hold that was said yes to; "" if there was none
    until: float    # on the monotonic clock: then the lease has run out

    def request(self) -> str:
        """The car's request behind it, as it stands in every log."""
        return self.hold_id.split("@")[0] or "-"


class Station:
    """Its spots are touched by its own thread only, the one that runs `live`.

    At any time: len(self.cars) <= self.spots, and a car has at most one of them.
    """

    def __init__(self, name: str, city: City, hold: float, lease: float):
        self.name, self.hold, self.lease = name, hold, lease
        self.spots = city.places[name]["spots"]
        self.broker = city.ring.find(city.places[name]["broker"])
        self.topic = f"{self.broker.name}/stations/{name}"
        self.cars: dict[str, Spot] = {}
        self.restored = False
        self.tell = Story(name)
        self.stopping = threading.Event()       # set by the main thread

    # --- one connection after the other

    def live(self) -> None:
        """Connection after connection; the spots outlive each of them."""
        told = ""
        while not self.stopping.is_set():
            try:
                self.serve()
            except ConnectionError as fault:
                if str(fault) != told:          # each new trouble once
                    self.tell(f"-> {self.broker.name:<8} {fault}; trying again")
                told = str(fault)
                self.stopping.wait(RECONNECT)

    def serve(self) -> None:
        """From one connect to its end. Raises ConnectionError if it is lost."""
        self.link = Link(self.broker, self.name, f"{self.topic}/online", False)
        cars = f"{self.broker.name}/cars/+"
        self.link.subscribe(f"{self.topic}/hold", f"{self.topic}/release",
                            f"{cars}/plug/{self.name}", f"{cars}/leave/{self.name}")
        if not self.restored:
            self.restore()
        self.publish_state()
        self.link.publish(f"{self.topic}/online", True, retain=True)
        self.tell(f"-> {self.broker.name:<8} serves {self.spots} spots, "
                  f"{self.spots - len(self.cars)} of them free")
        while not self.stopping.is_set():
            self.link.turn(TURN)
            while self.link.inbox:
                self.hear(self.link.inbox.popleft())
            self.end_leases()
        self.link.publish(f"{self.topic}/online", False, retain=True)
        self.link.close()

    def restore(self) -> None:
        """Read our own retained state back; what else comes meanwhile waits its turn.

        There may be none, and nothing would tell. So we say something to ourselves
        after subscribing: when that arrives, the state has come, or never will.
        """
        self.link.subscribe(f"{self.topic}/state", f"{self.topic}/online")
        self.link.publish(f"{self.topic}/online", False)
        later, back, end = [], False, time.monotonic() + RESTORE
        while not back:
            self.link.turn(TURN)
            need(time.monotonic() < end and not self.stopping.is_set(),
                 "does not give us our own words back", ConnectionError)
            while self.link.inbox:
                message = self.link.inbox.popleft()
                if message.topic == f"{self.topic}/state":
                    self.remember(message.payload)
                elif message.topic == f"{self.topic}/online":
                    back = back or not message.retain
                else:
                    later.append(message)
        self.link.client.unsubscribe([f"{self.topic}/state", f"{self.topic}/online"])
        self.link.inbox.extendleft(reversed(later))
        self.restored = True

    def remember(self, payload: bytes) -> None:
        """Who had our spots when we were last heard of; the leases begin anew."""
        try:
            cars = read_object(payload).get("cars")
            need(isinstance(cars, dict) and all(
                use in ("held", "charging") for use in cars.values()), "no cars")
        except ValueError as fault:
            return self.tell(f"our own last state makes no sense: {fault}")
        now = time.monotonic()
        for car, use in sorted(cars.items(), key=lambda item: item[1] != "charging"):
            lease = {"held": self.hold, "charging": self.lease}.get(use)
            if is_name(car) and lease and len(self.cars) < self.spots:
                self.cars[car] = Spot(use, "", now + lease)
                self.tell(f"remembers {car}: {use}")

    # --- what it hears

    def hear(self, message) -> None:
        """Nonsense is told in one line, and changes nothing."""
        try:
            _, _, name, verb, *_ = message.topic.split("/")
            fields = read_object(message.payload)
            if verb in ("plug", "leave"):
                need(is_name(name), "no good name for a car")
                self.plug(name) if verb == "plug" else self.leave(name)
            elif verb == "hold":
                need(is_id(fields.get("id"), 200), "no id")
                need(is_name(fields.get("car")), "no car")
                self.keep(fields["car"], fields["id"])
            elif verb == "release":
                self.release(fields)
        except ValueError as fault:
            self.tell(f"<- a message makes no sense: {fault!s:.99}")

    def keep(self, car: str, hold_id: str) -> None:
        """Keep a spot for a car. Asked again, it is the same spot under the new id."""
        spot, ok = self.cars.get(car), True
        if spot:
            spot.hold_id = hold_id
            if spot.use == "held":
                spot.until = time.monotonic() + self.hold
        elif len(self.cars) < self.spots:
            spot = self.cars[car] = Spot("held", hold_id, time.monotonic() + self.hold)
            self.publish_state()        # before the yes: the fog shall know both
        else:
            ok = False
        times = {"hold": self.hold, "lease": self.lease} if ok else {}
        self.link.publish(f"{self.topic}/held",
                          {"id": hold_id, "car": car, "ok": ok} | times)
        self.tell(f"-> {self.broker.name:<8} {hold_id.split('@')[0]} "
                  + (f"{spot.use} for {car}" if ok else f"no spot for {car}: full"))

    def release(self, fields: dict) -> None:
        """Undo a hold, by its id or by its car; a car that charges stays."""
        for car, spot in list(self.cars.items()):
            same_hold = spot.hold_id and spot.hold_id == fields.get("id")
            if spot.use == "held" and (same_hold or car == fields.get("car")):
                self.free(car, "released")

    def plug(self, car: str) -> None:
        """A car has arrived, or says that it still charges."""
        spot = self.cars.get(car)
        if not spot and len(self.cars) >= self.spots:
            self.tell(f"<- {car:<8} plugs in, but no spot is free")
            return self.publish_state()         # so it does not find itself there
        if spot and spot.use == "charging":
            spot.until = time.monotonic() + self.lease
            return
        hold_id = spot.hold_id if spot else ""
        spot = self.cars[car] = Spot("charging", hold_id, time.monotonic() + self.lease)
        self.tell(f"<- {car:<8} {spot.request()} plugs in")
        self.publish_state()

    def leave(self, car: str) -> None:
        """A car wants its spot no more, held or charging."""
        if car in self.cars:
            self.free(car, "leaves")

    def end_leases(self) -> None:
        """Who is not heard of loses its spot: so no dead car can block it for ever."""
        now = time.monotonic()
        for car, spot in list(self.cars.items()):
            if spot.until <= now:
                self.free(car, "was not heard of for too long")

    def free(self, car: str, why: str) -> None:
        spot = self.cars.pop(car)
        self.tell(f"<- {car:<8} {spot.request()} {why}: "
                  f"{self.spots - len(self.cars)} of {self.spots} free")
        self.publish_state()

    def publish_state(self) -> None:
        """For the fog, the cars, and ourselves after a crash: so it is retained. With
        QoS 0, as an old one that paho sends again would overwrite a newer one."""
        self.link.publish(f"{self.topic}/state", {
            "station": self.name, "spots": self.spots,
            "free": self.spots - len(self.cars),
            "cars": {car: spot.use for car, spot in self.cars.items()},
        }, qos=0, retain=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Charging stations of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="stations (all)")
    parser.add_argument("--hold", metavar="S", type=positive, default=HOLD,
                        help=f"seconds a spot is kept for a car on its way ({HOLD})")
    parser.add_argument("--lease", metavar="S", type=positive, default=LEASE,
                        help=f"seconds a plug counts ({LEASE})")
    args, city = start_up(parser)
    for name in args.names:
        if name not in city.stations():
            give_up(f"{args.config}: there is no station {name!a}")
    stations = [Station(name, city, args.hold, args.lease)
                for name in dict.fromkeys(args.names or city.stations())]
    run_until_stopped(stations)


if __name__ == "__main__":
    main()
